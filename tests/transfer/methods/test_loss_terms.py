"""Losses of a step: several of several teachers, the settings that each reads, types of teachers, methods of others."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from graftvit.launch.fields import leaf_of
from graftvit.launch.plan_text import memory_items
from graftvit.models.conversion import convert
from graftvit.models.errors import ConfigError, TransferError, UnsupportedModelError
from graftvit.models.layer_plan import OPERATORS, register_operator
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine.build import check_settings
from graftvit.transfer.engine.dry_run import dry_run
from graftvit.transfer.engine.modes import mode_of
from graftvit.transfer.engine.train import train
from graftvit.transfer.loss_config import LossConfig
from graftvit.transfer.methods import method_facts, registry
from graftvit.transfer.methods.dual import DualOutput, DualViT
from graftvit.transfer.methods.method_facts import method_names, reads_setting
from graftvit.transfer.methods.registry import describe_transfer, find_method, register_method
from graftvit.transfer.setting import check_effect
from support.models.dense import TINY, cross_entropy, gradient, images, relative_error, run, tiny
from support.models.method_cases import LOSSES, only_read
from support.runs.engine_runs import config, make_teacher, records
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter


def other(name: str = "test_convnext", seed: int = 5, classes: int = 5) -> nn.Module:
    """A small classifier of another architecture, every parameter random."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model(name, num_classes=classes)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.15)
    return model.double().eval()


THREE = [
    {"method": "distill", "weight": 3.0, "layers": "0,2"},
    {"method": "feature", "weight": 0.5, "feature_loss": "smooth_l1", "teacher": "convnext"},
    {"method": "logits", "weight": 2.0, "temperature": 2.0, "teacher": "convnext"},
]


def reference(
    vit: nn.Module, convnext: nn.Module, student: nn.Module, projector: nn.Module
) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of the student and the three losses of `THREE`, in the plainest words."""
    x, features = images(), []
    hook = student.head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    logits, layers = run(student, x)
    hook.remove()
    with torch.no_grad():
        maps = [layer.map for layer in run(vit, x)[1]]
        pooled = convnext.forward_features(x).mean((2, 3))
        pooled = convnext.head.norm(pooled[:, :, None, None]).flatten(1)
        classes = (convnext(x) / 2).softmax(-1)
    return logits, {
        "distill": sum(cross_entropy(maps[i], layers[i].logits) for i in (0, 2)),
        "feature@convnext": F.smooth_l1_loss(projector(features[0]), pooled),
        "logits@convnext": 4 * F.kl_div((logits / 2).log_softmax(-1), classes, reduction="batchmean"),
    }


def three(student: nn.Module) -> DualViT:
    """`THREE` losses of two teachers."""
    torch.manual_seed(0)  # of the projector
    return DualViT({"teacher": tiny(seed=1), "convnext": other()}, student, losses=THREE).double()


def step(dual: DualViT, x: Tensor) -> DualOutput:
    out = dual(x)
    (out.logits.square().mean() + out.transfer_loss).backward()
    return out


def test_three_losses_of_two_teachers_equal_the_reference() -> None:
    student = tiny(seed=2)
    twin, dual = copy.deepcopy(student), three(student)
    projector, copied = copy.deepcopy(dual.projectors["feature@convnext"]["feature"]), copy.deepcopy(dual)
    out = step(dual, images())
    logits, losses = reference(tiny(seed=1), other(), twin, projector)
    total = sum(entry["weight"] * loss for entry, loss in zip(THREE, losses.values(), strict=True))
    (logits.square().mean() + total).backward()
    assert relative_error(out.logits, logits) < 1e-12
    assert relative_error(out.transfer_loss, total) < 1e-10
    assert list(out.terms) == list(losses)
    assert all(relative_error(out.terms[name], losses[name]) < 1e-10 for name in losses)
    assert [name for name in out.parts if "layer" in name] == ["distill.layer00", "distill.layer02"]
    assert relative_error(gradient(student), gradient(twin)) < 1e-9
    learned = dual.projectors["feature@convnext"]["feature"]
    assert relative_error(learned.weight.grad, projector.weight.grad) < 1e-9
    assert torch.equal(copied(images()).transfer_loss, out.transfer_loss)
    assert copied.teachers["convnext"] is not dual.teachers["convnext"]


SAME_TEACHER = [
    ["distill", "attention_output", "block_output", "feature", "logits"],
    ["distill", "distill_q", "distill_k", "distill_v"],
    ["copy", "attention_output", "feature"],
    ["copy_q", "block_output", "logits"],
]


def entry(method: str) -> dict[str, Any]:
    return {"method": method, **only_read(method, weight=1.0)}


@pytest.mark.parametrize("methods", SAME_TEACHER, ids="+".join)
def test_losses_of_one_teacher_sum_and_run_it_once(methods: list[str]) -> None:
    teacher, student = tiny(seed=1), tiny(seed=2)
    alone, logits = [], None
    copies = methods[0] if methods[0].startswith("copy") else None
    for method in methods:
        model = copy.deepcopy(student)
        entries = [{"method": copies}] if copies and method != copies else []
        out = DualViT(teacher, model, losses=[*entries, entry(method)])(images())
        alone.append(out.transfer_loss.detach())
        logits = out.logits.detach()
    calls: list[int] = []
    teacher.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    dual = DualViT(teacher, student, losses=[entry(method) for method in methods])
    out = dual(images())
    assert len(calls) == 1
    assert relative_error(out.transfer_loss, sum(alone)) < 1e-12
    assert logits is not None
    assert relative_error(out.logits, logits) < 1e-12


def test_one_entry_is_the_short_form() -> None:
    teacher, student, x = tiny(seed=1), tiny(seed=2), images()
    outs = []
    for options in ({"method": "distill", "weight": 2.0}, {"losses": [{"method": "distill", "weight": 2.0}]}):
        model = copy.deepcopy(student)
        out = step(DualViT(teacher, model, **options), x)
        outs.append((out.transfer_loss, gradient(model)))
    assert torch.equal(outs[0][0], outs[1][0])
    assert torch.equal(outs[0][1], outs[1][1])


def test_two_teachers_of_one_kind_each_teach_every_layer() -> None:
    teachers = {"teacher": tiny(seed=1), "second": tiny(seed=3)}
    student, x = tiny(seed=2), images()
    expected = [
        DualViT(each, copy.deepcopy(student), "distill", weight=1.0)(x).transfer_loss.detach()
        for each in teachers.values()
    ]
    losses = [{"method": "distill", "weight": 1.0}, {"method": "distill", "weight": 1.0, "teacher": "second"}]
    out = DualViT(teachers, student, losses=losses)(x)
    assert relative_error(out.transfer_loss, sum(expected)) < 1e-12
    assert list(out.terms) == ["distill", "distill@second"]


def test_everything_is_put_back_and_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        student = tiny(seed=2)
        before, kinds = copy.deepcopy(student), [type(module) for module in student.modules()]
        dual = three(student).train()
        student.set_grad_checkpointing(checkpointing)
        step(dual, images())
        gradients.append(gradient(student))
        assert all(name.startswith(("student.", "projectors.")) for name in dual.state_dict())
        released = dual.release().eval()
        assert [type(module) for module in released.modules()] == kinds
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in released.modules())
        assert torch.equal(released(images()), before(images()))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
@pytest.mark.parametrize("method", ["feature", "logits"])
def test_any_classifier_teaches_features_and_classes(name: str, method: str) -> None:
    teacher, student, x = other(name), tiny(seed=2, img_size=(64, 64)), images(size=(64, 64))
    dual = DualViT(teacher, student, method).double()
    with torch.no_grad():
        features = teacher.forward_features(dual.teacher_input(x))
        wanted = teacher.forward_head(features, pre_logits=method == "feature")
    out = step(dual, x)
    assert dual.terms[0].side.model is teacher
    taught = dual.teach(x)
    assert torch.equal(taught["teacher.classes" if method == "logits" else "teacher.pooled"], wanted)
    assert torch.equal(dual(x, taught).transfer_loss, out.transfer_loss)
    assert torch.isfinite(out.transfer_loss)
    assert gradient(student).any()


DISTILL: dict[str, Any] = {"method": "distill"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"losses": [{**DISTILL, "teacher": "nosuch"}]}, "transfer.losses names the teacher 'nosuch'"),
        ({"losses": [{"method": "distil"}]}, "transfer.losses.*distill"),
        ({"losses": [{"method": "copy"}, {"method": "copy_q"}]}, "copies into layer 0 of the student twice"),
        ({"losses": [{"method": "copy"}, DISTILL]}, "no attention of its own for transfer.losses"),
        ({"losses": [DISTILL, {"method": "copy", "layers": "0"}]}, "no attention of its own"),
        ({"weight": 2.0, "losses": [DISTILL]}, r"transfer.weight.*transfer.losses"),
        ({"method": "copy", "weight": 2.0}, "transfer.weight=2.0 changes nothing .*reads heads, layers"),
        ({"method": "feature", "layers": "last:1"}, "transfer.layers='last:1' changes nothing"),
        ({"method": "feature", "standardize_images": 8}, "transfer.standardize_images=8 changes nothing"),
        ({"losses": [DISTILL, {"method": "logits", "rows": 0.5}]}, r"transfer.losses\[1\].rows=0.5 changes"),
    ],
)
def test_losses_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, TransferError), match=message):
        DualViT(tiny(seed=1), tiny(seed=2), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "feature"}, "ConvNeXt of teacher does not take images of 8x8"),
        ({"method": "feature", "share_drop_path": True}, "share_drop_path needs a teacher with the blocks"),
        (DISTILL, "supported are timm's plain vision transformers"),
    ],
)
def test_what_a_network_without_blocks_cannot_teach_is_refused(options: dict[str, Any], message: str) -> None:
    size = (8, 8) if "8x8" in message else (32, 48)
    with pytest.raises((TransferError, UnsupportedModelError), match=message):
        DualViT(other(), tiny(seed=2, img_size=size), **options)


def test_a_distilled_layer_and_a_copied_one_learn_side_by_side() -> None:
    """Copy the first layers, distil the last: the student is saved with its teacher, and the loss is of the last."""
    losses = [{"method": "copy", "layers": "first:2"}, {"method": "distill", "layers": "last:1"}]
    dual = DualViT(tiny(seed=1), tiny(seed=2), losses=losses)
    out = step(dual, images())
    assert dual.needs_teacher
    assert list(out.parts) == ["distill", "distill.layer02"]
    assert not dual.student.blocks[0].attn.qkv.weight.grad[:64].any()


OTHER: dict[str, Any] = {
    "layers": "0", "heads": [0], "loss": "kl", "feature_loss": "smooth_l1", "tokens": "both",
    "standardize": "phi_s", "standardize_images": 1, "logits_loss": "hard",
    "logits_head": "distillation", "weight": 0.5, "reduction": "mean", "temperature": 2.0, "rows": 0.5,
    "interpolate_grid": True,
}  # fmt: skip
"""For each setting of a loss, another value than its default."""
SETTINGS = [name for name in LossConfig.model_fields if name != "method"]
CASES = [(method, name) for method in method_names() for name in SETTINGS]


def test_each_setting_has_another_value_and_each_method_says_what_it_reads() -> None:
    assert set(OTHER) == set(SETTINGS)
    assert all(OTHER[name] != LossConfig.model_fields[name].default for name in SETTINGS)
    assert [find_method(name).name for name in method_names()] == list(method_names())
    assert all(find_method(name).reads is not None for name in method_names())
    with pytest.raises(ConfigError, match="'distil'"):
        find_method("distil")


def result(method: str, options: dict[str, Any]) -> Tensor:
    """Everything that a step gives: logits, loss, and gradient of the student."""
    grid = {"img_size": (16, 48)} if options.get("interpolate_grid") else {}
    student = tiny("deit_distilled" if "logits_head" in options else "vit", seed=2)
    torch.manual_seed(0)  # of sampled rows
    dual = DualViT(tiny(seed=1, **grid), student, method, **options).double()
    dual.standardize([images()])
    out = step(dual, images())
    return torch.cat([out.logits.detach().flatten(), out.transfer_loss.detach()[None], gradient(student)])


@pytest.mark.parametrize(("method", "name"), [case for case in CASES if reads_setting(*case)])
def test_what_a_method_reads_changes_its_result(method: str, name: str) -> None:
    changed = {name: OTHER[name]}
    plain = {"logits_head": "all"} if name == "logits_head" else {}
    if name == "standardize_images":
        plain = {"standardize": "dimension", "tokens": "patches"}
        changed |= plain
    if name == "interpolate_grid":
        with pytest.raises(Exception, match="interpolate_grid=true"):
            DualViT(tiny(seed=1, img_size=(16, 48)), tiny(seed=2), method)
        assert torch.isfinite(result(method, changed)).all()
        return
    assert not torch.equal(result(method, changed), result(method, plain))


def run_with(folder: Path, teacher: Path | None, settings: dict[str, Any], *, listed: bool) -> RunConfig:
    return config(folder, teacher, mode="transfer", transfer={"losses": [settings]} if listed else settings)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(("method", "name"), [case for case in CASES if not reads_setting(*case)])
def test_what_a_method_does_not_read_is_refused(method: str, name: str, listed: bool, tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", tmp_path, {"method": method, name: OTHER[name]}, listed=listed)
    place = r"transfer.losses\[0\]" if listed else "transfer"
    with pytest.raises(
        ConfigError, match=rf"{place}.{name}=.* changes nothing with transfer.method={method}"
    ):
        check_effect(run)


def calm(seed: int) -> Any:
    """A small model in float32 with ordinary weights, whose results bfloat16 gives to two digits."""
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", **TINY).eval()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", LOSSES)
def test_a_half_teacher_gives_nearly_the_same_loss_and_gradient(
    method: str, dtype: torch.dtype, autocast: bool
) -> None:
    teacher, student, x = calm(1), calm(2), images(dtype=torch.float32)
    results = []
    for kind in (torch.float32, dtype):
        model = copy.deepcopy(student)
        dual = DualViT(copy.deepcopy(teacher).to(kind), model, method)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = dual(x).transfer_loss
        loss.backward()
        assert loss.dtype == torch.float32
        assert {p.dtype for p in dual.teacher.parameters()} == {kind}
        results.append((loss.detach(), gradient(model)))
    assert relative_error(results[1][0], results[0][0]) < 0.05
    assert relative_error(results[1][1], results[0][1]) < 0.25


@pytest.mark.parametrize("method", ["distill", "feature"])
def test_a_compiled_teacher_gives_the_same(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    teacher, student, x = tiny(seed=1).float(), tiny(seed=2).float(), images(dtype=torch.float32)
    expected = DualViT(teacher, copy.deepcopy(student), method)(x).transfer_loss
    dual, counter, real = DualViT(teacher, student, method), CompileCounter(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: real(self, backend=counter, **how))
    dual.compile_teachers(["teacher"])
    assert relative_error(dual(x).transfer_loss, expected) < 1e-6
    assert counter.frame_count == 1


def test_a_run_with_a_half_teacher(teacher: Path, tmp_path: Path) -> None:
    sizes, losses = {}, {}
    for kind, name in (("fp32", "float32"), ("bf16", "bfloat16")):
        source = {"source": f"local-dir:{teacher}", "dtype": kind}
        run = config(tmp_path / kind, optim={"max_steps": 2}, mode="transfer", teacher=source)
        (item,) = [item for item in memory_items(dry_run(run, 1, here=True)) if item.name == "teacher"]
        sizes[kind] = item.size
        assert name in item.how
        assert train(run).finished
        losses[kind] = next(r["train_transfer"] for r in records(tmp_path / kind) if "train_transfer" in r)
    assert sizes["bf16"] * 2 == sizes["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01)
    assert losses["bf16"] != losses["fp32"]


COPY, COMPILED = {"method": "copy"}, {"compile": True}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"teacher": {"dtype": "bf16"}, "transfer": COPY}, "teacher.dtype=bf16 does not go with .*copy"),
        ({"teacher": COMPILED, "student": COMPILED}, "teacher.compile=true changes nothing"),
        ({"engine": {"tf32": True}}, "engine.tf32=true needs a GPU"),
        ({"transfer": {**COPY, "temperature": 2.0}}, "temperature=2.0 changes nothing with .*method=copy"),
        (
            {"transfer": {"losses": [{**COPY, "temperature": 2.0}]}},
            r"losses\[0\].temperature=2.0 changes nothing",
        ),
    ],
)
def test_what_a_run_cannot_have_is_refused(
    teacher: Path, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    source = {"source": f"local-dir:{teacher}", **sections.get("teacher", {})}
    run = config(tmp_path / "run", **{"mode": "transfer", **sections, "teacher": source})
    for start in (lambda: dry_run(run, 1, here=True), lambda: train(run)):
        with pytest.raises(ConfigError, match=message):
            start()


PAGE = Path(__file__).parents[3] / "docs" / "extending.md"


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The names of the examples of an operator and a method; what they register is forgotten after the test."""
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(registry, "METHODS", dict(method_facts.METHODS))
    monkeypatch.setattr(method_facts, "METHODS", registry.METHODS)
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        if "Adapter(" not in code:
            exec(code, names)
    yield names
    OPERATORS.pop("mean", None)


def test_the_operator_of_the_page_is_converted_to(examples: dict[str, Any]) -> None:
    student: Any = convert(calm(0), "*: mean(share=0.9)")
    operator = student.blocks[1].attn.operator
    assert operator.mixed == 0.9
    assert student(torch.randn(2, 3, 32, 48)).shape == (2, 5)
    heads = student.blocks[1].attn.project(torch.randn(1, 25, 32))
    torch.testing.assert_close(operator.matrix(heads) @ heads.v, operator(heads))
    with pytest.raises(ConfigError, match="already"):
        register_operator("mean", examples["MeanAttention"])


def test_the_method_of_the_page_trains_or_is_refused(
    examples: dict[str, Any], teacher: Path, tmp_path: Path
) -> None:
    def settings(source: Path, **more: Any) -> RunConfig:
        transfer = {"method": "probabilities", **more}
        return config(tmp_path / f"run-{source.name}", source, transfer=transfer, optim={"max_steps": 1})

    assert dry_run(settings(teacher), 1, here=True).footprint.student
    assert train(settings(teacher)).finished
    assert "train_probabilities" in records(tmp_path / f"run-{teacher.name}")[-1]
    with pytest.raises(ConfigError, match=r"temperature=2.0 changes nothing with .*method=probabilities"):
        check_settings(mode_of(settings(teacher, temperature=2.0)))
    with pytest.raises(TransferError, match=r"method=probabilities needs one set of classes, .* has 7"):
        dry_run(settings(make_teacher(tmp_path / "seven", classes=7)), 1, here=True)
    assert "probabilities" in leaf_of("transfer.method").valid()
    assert describe_transfer({"method": "probabilities"})[0][1].endswith("between the class probabilities")
    with pytest.raises(ConfigError, match="already"):
        register_method(find_method("distill"))
