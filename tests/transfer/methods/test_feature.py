"""Features, patches and classes of whole teachers against a dense float64 reference, standardized or not."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from graftvit.launch.plan_text import describe_plan
from graftvit.models.errors import ConfigError, TransferError, UnsupportedModelError
from graftvit.transfer import DualViT, OutsideTeacher
from graftvit.transfer.engine import early_signals
from graftvit.transfer.engine.dry_run import dry_run
from graftvit.transfer.engine.tasks import classification_loss
from graftvit.transfer.engine.train import train
from graftvit.transfer.methods.feature import average_to
from graftvit.transfer.methods.registry import describe_transfer
from graftvit.transfer.methods.standardize import Standardizer, hadamard_matrix
from graftvit.transfer.setting import check_effect
from support.models.dense import gradient, images, relative_error, tiny
from support.runs.engine_runs import config, differences, make_convnext, make_teacher, state
from support.runs.interrupting import terminated_after
from torch import Tensor, nn


def convolutional(name: str = "test_resnet", seed: int = 3) -> Any:
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=5).double().eval()


def patches_of(model: nn.Module, x: Tensor) -> Tensor:
    """Tokens after the final norm without the class token, (B, 4, 6, C)."""
    features: Tensor = model.forward_features(x)
    return features[:, 1:].reshape(len(x), 4, 6, -1)


LOSSES = {
    "cosine": lambda s, t: (1 - (F.normalize(s, dim=-1) * F.normalize(t, dim=-1)).sum(-1)).mean(),
    "smooth_l1": F.smooth_l1_loss,
    "mse": lambda s, t: (s - t).square().mean(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_features_and_patches_of_a_vision_transformer(pool: str, loss: str) -> None:
    teacher, student, x = tiny(seed=1, embed_dim=48), tiny(seed=2, global_pool=pool), images()
    twin = copy.deepcopy(student)
    dual = DualViT(teacher, student, "feature", tokens="both", feature_loss=loss, weight=2.0)
    projectors = copy.deepcopy(dual.projectors)
    out = dual(x)
    out.transfer_loss.backward()

    pooled = twin.forward_head(twin.forward_features(x), pre_logits=True)
    theirs = teacher.forward_head(teacher.forward_features(x), pre_logits=True).detach()
    expected = {
        "feature": LOSSES[loss](projectors["feature"](pooled), theirs),
        "patches": LOSSES[loss](projectors["patches"](patches_of(twin, x)), patches_of(teacher, x).detach()),
    }
    total = 2 * (expected["feature"] + expected["patches"])
    total.backward()
    assert set(out.parts) == set(expected)
    assert all(relative_error(out.parts[name], expected[name]) < 1e-12 for name in expected)
    assert relative_error(out.transfer_loss, total) < 1e-12
    assert relative_error(gradient(student), gradient(twin)) < 1e-10
    assert relative_error(gradient(dual.projectors), gradient(projectors)) < 1e-10


@pytest.mark.parametrize(("size", "grid"), [((64, 96), (2, 3)), ((96, 96), (3, 3)), ((32, 64), (1, 2))])
def test_patches_are_averaged_to_the_coarser_grid(size: tuple[int, int], grid: tuple[int, int]) -> None:
    """A ResNet has 32 pixels a patch, the student 8."""
    teacher, student, x = convolutional(), tiny(seed=2, img_size=size), images(size=size)
    dual = DualViT(teacher, student, "feature", tokens="patches", feature_loss="mse", weight=1.0)
    projector = copy.deepcopy(dual.projectors["patches"])
    out = dual(x)
    own = student.forward_features(x)[:, 1:].reshape(2, size[0] // 8, size[1] // 8, -1)
    pooled = F.adaptive_avg_pool2d(own.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)
    target = teacher.forward_features(dual.teacher_input(x)).permute(0, 2, 3, 1)
    assert target.shape[1:3] == grid
    assert relative_error(out.transfer_loss, F.mse_loss(projector(pooled), target)) < 1e-12


@pytest.mark.parametrize(
    ("fine", "coarse"), [((6, 6), (4, 3)), ((5, 7), (3, 7)), ((4, 4), (4, 4)), ((3, 5), (1, 1))]
)
def test_the_average_is_over_areas(fine: tuple[int, int], coarse: tuple[int, int]) -> None:
    x = torch.randn(2, *fine, 3, dtype=torch.float64)
    split = x.repeat_interleave(coarse[0], 1).repeat_interleave(coarse[1], 2)  # each patch in equal cells
    cells = split.reshape(2, coarse[0], fine[0], coarse[1], fine[1], 3)
    assert relative_error(average_to(x, coarse), cells.mean((2, 4))) < 1e-14


@pytest.mark.parametrize(
    "family", ["deit_distilled", "dinov2_registers", "siglip", "beit", "eva02", "dinov3"]
)
def test_patches_of_every_family(family: str) -> None:
    changes = {"patch_size": 8} if family in ("dinov2_registers", "eva02") else {}
    teacher, student = tiny(family, seed=1, **changes), tiny(family, seed=2, **changes)
    x = images()
    dual = DualViT(teacher, student, "feature", tokens="patches", feature_loss="mse", weight=1.0)
    loss = dual(x).transfer_loss
    prefix = student.num_prefix_tokens
    both = [
        model.forward_features(each)[:, prefix:]
        for model, each in ((student, x), (teacher, dual.teacher_input(x)))
    ]
    assert both[0].shape[1] == 24
    assert relative_error(loss, F.mse_loss(*both)) < 1e-12


@pytest.mark.slow
def test_a_compiled_step_has_no_graph_break() -> None:
    torch.compiler.reset()
    teacher, student, x = convolutional(), tiny(seed=2, img_size=(64, 64)), images(size=(64, 64))
    dual = DualViT(teacher, student, "feature", tokens="both")
    expected = dual(x).transfer_loss
    dual.compile(backend="eager", fullgraph=True)
    assert relative_error(dual(x).transfer_loss, expected) < 1e-12


def test_a_model_of_another_library_gives_patches_as_a_map_or_as_a_list() -> None:
    model, x, losses = convolutional(), images(size=(64, 64)), []
    student = tiny(seed=2, img_size=(64, 64), patch_size=32)  # the grid of the teacher
    for shaped in (lambda features: features, lambda features: features.flatten(2).transpose(1, 2)):
        results = lambda x, shaped=shaped: {"patches": shaped(model.forward_features(x))}  # noqa: E731
        torch.manual_seed(0)  # of the projector
        outside = OutsideTeacher(results, patch_width=model.num_features)
        dual = DualViT(outside, student, "feature", tokens="patches").double()
        losses.append(dual(x).transfer_loss.detach())
        student = dual.release()
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (lambda x: {"classes": x.mean((2, 3))}, "returned nothing as 'patches', and patch_width=4 says"),
        (lambda x: {"patches": x}, r"returned \(2, 3, 32, 48\) as 'patches'"),
        (lambda x: {"patches": torch.zeros(2, 5, 4)}, "5 patches without their grid, .* student has 4x6"),
    ],
)
def test_wrong_patches_are_named(results: Any, message: str) -> None:
    dual = DualViT(OutsideTeacher(results, patch_width=4), tiny(seed=2), "feature", tokens="patches").double()
    with pytest.raises(TransferError, match=message):
        dual(images())
    dropping = DualViT(tiny(seed=1), tiny(seed=2, patch_drop_rate=0.5).train(), "feature", tokens="patches")
    with pytest.raises(TransferError, match="patch_drop_rate to 0"):
        dropping(images())


class OrderedOutput(OrderedDict[str, Tensor]):
    """As transformers return them: a mapping with attributes."""

    def __getattr__(self, name: str) -> Tensor:
        return self[name]


def test_hard_labels_are_the_cross_entropy_with_the_teachers_class() -> None:
    teacher, student, x = tiny(seed=1), tiny(seed=2), images(batch=8)
    twin = copy.deepcopy(student)
    loss = DualViT(teacher, student, "logits", logits_loss="hard", weight=1.0)(x).transfer_loss
    loss.backward()
    expected = F.cross_entropy(twin(x), teacher(x).argmax(-1))
    expected.backward()
    assert relative_error(loss, expected) < 1e-12
    assert relative_error(gradient(student), gradient(twin)) < 1e-12
    with pytest.raises(TransferError, match=r"temperature=2 changes nothing with transfer.logits_loss=hard"):
        DualViT(teacher, tiny(seed=3), "logits", logits_loss="hard", temperature=2.0)
    assert "hard-label" in describe_transfer({"method": "logits", "logits_loss": "hard"})[0][1]
    assert "KL" in describe_transfer({"method": "logits"})[0][1]  # a student of an older version


@pytest.mark.parametrize("loss", ["kl", "hard"])
def test_the_distillation_token_learns_from_the_teacher_and_the_class_token_from_labels(loss: str) -> None:
    """DeiT (arXiv:2012.12877): the student's prediction is the mean of both heads, and each head has its own target."""
    teacher, student, x = tiny(seed=1), tiny("deit_distilled", seed=2), images(batch=4)
    twin, labels = copy.deepcopy(student), torch.tensor([0, 1, 2, 3])
    dual = DualViT(teacher, student, "logits", logits_loss=loss, logits_head="distillation", weight=1.0)
    out = dual(x)
    (classification_loss(out.logits, labels, 0.0) + out.transfer_loss).backward()

    tokens = twin.forward_features(x)
    own, distilled = twin.head(tokens[:, 0]), twin.head_dist(tokens[:, 1])
    classes = teacher(dual.teacher_input(x))
    target = F.cross_entropy(distilled, classes.argmax(-1))
    if loss == "kl":
        target = F.kl_div(distilled.log_softmax(-1), classes.softmax(-1), reduction="batchmean")
    (F.cross_entropy(own.float(), labels) + target).backward()
    assert relative_error(out.transfer_loss, target) < 1e-12
    assert torch.equal(out.logits, own)
    assert relative_error(gradient(student), gradient(twin)) < 1e-6  # the task's loss is in float32
    assert relative_error(dual.predict(x), (own + distilled) / 2) < 1e-12
    assert not any(module._forward_hooks for module in dual.release().modules())
    with pytest.raises(TransferError, match="needs a student with a head for a distillation token"):
        DualViT(teacher, tiny(seed=3), "logits", logits_head="distillation")


@pytest.mark.parametrize("names", [("pooled", "classes"), ("pooler_output", "logits")])
@pytest.mark.parametrize("method", ["feature", "logits"])
def test_a_function_teaches_as_the_model_within(method: str, names: tuple[str, str]) -> None:
    model, x, losses = convolutional(), images(), []

    def function(x: Tensor) -> dict[str, Tensor]:
        features = model.forward_features(x)
        heads = (model.forward_head(features, pre_logits=True), model.forward_head(features))
        found = dict(zip(names, heads, strict=True))
        return found if "pooled" in names else OrderedOutput(found)

    how = {name: model.pretrained_cfg[name] for name in ("mean", "std")}
    outside = OutsideTeacher(function, feature_width=model.num_features, num_classes=5, **how)
    for teacher in (model, outside):
        torch.manual_seed(0)  # of the projector
        losses.append(DualViT(teacher, tiny(seed=2), method).double()(x).transfer_loss)
    assert torch.equal(*losses)


def test_a_function_that_returns_a_tensor_and_sees_images_of_its_own_size() -> None:
    seen: list[tuple[int, ...]] = []

    def classes(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return x.mean((2, 3)) @ torch.ones(3, 5, dtype=x.dtype)

    teacher = OutsideTeacher(classes, num_classes=5, img_size=(16, 24))
    out = DualViT({"vit": tiny(seed=1), "function": teacher}, tiny(seed=2), losses=[
        {"method": "distill"}, {"method": "logits", "teacher": "function"},
    ])(images())  # fmt: skip
    assert seen == [(2, 3, 16, 24)]
    assert set(out.terms) == {"distill", "logits@function"}


FIVE = {"num_classes": 5}


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda x: x, {}, "teaches nothing: give its feature_width"),
        (lambda x: x.mean((2, 3)), FIVE, r"returned \(2, 3\) as 'classes', and num_classes=5"),
        (lambda x: {"pooled": x.mean((2, 3))}, FIVE, r"returned nothing as 'classes'"),
        (lambda x: {"other": x}, FIVE, "returned a dict without results; valid are a tensor, or"),
        (lambda x: None, FIVE, r"returned a NoneType without results"),
    ],
)
def test_a_wrong_result_is_named(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TransferError, match=message):
        DualViT(OutsideTeacher(model, **options), tiny(seed=2), "logits")(images())
    for plain in (nn.Linear(3, 5), model):
        with pytest.raises(UnsupportedModelError, match="OutsideTeacher"):
            DualViT(plain, tiny(seed=2), "logits")


def test_the_example_of_the_page_runs() -> None:
    pytest.importorskip("transformers")
    page = (Path(__file__).parents[3] / "docs" / "transfer.md").read_text()
    start = "import timm\nfrom graftvit.transfer import DualViT, OutsideTeacher"
    (code,) = [code for code in re.findall("```python\n(.*?)```", page, re.DOTALL) if code.startswith(start)]
    names: dict[str, Any] = {}
    exec(code, names)
    x = torch.randn(2, 3, 224, 224)
    assert torch.isfinite(names["dual"](x).transfer_loss)
    assert torch.isfinite(DualViT(names["features"], names["dual"].release(), "feature")(x).transfer_loss)


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 28, 36, 44, 60, 76, 96, 384, 768, 888])
def test_hadamard_matrices(order: int) -> None:
    matrix = hadamard_matrix(order)
    assert matrix is not None
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))
    assert not any(hadamard_matrix(unknown) for unknown in (3, 6, 10, 90, 92))


@pytest.mark.parametrize("tokens", ["pooled", "patches"])
@pytest.mark.parametrize("kind", ["dimension", "phi_s"])
def test_standardized_features(kind: str, tokens: str) -> None:
    teacher, batches = tiny(seed=1), [images(batch=7, seed=seed) for seed in range(3)]
    how = {"tokens": tokens, "standardize": kind, "standardize_images": 17}
    dual = DualViT(teacher, tiny(seed=2), "feature", **how).double()
    seen: list[int] = []
    teacher.patch_embed.register_forward_hook(lambda *_: seen.append(1))
    dual.standardize([*batches, images(seed=9)])
    assert len(seen) == 3  # and not the fourth batch
    with torch.no_grad():
        features = teacher.forward_features(torch.cat(batches)[:17])
    x = features[:, 0] if tokens == "pooled" else features[:, 1:].flatten(0, 1)
    (standardizer,) = [each for each in dual.modules() if isinstance(each, Standardizer)]
    found = standardizer(x)
    assert found.mean(0).abs().max() < 1e-10
    if kind == "dimension":
        assert relative_error(found, (x - x.mean(0)) / x.std(0, correction=0)) < 1e-10
        return
    values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
    phi, one = values.mean().sqrt(), torch.ones(32, dtype=torch.float64)
    rotation = standardizer.scale * phi
    assert relative_error(rotation @ rotation.T, one.diag()) < 1e-10
    assert relative_error(torch.cov(found.T, correction=0).diagonal(), one) < 1e-8
    assert relative_error(torch.cdist(found, found), torch.cdist(x, x) / phi) < 1e-8
    # H U^T: in the basis of the principal components every entry has the same size
    entries = (rotation @ vectors)[:, values > 1e-6 * values.max()].abs()
    assert relative_error(entries, torch.full_like(entries, 32**-0.5)) < 1e-6


@pytest.mark.parametrize("kind", ["dimension", "phi_s"])
def test_the_loss_is_that_of_the_projected_student_and_the_standardized_teacher(kind: str) -> None:
    teacher, student, x = tiny(seed=1), tiny(seed=2), images(batch=6)
    dual = DualViT(teacher, student, "feature", standardize=kind, feature_loss="mse", weight=1.0).double()
    dual.standardize([x])
    projector, standardizer = (
        copy.deepcopy(dual.projectors[name]) for name in ("feature", "feature_statistics")
    )
    with torch.no_grad():
        own = student.forward_head(student.forward_features(x), pre_logits=True)
        theirs = teacher.forward_head(teacher.forward_features(x), pre_logits=True)
    centered = theirs - standardizer.mean
    target = centered @ standardizer.scale.T if kind == "phi_s" else centered * standardizer.scale
    out = dual(x)
    assert relative_error(out.transfer_loss, F.mse_loss(projector(own), target)) < 1e-12
    out.transfer_loss.backward()
    assert dual.projectors["feature"].weight.grad is not None
    twin = dual.with_student(copy.deepcopy(student))
    twin.projectors["feature"].load_state_dict(projector.state_dict())
    assert relative_error(twin(x).transfer_loss, out.transfer_loss) < 1e-12


@pytest.mark.parametrize(
    ("value", "message"),
    [(0.3, "the same features for all images"), (float("nan"), "a feature of the teacher is not finite")],
)
def test_features_that_have_no_statistics_are_named(value: float, message: str) -> None:
    teacher = OutsideTeacher(lambda x: torch.full((len(x), 8), value, dtype=x.dtype), feature_width=8)
    dual = DualViT(teacher, tiny(seed=2), "feature", standardize="dimension").double()
    with pytest.raises(TransferError, match=message):
        dual.standardize([images(batch=4)])
    with pytest.raises(TransferError, match=r"call DualViT.standardize\(batches of images\)"):
        dual(images())
    narrow = OutsideTeacher(lambda x: x.mean((2, 3)), feature_width=3)
    with pytest.raises(TransferError, match=r"width of the teacher's features.*none is known here for 3"):
        DualViT(narrow, tiny(seed=2), "feature", standardize="phi_s")


@pytest.fixture(scope="module")
def sections(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that learns two kinds of features of a ConvNeXt."""
    folder = tmp_path_factory.mktemp("teachers")
    feature = {"method": "feature", "teacher": "convnext", "standardize_images": 40, "feature_loss": "mse"}
    losses = [
        {"method": "distill"},
        {**feature, "tokens": "both", "standardize": "phi_s"},
        {**feature, "tokens": "pooled", "standardize": "dimension"},
    ]
    convnext = {"source": f"local-dir:{make_convnext(folder / 'convnext')}", "img_size": 32}
    vit = make_teacher(folder / "vit")
    return {"source": vit, "teachers": {"convnext": convnext}, "transfer": {"losses": losses}}


@pytest.mark.slow
def test_a_resumed_run_has_the_same_statistics_and_weights(sections: dict[str, Any], tmp_path: Path) -> None:
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    assert dry_run(config(straight, **sections), 1, here=True).footprint.activations > 0
    assert "standardized (phi_s) on 40 training images" in describe_plan(config(straight, **sections))
    assert train(config(straight, **sections)).finished
    with terminated_after(6):
        train(config(cut, **sections))
    early_signals.received.clear()
    kept = {name: value for name, value in state(cut).items() if "statistics" in name}
    assert len(kept) == 6
    assert all(value.any() for value in kept.values())
    assert train(config(cut, **sections)).finished
    assert all(torch.equal(state(cut)[name], value) for name, value in kept.items())
    assert differences(straight, cut) == []


def test_a_number_of_images_for_nothing_is_refused(tmp_path: Path) -> None:
    run = config(tmp_path, tmp_path, mode="transfer", transfer={"method": "feature", "standardize_images": 8})
    with pytest.raises(ConfigError, match="standardize_images=8 changes nothing with standardize=none"):
        check_effect(run)
