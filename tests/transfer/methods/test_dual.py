"""What the wrapper promises beside the right numbers: cheap, clean, compilable, safe in low precision."""

from __future__ import annotations

import copy
import shutil
from itertools import product
from pathlib import Path

import pytest
import timm
import torch
from graftvit.models.attention.base import Heads
from graftvit.models.copying.teacher_view import Normalization
from graftvit.models.errors import ConfigError, TransferError, UnsupportedModelError
from graftvit.transfer.loss_config import TransferConfig
from graftvit.transfer.methods.dual import DualViT
from graftvit.transfer.methods.loss_terms import OF_RUNS
from graftvit.transfer.methods.map_loss import sample_rows
from support.models.dense import FAMILIES, cross_entropy, gradient, images, relative_error, run, tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

METHODS = [
    "copy", "copy_q", "copy_k", "copy_v", "distill", "distill_q", "distill_k", "distill_v",
    "attention_output", "block_output", "feature", "logits",
]  # fmt: skip
TOKENS = 25  # of the tiny models: one class token and a 4 x 6 grid


class Shapes(TorchDispatchMode):
    """Every tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor) and 0 not in value.stride():
                self.seen.append(tuple(value.shape))
        return out

    def maps(self) -> list[tuple[int, ...]]:
        return [shape for shape in self.seen if len(shape) >= 2 and shape[-1] == shape[-2] == TOKENS]


def step(dual: DualViT, x: Tensor) -> None:
    out = dual(x)
    (out.logits.square().mean() + out.transfer_loss).backward()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"loss": "kl", "temperature": 2.0}, {"rows": 0.25}])
def test_no_map_is_formed(method: str, options: dict[str, object]) -> None:
    dual = DualViT(tiny(seed=1), tiny(seed=2), method, **options)
    with Shapes() as shapes:
        step(dual, images())
    assert shapes.seen
    assert not shapes.maps()


def test_the_check_for_maps_can_fail() -> None:
    with Shapes() as shapes:
        run(tiny(), images())
    assert shapes.maps()


@pytest.mark.parametrize(
    ("family", "method"),
    [*(("vit", method) for method in METHODS), *product(FAMILIES, ("copy", "distill", "feature"))],
)
@torch.no_grad()  # a bias that learns makes torch choose another kernel
def test_student_stays_an_ordinary_timm_model(family: str, method: str) -> None:
    plain, x = tiny(family, seed=2), images()
    student = copy.deepcopy(plain)
    dual = DualViT(tiny(family, seed=1), student, method)
    assert list(student.state_dict()) == list(plain.state_dict())
    before = plain(x)
    assert torch.equal(student(x), before)
    dual(x)
    assert torch.equal(student(x), before)
    released = dual.release(bare=dual.needs_teacher)
    assert released is student
    assert [type(m) for m in released.modules()] == [type(m) for m in plain.modules()]
    assert all(parameter.requires_grad for parameter in released.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in released.modules())
    assert torch.equal(released(x), before)


def test_student_saves_alone_and_loads_in_plain_timm(tmp_path: Path) -> None:
    student = tiny(seed=2)
    dual = DualViT(tiny(seed=1), student)
    torch.save(dual.student.state_dict(), tmp_path / "student.pth")
    fresh = tiny(seed=3)
    fresh.load_state_dict(torch.load(tmp_path / "student.pth", weights_only=True))
    assert torch.equal(fresh(images()), student(images()))


def test_teacher_is_frozen_unregistered_and_stays_in_eval() -> None:
    teacher = tiny(seed=1, drop_path_rate=0.5, proj_drop_rate=0.5).train()
    before = copy.deepcopy(teacher.state_dict())
    dual = DualViT(teacher, tiny(seed=2)).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(key.startswith("student.") for key in dual.state_dict())
    assert {id(p) for p in dual.parameters()} == {id(p) for p in dual.student.parameters()}
    losses = [float(dual(images()).transfer_loss.detach()) for _ in range(2)]
    assert losses[0] == losses[1]
    step(dual, images())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_teacher_follows_the_student_to_a_dtype() -> None:
    dual = DualViT(tiny(seed=1), tiny(seed=2)).float()
    assert next(dual.teacher.parameters()).dtype == torch.float32
    assert dual(images(dtype=torch.float32)).transfer_loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("method", "parts"),
    [("distill", 2), ("copy", 2), ("distill_v", 3), ("attention_output", 3), ("block_output", None)],
)
def test_teacher_stops_after_the_last_layer_that_is_needed(method: str, parts: int | None) -> None:
    teacher = tiny(seed=1, depth=6)
    dual = DualViT(teacher, tiny(seed=2, depth=6), method, layers="first:3")
    ran: list[str] = []
    for name, module in teacher.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    dual(images())
    assert not any(name.startswith(("blocks.3", "blocks.4", "blocks.5")) for name in ran)
    assert not {"norm", "fc_norm", "head"} & set(ran)
    assert ("blocks.2.mlp" in ran) == (method == "block_output")
    assert "blocks.1.mlp" in ran


def test_copied_layers_skip_the_projections_that_they_do_not_use() -> None:
    teacher, student = tiny(seed=1), tiny(seed=2)
    widths = {"copy": 32, "copy_q": 64, "copy_v": 64, "distill": 96}
    for method, width in widths.items():
        dual = DualViT(teacher, copy.deepcopy(student), method)
        with Shapes() as shapes:
            dual.student.blocks[0].attn.operator.tape.begin()
            dual.student.blocks[0].attn._projections(
                torch.randn(1, TOKENS, 32).double(),
                [p for p in "qkv" if p in dual.student.blocks[0].attn.operator.needs],
            )
        assert (TOKENS, width) in shapes.seen or (1, TOKENS, width) in shapes.seen


def test_unused_parameters_of_a_copied_layer_are_frozen_for_ddp() -> None:
    teacher, student = tiny("eva02", seed=1), tiny("eva02", seed=2)
    dual = DualViT(teacher, student, "copy")
    step(dual, images())
    missing = [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert not student.blocks[0].attn.q_proj.weight.requires_grad


@pytest.mark.parametrize(
    ("rows", "family"),
    [*product([0.25], ["vit", "vit_no_prefix", "dinov2_registers", "beit"]), (0.5, "dinov2_registers")],
)
@torch.no_grad()
def test_sampled_rows_are_unbiased(rows: float, family: str) -> None:
    teacher, student, x = tiny(family, seed=1, depth=2), tiny(family, seed=2, depth=2), images()
    full = float(DualViT(teacher, copy.deepcopy(student), weight=1.0)(x).transfer_loss)
    dual = DualViT(teacher, student, rows=rows, weight=1.0)
    torch.manual_seed(0)
    samples = torch.tensor([float(dual(x).transfer_loss) for _ in range(100)], dtype=torch.float64)
    assert samples.std() > 0
    assert abs(float(samples.mean()) - full) < 5 * float(samples.std()) / 100**0.5


def test_sampled_rows_always_hold_the_prefix() -> None:
    q = torch.randn(1, 1, 25, 4)
    rows, weights = sample_rows(Heads(q, q, q, None, 1.0, 0.0), 0.25, num_prefix=5)
    assert rows[:5].tolist() == list(range(5))
    assert len(set(rows.tolist())) == len(rows) == 10
    assert float(weights.sum()) == pytest.approx(1.0)


def test_reduction_mean_is_sum_over_the_number_of_layers() -> None:
    teacher, student, x = tiny(seed=1), tiny(seed=2), images()
    total = DualViT(teacher, copy.deepcopy(student))(x).transfer_loss
    mean = DualViT(teacher, student, reduction="mean", weight=9.0)(x).transfer_loss
    assert float(total) == pytest.approx(float(mean))


def test_shared_drop_path_masks_reach_the_teacher() -> None:
    teacher, student = tiny(seed=1), tiny(seed=2, drop_path_rate=0.5)
    dual = DualViT(teacher, student, share_drop_path=True, layers="last:1").train()
    assert relative_error(dual.eval()(images()).logits, student(images())) < 1e-14
    dual.train()
    torch.manual_seed(0)
    out = dual(images(batch=8))
    torch.manual_seed(0)
    masks = [
        torch.empty(8, 1, 1, dtype=torch.float64).bernoulli_(1 - p).div_(1 - p)
        for p in (0.25, 0.25, 0.5, 0.5)
    ]
    (_, t), (_, s) = masked_run(teacher, masks), masked_run(student.eval(), masks)
    assert float(out.transfer_loss.detach()) == pytest.approx(3 * float(cross_entropy(t, s)), rel=1e-9)
    plain = DualViT(teacher, copy.deepcopy(student), layers="last:1").train()
    assert float(plain(images(batch=8)).transfer_loss.detach()) != pytest.approx(
        float(out.transfer_loss.detach())
    )
    released = dual.release()
    assert type(released.blocks[1].drop_path1).__name__ == "DropPath"


def masked_run(model: nn.Module, masks: list[Tensor]) -> tuple[None, Tensor]:
    """Map (for a teacher) and logits of the last layer with given stochastic-depth masks."""
    handles, remaining = [], iter(masks)
    for block in model.blocks[1:]:
        for name in ("drop_path1", "drop_path2"):
            mask = next(remaining)
            handles.append(getattr(block, name).register_forward_hook(lambda _, __, out, m=mask: out * m))
    _, layers = run(model, images(batch=8))
    for handle in handles:
        handle.remove()
    last = layers[-1]
    return None, last.map if not next(model.parameters()).requires_grad else last.logits


def test_normalization_is_changed_for_the_teacher() -> None:
    teacher, student = tiny(seed=1), tiny(seed=2)
    norms = Normalization((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)), Normalization((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    dual = DualViT(teacher, student, "logits", teacher_normalization=norms[0], student_normalization=norms[1])
    pixels = images().sigmoid()
    shown: list[Tensor] = []
    teacher.patch_embed.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0]))
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in norms[1])
    dual((pixels - mean) / std)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in norms[0])
    assert torch.allclose(shown[0], (pixels - mean) / std, atol=1e-6)


@pytest.mark.parametrize("method", ["copy", "distill", "attention_output", "block_output"])
def test_gradient_checkpointing_changes_nothing(method: str) -> None:
    teacher, student, x = tiny(seed=1), tiny(seed=2), images()
    grads = []
    for enabled in (False, True):
        model = copy.deepcopy(student)
        dual = DualViT(teacher, model, method).train()
        model.set_grad_checkpointing(enabled)
        step(dual, x)
        grads.append(gradient(model))
        assert torch.equal(model.eval()(x), student(x)) or enabled
    assert torch.equal(*grads)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "family"), [*((each, "vit") for each in METHODS), ("distill", "eva02")])
def test_compiles_without_a_graph_break(method: str, family: str) -> None:
    torch.compiler.reset()
    dual = DualViT(tiny(family, 1, depth=2), tiny(family, 2, depth=2), method).float().train()
    x = images(dtype=torch.float32)
    step(dual, x)
    expected, eager = gradient(dual.student), dual(x)
    dual.student.zero_grad()
    compiled = torch.compile(dual, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    (out.logits.square().mean() + out.transfer_loss).backward()
    assert relative_error(out.transfer_loss, eager.transfer_loss) < 1e-5 or not eager.parts
    assert relative_error(gradient(dual.student), expected) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("method", ["distill", "copy"])
def test_compiles_with_inductor(method: str) -> None:
    torch.compiler.reset()
    dual = DualViT(tiny(seed=1, depth=1), tiny(seed=2, depth=1), method).float().train()
    x = images(dtype=torch.float32)
    eager, out = dual(x), torch.compile(dual, fullgraph=True)(x)
    assert relative_error(out.logits, eager.logits) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_autocast_is_finite_and_close(method: str, dtype: torch.dtype) -> None:
    teacher, student = tiny(seed=1).float(), tiny(seed=2).float()
    for model in (teacher, student):
        for block in model.blocks:
            block.attn.qkv.weight.data[:64] *= 4  # large queries and keys
    x = images(dtype=torch.float32)
    step(dual := DualViT(teacher, student, method), x)
    expected, exact = gradient(student), float(dual(x).transfer_loss.detach())
    student.zero_grad()
    with torch.autocast("cpu", dtype):
        out = dual(x)
        loss = out.logits.float().square().mean() + out.transfer_loss
    loss.backward()
    assert out.transfer_loss.dtype == torch.float32
    assert float(out.transfer_loss.detach()) == pytest.approx(exact, rel=0.02)
    assert relative_error(gradient(student), expected) < 0.1


def test_moving_average_is_evaluated_through_the_same_teacher() -> None:
    teacher, student, x = tiny(seed=1), tiny(seed=2), images()
    dual = DualViT(teacher, student, "copy")
    average = copy.deepcopy(student)
    for parameter in average.parameters():
        parameter.data.mul_(0.9)
    twin = dual.with_student(average)
    assert torch.equal(twin.predict(x), DualViT(teacher, copy.deepcopy(average), "copy").predict(x))
    assert torch.equal(dual.predict(x), dual(x).logits)
    assert dual.needs_teacher


def test_what_is_not_supported_is_refused_with_what_is() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"resnet|ResNet.*supported are timm's plain vision transformers"
    ):
        DualViT(timm.create_model("resnet18"), tiny())
    parallel = timm.create_model(
        "vit_tiny_patch16_224", depth=1, block_fn=timm.models.vision_transformer.ParallelThingsBlock
    )
    with pytest.raises(UnsupportedModelError, match="block 0"):
        DualViT(parallel, tiny())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "distil"}, "transfer.method is 'distil', but: .*'distill'"),
        ({"temprature": 2}, "unknown setting 'temprature'; did you mean 'temperature'"),
        ({"rows": 2.0}, "transfer.rows is 2.0, but: .*less than or equal to 1"),
    ],
)
def test_a_wrong_keyword_ends_in_one_sentence(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DualViT(tiny(seed=1), tiny(seed=2), **options)


def test_attention_dropout_is_refused() -> None:
    with pytest.raises(TransferError, match="attn_drop_rate"):
        DualViT(tiny(seed=1), tiny(seed=2, attn_drop_rate=0.1))


def test_every_setting_is_a_keyword() -> None:
    fields = TransferConfig.model_fields.items()
    settings = {name: field.default for name, field in fields if name not in OF_RUNS}
    assert DualViT(tiny(seed=1), tiny(seed=2), **settings).config == TransferConfig()
    with pytest.raises(ConfigError, match="unknown setting 'cache'"):
        DualViT(tiny(seed=1), tiny(seed=2), "logits", cache="targets")


def test_description_names_pairs_and_heads() -> None:
    text = DualViT(tiny(seed=1, depth=6), tiny(seed=2), heads=[1, 2]).describe()
    assert "1>0, 3>1, 5>2" in text
    assert "1>1, 2>2" in text


def test_the_images_of_a_teacher_are_made_on_the_device_of_the_student() -> None:
    other = Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    dual = DualViT(tiny(seed=1), tiny(seed=2), "logits", teacher_normalization=other).to("meta")
    assert dual.teacher_input.scale.is_meta
    assert dual(images().to("meta")).transfer_loss.is_meta
