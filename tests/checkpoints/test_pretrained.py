"""Teachers from weights files: formats, heads, pooling, positions, prefix tokens, and keys that do not fit."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from graftvit.checkpoints.describe import describe_teacher, teacher_facts
from graftvit.checkpoints.fit import Method, find_grid, resample_position
from graftvit.checkpoints.pretrained import load_pretrained, load_weights
from graftvit.checkpoints.provenance import Pretrained
from graftvit.models.conversion import convert
from graftvit.models.errors import CheckpointError
from safetensors.torch import load_file, save_file
from support.models.tiny_students import same_weights
from support.runs.engine_runs import make_teacher, tiny_vit
from torch import Tensor, nn

Make = Callable[..., nn.Module]
Write = Callable[..., str]
TINY: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}
NAME = "vit_tiny_patch16_224"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def load(source: str, **keywords: Any) -> Pretrained:
    arguments = {**TINY, **keywords.pop("model_args", {})}
    return load_pretrained(source, **{"model": NAME, "model_args": arguments, **keywords})


def decoder() -> dict[str, Tensor]:
    keys = ("mask_token", "decoder_pos_embed", "decoder_embed.weight", "decoder_blocks.0.attn.qkv.weight")
    return {key: torch.zeros(1) for key in (*keys, "decoder_norm.bias", "decoder_pred.weight")}


@pytest.mark.parametrize("with_decoder", [False, True])
def test_mae_pretrained(tiny: Make, mae_file: Write, with_decoder: bool) -> None:
    model = tiny()
    teacher = load(mae_file({**model.state_dict(), **(decoder() if with_decoder else {})}))
    assert same_weights(teacher.model, model)
    assert not teacher.has_head
    assert (teacher.mean, teacher.std) == IMAGENET  # not the half and half of timm's default weights
    assert (teacher.architecture, teacher.license, teacher.revision) == (NAME, None, None)
    assert set(teacher.report.unexpected) == (set(decoder()) if with_decoder else set())
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(teacher.model(images), model.eval()(images))


def test_mae_training_file_holds_a_namespace(tiny: Make, mae_file: Write) -> None:
    model = tiny(num_classes=3)
    optimizer = torch.optim.AdamW(model.parameters())
    more = {"epoch": 3, "scaler": {"scale": 1.0}, "args": argparse.Namespace(lr=1)}
    teacher = load(mae_file(model.state_dict(), optimizer=optimizer.state_dict(), **more))
    assert same_weights(teacher.model, model)
    assert "training file" in teacher.report.format


def test_a_plain_state_dict_and_safetensors_take_timms_normalization(tiny: Make, tmp_path: Path) -> None:
    model = tiny(num_classes=3)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save({f"module.{key}": value for key, value in model.state_dict().items()}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        teacher = load(str(tmp_path / name))
        assert same_weights(teacher.model, model)
        assert teacher.mean == (0.5, 0.5, 0.5)


def test_timm_training_file_and_its_average(tiny: Make, tmp_path: Path) -> None:
    model, average = tiny(num_classes=3), tiny(num_classes=3)
    tree = {"arch": NAME, "state_dict": model.state_dict(), "state_dict_ema": average.state_dict()}
    torch.save({**tree, "args": argparse.Namespace(), "epoch": 1}, tmp_path / "last.pth.tar")
    path = str(tmp_path / "last.pth.tar")
    assert same_weights(load(path, model=None).model, model)
    assert same_weights(load(f"{path}#ema", model=None).model, average)
    with pytest.raises(CheckpointError, match="says it is 'vit_tiny_patch16_224'; leave model out"):
        load(path, model="vit_small_patch16_224")


@pytest.mark.parametrize("classes", [0, 7, None])
def test_a_head_can_be_dropped_but_not_invented(tiny: Make, mae_file: Write, classes: int | None) -> None:
    path = mae_file(tiny(num_classes=7).state_dict())
    teacher = load(path, num_classes=classes)
    assert teacher.has_head == (classes != 0)
    assert set(teacher.report.unexpected) == ({"head.weight", "head.bias"} if classes == 0 else set())
    with pytest.raises(CheckpointError, match=r"wrong tensors: head\.weight is \(7, 16\) and not \(9, 16\)"):
        load(path, num_classes=9)
    with pytest.raises(CheckpointError, match=r"missing keys: head\.weight, head\.bias"):
        load(mae_file(tiny().state_dict(), "headless.pth"), num_classes=9)


@pytest.mark.parametrize("method", ["timm", "mae"])
@pytest.mark.parametrize("size", [(24, 24), (16, 32), (8, 32), 8])
def test_only_positions_are_resampled(tiny: Make, mae_file: Write, method: Any, size: Any) -> None:
    model = tiny()
    teacher = load(mae_file(model.state_dict()), img_size=size, position_embedding=method)
    height, width = (size, size) if isinstance(size, int) else size
    expected = resample_position(model.pos_embed.detach(), (4, 4), (height // 4, width // 4), 1, method)
    assert torch.equal(teacher.model.pos_embed, expected)
    assert teacher.report.resampled == {
        "pos_embed": f"from grid 4x4 to {height // 4}x{width // 4} ({method}'s bicubic)"
    }
    others = {key: value for key, value in model.state_dict().items() if key != "pos_embed"}
    assert all(torch.equal(teacher.model.state_dict()[key], value) for key, value in others.items())
    assert teacher.model(torch.randn(1, 3, height, width)).shape == (1, 16)


def test_without_a_size_the_weights_keep_their_own(tiny: Make, mae_file: Write) -> None:
    teacher = load(mae_file(tiny(img_size=24).state_dict()))
    assert teacher.model.patch_embed.img_size == (24, 24)
    assert not teacher.report.resampled


def test_a_grid_that_is_no_square_must_be_told(tiny: Make, mae_file: Write) -> None:
    model = tiny(img_size=(8, 20))
    path = mae_file(model.state_dict())
    with pytest.raises(CheckpointError, match=r"pos_embed has 11 tokens, .* give the images' size"):
        load(path)
    teacher = load(path, model_args={"img_size": (8, 20)})
    assert same_weights(teacher.model, model)
    resized = load(path, model_args={"img_size": (8, 20)}, img_size=(20, 8))
    assert resized.report.resampled == {"pos_embed": "from grid 2x5 to 5x2 (timm's bicubic)"}


@pytest.mark.parametrize("arguments", [
    {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 4}, {"reg_tokens": 4, "no_embed_class": True},
])  # fmt: skip
def test_prefix_tokens_stay_out_of_the_grid(tiny: Make, mae_file: Write, arguments: dict[str, Any]) -> None:
    model = tiny(**arguments)
    path = mae_file(model.state_dict())
    assert same_weights(load(path, model_args=arguments).model, model)
    resized = load(path, model_args=arguments, img_size=32)
    assert resized.report.resampled["pos_embed"].startswith("from grid 4x4 to 8x8")
    prefix = model.pos_embed.shape[1] - 16
    assert torch.equal(resized.model.pos_embed[:, :prefix], model.pos_embed[:, :prefix])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("blocks.1.mlp.fc1.bias"), r"missing keys: blocks\.1\.mlp\.fc1\.bias$"),
        (lambda t: t.update({"blocks.1.extra": torch.zeros(1)}), r"unexpected keys: blocks\.1\.extra$"),
        (lambda t: t.update({"cls_token": torch.zeros(1, 1, 8)}), r"cls_token is \(1, 1, 8\) and not \(1, 1, 16\)$"),
        (lambda t: t["norm.bias"].fill_(float("nan")), r"not finite in norm\.bias"),
        (lambda t: t["pos_embed"][0, 0, 0].fill_(float("inf")), r"not finite in pos_embed"),
        (lambda t: [t.pop(key) for key in list(t) if "attn" in key], r"missing keys: blocks\.0\..* and 4 more"),
        (lambda t: t.update({"pos_embed": t["pos_embed"][..., :8]}), r"embed is \(1, 17, 8\) and not \(1, 17, 16\)"),
        (lambda t: t.update({"patch_embed.proj.weight": torch.zeros(16, 3, 8, 8)}), r"patch_embed\.proj\.weight is"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("use", ["teacher", "init"])
def test_what_has_no_reason_is_refused_by_name(
    tiny: Make, mae_file: Write, change: Callable[[dict[str, Tensor]], object], said: str, use: str
) -> None:
    tensors = {key: value.clone() for key, value in tiny().state_dict().items()}
    change(tensors)
    path = mae_file(tensors)
    with pytest.raises(CheckpointError, match=said) as caught:
        load(path) if use == "teacher" else load_weights(tiny(), path)
    assert path in str(caught.value)


def test_a_head_needs_the_norm_that_it_was_trained_with(tiny: Make, mae_file: Write) -> None:
    path = mae_file(tiny(num_classes=3).state_dict())
    with pytest.raises(CheckpointError, match=r"missing keys: fc_norm\..*unexpected keys: norm\."):
        load(path, model_args={"global_pool": "avg"})
    headless = load(path, model_args={"global_pool": "avg"}, num_classes=0)
    assert set(headless.report.missing) == {"fc_norm.weight", "fc_norm.bias"}


def test_a_student_starts_from_mae_with_a_fresh_head_and_norm(tiny: Make, mae_file: Write) -> None:
    source, student = tiny(), tiny(global_pool="avg", num_classes=5, img_size=24)
    fresh = {key: value.clone() for key, value in student.state_dict().items()}
    report = load_weights(student, mae_file({**source.state_dict(), **decoder()}), position_embedding="mae")
    assert set(report.missing) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert set(report.unexpected) == {"norm.weight", "norm.bias", *decoder()}
    assert "mae's bicubic" in report.resampled["pos_embed"]
    now = student.state_dict()
    assert all(torch.equal(now[key], fresh[key]) for key in report.missing)
    assert all(torch.equal(now[key], source.state_dict()[key]) for key in now if key.startswith("blocks."))
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert "fresh head" in str(report)


@pytest.mark.parametrize(("source_classes", "kept"), [(5, True), (9, False), (0, False)])
def test_a_head_of_another_size_stays_fresh(
    tiny: Make, mae_file: Write, source_classes: int, kept: bool
) -> None:
    source, student = tiny(num_classes=source_classes), tiny(num_classes=5)
    before = student.head.weight.clone()
    report = load_weights(student, mae_file(source.state_dict()))
    assert torch.equal(student.head.weight, source.head.weight if kept else before)
    assert ("head.weight" in report.missing) == (not kept)
    assert ("head.weight" in report.unexpected) == (source_classes == 9)
    headless = tiny()
    assert set(load_weights(headless, mae_file(source.state_dict())).unexpected) <= {
        "head.weight",
        "head.bias",
    }


@pytest.mark.parametrize(
    ("width", "patch", "size", "name"),
    [
        (192, 16, 32, "vit_tiny_patch16_224"), (192, 4, 16, "vit_tiny_patch16_224"),
        (384, 16, 32, "vit_small_patch16_224"), (384, 8, 24, "vit_small_patch8_224"),
    ],
)  # fmt: skip
def test_a_plain_vit_is_known_by_its_shapes(
    mae_file: Write, width: int, patch: int, size: int, name: str
) -> None:
    arguments = {"embed_dim": width, "num_heads": width // 64, "patch_size": patch, "img_size": size}
    model = timm.create_model(NAME, depth=12, **arguments, num_classes=4, global_pool="avg", in_chans=1)
    teacher = load_pretrained(mae_file(model.state_dict()))
    assert teacher.architecture == name
    assert same_weights(teacher.model, model)
    images = torch.randn(1, 1, size, size)
    assert torch.equal(teacher.model(images), model.eval()(images))
    assert f"architecture: {name}, from the shapes" in teacher.report.summary()


@pytest.mark.parametrize(("model", "said"), [
    ("vit_tinny_patch16_224", "did you mean"), ("vit_tiny_patch16_224.nope", "no tag 'nope'.*valid: vit_tiny"),
])  # fmt: skip
def test_an_unknown_architecture_or_tag_is_answered(
    tiny: Make, mae_file: Write, model: str, said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        load(mae_file(tiny().state_dict()), model=model)


def test_a_tag_says_more_than_the_format(tiny: Make, tmp_path: Path) -> None:
    torch.save(tiny().state_dict(), tmp_path / "w.pth")
    arguments = {**TINY, "img_size": 16}
    teacher = load_pretrained(str(tmp_path / "w.pth"), model="vit_base_patch16_224.mae", model_args=arguments)
    assert (teacher.mean, teacher.std) == IMAGENET
    assert teacher.license == "cc-by-nc-4.0"
    assert teacher.architecture == "vit_base_patch16_224"


def test_arguments_that_timm_refuses_are_named(tiny: Make, mae_file: Write) -> None:
    with pytest.raises(CheckpointError, match=r"timm cannot build 'vit_tiny_patch16_224' with .*no_such"):
        load(mae_file(tiny().state_dict()), model_args={"no_such": 3})
    with pytest.raises(CheckpointError, match="timm cannot build"):
        load(mae_file(tiny().state_dict()), model_args={"num_heads": 3})


def test_loading_leaves_the_random_state_alone(tiny: Make, mae_file: Write) -> None:
    path = mae_file(tiny().state_dict())
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load(path)
    assert torch.equal(torch.rand(4), expected)


def test_half_precision_weights_load_into_a_float32_model(tiny: Make, mae_file: Write) -> None:
    model = tiny()
    teacher = load(mae_file({key: value.bfloat16() for key, value in model.state_dict().items()}))
    assert all(parameter.dtype == torch.float32 for parameter in teacher.model.parameters())
    assert torch.equal(teacher.model.norm.weight, model.norm.weight.bfloat16().float())


def test_facts_of_a_teacher(tiny: Make, mae_file: Write) -> None:
    teacher = load(mae_file({**tiny(num_classes=3).state_dict(), **decoder()}), img_size=(8, 16))
    facts = teacher_facts(teacher)
    assert facts["architecture"] == NAME
    assert (facts["depth"], facts["prefix tokens"], facts["patch grid"]) == ("2 blocks", "cls", "2 x 4")
    assert facts["attention"] == "2 heads of width 8, model width 16"
    assert facts["classes"] == "3"
    assert facts["images"].startswith(
        "3x8x16, mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225; evaluated at 0.9"
    )
    count = sum(parameter.numel() for parameter in teacher.model.parameters())
    assert facts["parameters"].startswith(f"{count:,} ")
    text = describe_teacher(teacher)
    for part in (
        "license", "unknown", "decoder of masked autoencoding", "from grid 4x4 to 2x4", "mask_token",
    ):  # fmt: skip
        assert part in text


def test_beit_tables_are_resampled_timms_way_only(tmp_path: Path) -> None:
    model = timm.create_model("beit_base_patch16_224", num_classes=0, img_size=16, **TINY)
    torch.save(model.state_dict(), tmp_path / "beit.pth")
    with pytest.raises(CheckpointError, match="position_embedding=timm does it"):
        load(str(tmp_path / "beit.pth"), model="beit_base_patch16_224", img_size=24, position_embedding="mae")


# Weights fit a model that keeps the positions of its prefix tokens in another way, at any size.


REGISTERS = {"reg_tokens": 4, "no_embed_class": True}


def saved(model: nn.Module, folder: Path) -> str:
    torch.save({"model": model.state_dict()}, folder / "source.pth")
    return str(folder / "source.pth")


def tokens(model: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        features: Tensor = model.eval().forward_features(images)
        return features


@pytest.mark.parametrize("source", [{}, {"no_embed_class": True}])
@pytest.mark.parametrize("target", [{}, {"no_embed_class": True}])
def test_a_position_in_a_token(
    tiny: Make, tmp_path: Path, source: dict[str, Any], target: dict[str, Any]
) -> None:
    model = tiny(**source)
    teacher = load(saved(model, tmp_path), model_args=target)
    images = torch.randn(2, 3, 16, 16)
    assert torch.allclose(tokens(teacher.model, images), tokens(model, images), atol=1e-5)
    folded = "no_embed_class" in target and "no_embed_class" not in source
    assert ("cls_token: added to the tokens" in teacher.report.summary()) == folded
    resized = load(saved(model, tmp_path), model_args=target, img_size=(24, 32))
    assert resized.report.resampled == {"pos_embed": "from grid 4x4 to 6x8 (timm's bicubic)"}
    native = load(saved(model, tmp_path), model_args=source, img_size=(24, 32)).model
    images = torch.randn(1, 3, 24, 32)
    assert torch.allclose(tokens(resized.model, images), tokens(native, images), atol=1e-5)


@pytest.mark.parametrize("method", ["timm", "mae"])
@pytest.mark.parametrize("arguments", [REGISTERS, {"reg_tokens": 4}, {"reg_tokens": 4, "img_size": 24}])
def test_a_student_with_registers(tiny: Make, tmp_path: Path, method: Any, arguments: dict[str, Any]) -> None:
    model, student = tiny(), tiny(**arguments)
    fresh = student.reg_token.detach().clone()
    report = load_weights(student, saved(model, tmp_path), position_embedding=method)
    assert set(report.missing) == {"reg_token"}
    assert torch.equal(student.reg_token, fresh)
    rows = student.pos_embed.shape[1] - student.patch_embed.num_patches
    assert torch.equal(student.pos_embed[:, 1:rows], torch.zeros(1, max(rows - 1, 0), 16))
    first = student.cls_token + (student.pos_embed[:, :1] if rows else 0)
    assert torch.equal(first, model.cls_token + model.pos_embed[:, :1])
    if "img_size" not in arguments:
        assert torch.equal(student.pos_embed[:, rows:], model.pos_embed[:, 1:])


def test_without_its_registers_the_student_is_the_source(tiny: Make, tmp_path: Path) -> None:
    """Blocks that see no register give the source's tokens: all but the tokens is taken over."""
    model, student = tiny(), tiny(**REGISTERS)
    load_weights(student, saved(model, tmp_path))
    student.reg_token = None
    student.num_prefix_tokens = 1
    images = torch.randn(2, 3, 16, 16)
    assert torch.allclose(tokens(student, images), tokens(model, images), atol=1e-5)


def test_a_student_without_a_class_token_leaves_it(tiny: Make, tmp_path: Path) -> None:
    model, student = tiny(), tiny(class_token=False, global_pool="avg")
    report = load_weights(student, saved(model, tmp_path))
    assert report.unexpected["cls_token"] == "the model has no such token"
    assert torch.equal(student.pos_embed, model.pos_embed[:, 1:])


def test_a_distilled_student_starts_from_plain_weights(tiny: Make, tmp_path: Path) -> None:
    student: Any = timm.create_model("deit_tiny_distilled_patch16_224", img_size=16, num_classes=0, **TINY)
    model = tiny()
    report = load_weights(student, saved(model, tmp_path))
    assert set(report.missing) == {"dist_token"}
    assert torch.equal(student.pos_embed[:, 1], torch.zeros(1, 16))
    assert torch.equal(student.pos_embed[:, 2:], model.pos_embed[:, 1:])


def test_a_teacher_needs_all_its_tokens(tiny: Make, tmp_path: Path) -> None:
    for model, arguments, said in (
        (tiny(), REGISTERS, "missing keys: reg_token"),
        (tiny(**REGISTERS), {}, "unexpected keys: reg_token"),
        (tiny(), {"class_token": False, "global_pool": "avg"}, "unexpected keys: cls_token"),
    ):
        with pytest.raises(CheckpointError, match=said):
            load(saved(model, tmp_path), model_args=arguments)


def test_a_token_of_another_width_is_named_and_not_added(tiny: Make, tmp_path: Path) -> None:
    tensors = {**tiny().state_dict(), "cls_token": torch.zeros(1, 1, 8)}
    torch.save(tensors, tmp_path / "source.pth")
    with pytest.raises(CheckpointError, match=r"cls_token is \(1, 1, 8\) and its position \(1, 1, 16\)"):
        load(str(tmp_path / "source.pth"), model_args={"no_embed_class": True})


def test_operators_stay_fresh_where_the_weights_are_of_softmax(tmp_path: Path) -> None:
    student = convert(tiny_vit(), "0: focused")
    before = {key: value.clone() for key, value in student.named_parameters() if ".operator." in key}
    report = load_weights(student, f"local-dir:{make_teacher(tmp_path)}")
    assert set(report.missing) == set(before)
    assert before
    assert all("softmax attention" in reason for reason in report.missing.values())
    after = student.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_half_an_operator_is_still_refused(tmp_path: Path) -> None:
    student = convert(tiny_vit(), "*: focused")
    tensors = dict(load_file(make_teacher(tmp_path) / "model.safetensors"))
    tensors |= {
        key: value for key, value in student.state_dict().items() if "blocks.0.attn.operator.v" in key
    }
    save_file(tensors, tmp_path / "half.safetensors")
    with pytest.raises(CheckpointError, match=r"missing keys: blocks\.0\.attn\.operator\.feature"):
        load_weights(student, str(tmp_path / "half.safetensors"))


# Resampled positions against the formulas: cubic convolution by hand, in float64.


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def matrix(old: int, new: int, antialias: bool) -> np.ndarray:
    """Rows of weights, half-pixel centers. Antialiased: a = -0.5 and the kernel stretched where the grid shrinks,
    cut at the border and normalized. Plain: a = -0.75, and the border repeats."""
    scale = old / new
    weights = np.zeros((new, old))
    for row in range(new):
        center = (row + 0.5) * scale - 0.5
        if antialias:
            support = max(scale, 1.0)
            values = cubic((np.arange(old) - center) / support, -0.5)
            weights[row] = values / values.sum()
        else:
            first = int(np.floor(center)) - 1
            for index in range(first, first + 4):
                weights[row, min(max(index, 0), old - 1)] += cubic(np.array(index - center), -0.75)
    return weights


def reference(
    position: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int, method: Method
) -> np.ndarray:
    values = position.double().numpy()[0]
    grid = values[prefix:].reshape(*old, -1)
    antialias = method == "timm"
    rows, columns = matrix(old[0], new[0], antialias), matrix(old[1], new[1], antialias)
    resized = np.einsum("ih,jw,hwd->ijd", rows, columns, grid)
    return np.concatenate([values[:prefix], resized.reshape(new[0] * new[1], -1)])[None]


@pytest.mark.parametrize("method", ["timm", "mae"])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize(
    ("old", "new"),
    [((14, 14), (24, 24)), ((14, 14), (7, 7)), ((4, 6), (6, 4)), ((3, 5), (8, 2)), ((1, 4), (3, 3))],
)
def test_both_ways_follow_their_formula(
    method: Method, prefix: int, old: tuple[int, int], new: tuple[int, int]
) -> None:
    position = torch.randn(1, prefix + old[0] * old[1], 3)
    resized = resample_position(position, old, new, prefix, method)
    np.testing.assert_allclose(resized.numpy(), reference(position, old, new, prefix, method), atol=2e-5)


@pytest.mark.parametrize("method", ["timm", "mae"])
def test_the_same_grid_is_left_alone_and_the_dtype_stays(method: Method) -> None:
    position = torch.randn(1, 13, 4, dtype=torch.bfloat16)
    assert resample_position(position, (3, 4), (3, 4), 1, method) is position
    assert resample_position(position, (3, 4), (4, 3), 1, method).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("patches", "declared", "grid"),
    [
        (196, None, (14, 14)), (24, (4, 6), (4, 6)), (36, (4, 9), (4, 9)), (36, (5, 9), (6, 6)),
        (24, None, None), (24, (5, 5), None), (0, None, None), (-1, None, None), (1, None, (1, 1)),
    ],
)  # fmt: skip
def test_a_grid_is_declared_or_square(
    patches: int, declared: tuple[int, int] | None, grid: tuple[int, int] | None
) -> None:
    assert find_grid(patches, declared) == grid


def test_an_architecture_that_is_no_text_is_refused_in_a_folder_of_another_program(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "teacher")
    described = json.loads((folder / "config.json").read_text())
    del described["graftvit"]
    (folder / "config.json").write_text(json.dumps({**described, "architecture": 3}))
    with pytest.raises(CheckpointError, match="architecture=3, which is no name"):
        load_pretrained(str(folder))
