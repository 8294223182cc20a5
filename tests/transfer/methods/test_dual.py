"""What the wrapper promises beside the right numbers: cheap, clean, copied whole, compiled, in any order of passes."""

from __future__ import annotations

import copy
import gc
import pickle
import shutil
import weakref
from itertools import product

import pytest
import timm
import torch
from graftvit.models.attention.base import Heads
from graftvit.models.copying.teacher_view import Normalization
from graftvit.models.errors import ConfigError, TransferError, UnsupportedModelError
from graftvit.transfer.loss_config import TransferConfig
from graftvit.transfer.methods.dual import DualOutput, DualViT
from graftvit.transfer.methods.loss_terms import OF_DUAL
from graftvit.transfer.methods.map_loss import sample_rows
from support.models.copied_models import pair, whole
from support.models.dense import FAMILIES, Layer, cross_entropy, gradient, images, relative_error, run, tiny
from support.models.method_cases import METHODS, only_read
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

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


def total(out: DualOutput) -> Tensor:
    return out.logits.square().mean() + out.transfer_loss


def step(dual: DualViT, x: Tensor) -> None:
    total(dual(x)).backward()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"loss": "kl", "temperature": 2.0}, {"rows": 0.25}])
def test_no_map_is_formed(method: str, options: dict[str, object]) -> None:
    dual = DualViT(tiny(seed=1), tiny(seed=2), method, **only_read(method, **options))
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


def test_teacher_is_frozen_unregistered_and_stays_in_eval() -> None:
    teacher = tiny(seed=1, drop_path_rate=0.5, proj_drop_rate=0.5).train()
    before = copy.deepcopy(teacher.state_dict())
    dual = DualViT(teacher, tiny(seed=2)).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(key.startswith("student.") for key in dual.state_dict())
    assert {id(p) for p in dual.parameters()} == {id(p) for p in dual.student.parameters()}
    losses = [dual(images()).transfer_loss]
    teacher.train()  # a step puts it back
    assert torch.equal(dual(images()).transfer_loss, losses[0])
    step(dual, images())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


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
    mean = DualViT(teacher, copy.deepcopy(student), reduction="mean", weight=2.0)(x).transfer_loss
    assert float(mean) == pytest.approx(full), "the mean over two layers"
    dual = DualViT(teacher, student, rows=rows, weight=1.0)
    torch.manual_seed(0)
    samples = torch.tensor([float(dual(x).transfer_loss) for _ in range(100)], dtype=torch.float64)
    assert samples.std() > 0
    assert abs(float(samples.mean()) - full) < 5 * float(samples.std()) / 100**0.5
    q = torch.randn(1, 1, 25, 4)
    chosen, weights = sample_rows(Heads(q, q, q, None, 1.0, 0.0), 0.25, num_prefix=5)
    assert chosen[:5].tolist() == list(range(5)), "the prefix is always there"
    assert len(set(chosen.tolist())) == len(chosen) == 10
    assert float(weights.sum()) == pytest.approx(1.0)


def test_shared_drop_path_masks_reach_the_teacher() -> None:
    teacher, student, x = tiny(seed=1), tiny(seed=2, drop_path_rate=0.5), images(batch=8)
    dual = DualViT(teacher, student, share_drop_path=True, layers="last:1").train()
    assert relative_error(dual.eval()(images()).logits, student(images())) < 1e-14
    dual.train()
    torch.manual_seed(0)
    loss = float(dual(x).transfer_loss.detach())
    torch.manual_seed(0)
    ones = torch.empty(8, 1, 1, dtype=torch.float64)
    masks = [ones.clone().bernoulli_(1 - p).div_(1 - p) for p in (0.25, 0.25, 0.5, 0.5)]
    t, s = masked_layer(teacher, masks, x), masked_layer(student.eval(), masks, x)
    assert loss == pytest.approx(3 * float(cross_entropy(t.map, s.logits)), rel=1e-9)
    plain = DualViT(teacher, copy.deepcopy(student), layers="last:1").train()
    assert float(plain(x).transfer_loss.detach()) != pytest.approx(loss)
    assert type(dual.release().blocks[1].drop_path1).__name__ == "DropPath"


def masked_layer(model: nn.Module, masks: list[Tensor], x: Tensor) -> Layer:
    """Run a model with given stochastic-depth masks and return its last layer."""
    paths = [getattr(block, name) for block in model.blocks[1:] for name in ("drop_path1", "drop_path2")]
    handles = [
        path.register_forward_hook(lambda _, __, out, m=mask: out * m)
        for path, mask in zip(paths, masks, strict=True)
    ]
    layers = run(model, x)[1]
    for handle in handles:
        handle.remove()
    return layers[-1]


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


@pytest.mark.slow
@pytest.mark.parametrize(("method", "family"), [*((each, "vit") for each in METHODS), ("distill", "eva02")])
def test_compiles_without_a_graph_break(method: str, family: str) -> None:
    torch.compiler.reset()
    depth = 1 if family == "vit" else 2
    dual = DualViT(tiny(family, 1, depth=depth), tiny(family, 2, depth=depth), method).float().train()
    x = images(dtype=torch.float32)
    step(dual, x)
    expected, eager = gradient(dual.student), dual(x)
    dual.student.zero_grad()
    compiled = torch.compile(dual, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    total(out).backward()
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
        UnsupportedModelError, match=r"ResNet.*supported are timm's plain vision transformers"
    ):
        DualViT(timm.create_model("resnet18"), tiny())
    block = timm.models.vision_transformer.ParallelThingsBlock
    with pytest.raises(UnsupportedModelError, match="block 0"):
        DualViT(timm.create_model("vit_tiny_patch16_224", depth=1, block_fn=block), tiny())
    with pytest.raises(TransferError, match="attn_drop_rate"):
        DualViT(tiny(seed=1), tiny(seed=2, attn_drop_rate=0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "distil"}, "transfer.method is 'distil', did you mean 'distill'"),
        ({"temprature": 2}, "takes no 'temprature'; did you mean 'temperature'"),
        ({"rows": 2.0}, "transfer.rows is 2.0, but must be .*at most 1"),
    ],
)
def test_a_wrong_keyword_ends_in_one_sentence(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DualViT(tiny(seed=1), tiny(seed=2), **options)


def test_every_setting_is_a_keyword() -> None:
    fields = TransferConfig.model_fields.items()
    settings = {name: field.default for name, field in fields if name in OF_DUAL}
    assert DualViT(tiny(seed=1), tiny(seed=2), **settings).config == TransferConfig()
    with pytest.raises(ConfigError, match="takes no 'cache'"):
        DualViT(tiny(seed=1), tiny(seed=2), "logits", cache="targets")


def test_the_teacher_and_its_images_follow_the_student_to_a_dtype_and_a_device() -> None:
    other = Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    dual = DualViT(tiny(seed=1), tiny(seed=2), "logits", teacher_normalization=other).float()
    assert next(dual.teacher.parameters()).dtype == torch.float32
    assert dual(images(dtype=torch.float32)).transfer_loss.dtype == torch.float32
    dual = dual.double().to("meta")
    assert dual.teacher_input.scale.is_meta
    assert dual(images().to("meta")).transfer_loss.is_meta
    text = DualViT(tiny(seed=1, depth=6), tiny(seed=2), heads=[1, 2]).describe()
    assert "1>0, 3>1, 5>2" in text
    assert "1>1, 2>2" in text


def taught_step(dual: DualViT) -> tuple[torch.Tensor, torch.Tensor]:
    """The transfer loss and the gradients of one step."""
    dual.zero_grad()
    out = dual(images())
    (out.logits.square().mean() + out.transfer_loss).backward()
    return out.transfer_loss.detach(), gradient(dual)


@pytest.mark.parametrize(
    ("method", "ran"), [*((method, True) for method in METHODS), ("copy", False), ("distill", False)]
)
def test_a_copy_gives_the_same_loss_and_gradients(method: str, ran: bool) -> None:
    width = {"embed_dim": 48} if method in ("block_output", "feature") else {}  # with projectors
    dual = DualViT(tiny(seed=1, depth=2, **width), tiny(seed=2, depth=2), method)
    if ran:
        dual(images())  # leaves a step behind
        dual.student(images())
    twins = [copy.deepcopy(dual), pickle.loads(pickle.dumps(dual))]
    expected = taught_step(dual)
    del dual
    gc.collect()
    for twin in twins:
        assert all(torch.equal(*pair) for pair in zip(taught_step(twin), expected, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_releasing_a_copy_leaves_the_original_alone(method: str) -> None:
    dual = DualViT(tiny("eva02", seed=1, depth=2), tiny("eva02", seed=2, depth=2), method)
    twin = copy.deepcopy(dual)
    trained = [p.requires_grad for p in dual.student.parameters()]
    expected = taught_step(dual)
    released = twin.release(bare=twin.needs_teacher)
    assert all(p.requires_grad for p in released.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in released.modules())
    assert [p.requires_grad for p in dual.student.parameters()] == trained
    assert all(torch.equal(*pair) for pair in zip(taught_step(dual), expected, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_model_does_not_teach_itself(method: str) -> None:
    model = tiny()
    shared = copy.deepcopy(model)
    shared.blocks[1].mlp = model.blocks[1].mlp
    for student in (model, shared):
        with pytest.raises(TransferError, match="share their weights"):
            DualViT(model, student, method)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_student_has_one_wrapper_at_a_time(method: str) -> None:
    teacher, student = tiny(seed=1), tiny(seed=2)
    dual = DualViT(teacher, student, method)
    expected = taught_step(dual)
    twin = copy.deepcopy(dual)
    for second in (
        lambda: DualViT(teacher, student),
        lambda: DualViT(student, tiny(seed=3), "logits"),
        lambda: dual.with_student(student),
        lambda: DualViT(teacher, twin.student),
    ):
        with pytest.raises(TransferError, match=r"of another DualViT.*release\(\)"):
            second()
    assert all(torch.equal(*pair) for pair in zip(taught_step(dual), expected, strict=True))
    dual.release(bare=dual.needs_teacher)
    again = DualViT(teacher, student, method)
    assert all(torch.equal(*pair) for pair in zip(taught_step(again), expected, strict=True))
    dual.release(bare=dual.needs_teacher)  # a second time: it is not its student any more
    assert all(torch.equal(*pair) for pair in zip(taught_step(again), expected, strict=True))


def test_a_wrapper_that_is_gone_leaves_nothing_behind() -> None:
    teacher, student = tiny("eva02", seed=1), tiny("eva02", seed=2)
    for method in ("copy", "block_output", "feature"):
        DualViT(teacher, student, method)
        dual = DualViT(teacher, student, "distill")
        assert all(parameter.requires_grad for parameter in student.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
        del dual


@pytest.mark.parametrize("method", METHODS)
def test_what_was_released_is_not_taught(method: str) -> None:
    dual = DualViT(tiny(seed=1), tiny(seed=2), method)
    student = dual.release(bare=dual.needs_teacher)
    with pytest.raises(TransferError, match="was released"):
        dual(images())
    if dual.needs_teacher:
        with pytest.raises(TransferError, match="was released"):
            dual.predict(images())
    else:
        assert torch.equal(dual.predict(images()), student(images()))


def test_a_student_that_cannot_be_taught_is_left_as_it_was() -> None:
    teacher, student = tiny(seed=1, num_classes=3), tiny(seed=2)
    plain = [type(module) for module in student.modules()]
    with pytest.raises(TransferError, match="one set of classes"):
        DualViT(teacher, student, "logits")
    with pytest.raises(TransferError, match="as deep as"):
        DualViT(tiny(seed=1, depth=4), student, "copy", layers=[(3, 2)], share_drop_path=True)
    assert [type(module) for module in student.modules()] == plain
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_teacher_in_use_does_not_become_a_student() -> None:
    teacher, student = tiny(seed=1), tiny(seed=2)
    dual = DualViT(teacher, student, "copy")
    with pytest.raises(TransferError, match="the student is the teacher of another DualViT"):
        DualViT(tiny(seed=3), teacher)
    del dual
    wider = tiny(seed=3, embed_dim=48)
    with pytest.raises(TransferError, match="every weight of the student is frozen"):
        DualViT(wider, teacher, "block_output")
    DualViT(wider, teacher.requires_grad_(True), "block_output")


@pytest.mark.parametrize("method", ["block_output", "feature"])
def test_a_student_whose_losses_are_not_seen_is_refused(method: str) -> None:
    student = tiny(seed=2)
    dual = DualViT(tiny(seed=1), student, method)
    for module in student.modules():
        module._forward_hooks.clear()  # as a student that was compiled before calls none
        module._forward_pre_hooks.clear()
    with pytest.raises(TransferError, match="it was compiled before it was taught"):
        dual(images())


def two(method: str, family: str = "vit", **options: object) -> tuple[DualViT, DualViT]:
    """The same pair of two blocks without and with gradient checkpointing."""
    teacher, student = tiny(family, seed=1, depth=2), tiny(family, seed=2, depth=2)
    duals = [DualViT(teacher, copy.deepcopy(student), method, **options).train() for _ in range(2)]
    duals[1].student.set_grad_checkpointing(True)
    return duals[0], duals[1]


def batches(count: int = 2) -> list[Tensor]:
    return [images(batch=2) * (index + 1) - index for index in range(count)]


ORDERS = ["both", "second first", "in order", "predict", "student", "evaluation", "twice"]
"""Of backward passes, or what comes between a forward pass and its backward."""
CASES = [
    (method, order)
    for method in METHODS
    for order in (ORDERS if method in ("copy", "copy_q", "distill", "logits") else ["second first"])
]
"""Every order with methods that hold of a forward pass a map, projections or nothing; every method out of order."""


def run_in_order(dual: DualViT, order: str) -> None:
    first, second, third = batches(3)
    loss = total(dual(first))
    if order in ("both", "second first", "in order"):
        losses = [loss, total(dual(second)), *([total(dual(third))] if order == "in order" else [])]
        for each in [sum(losses)] if order == "both" else losses[::-1] if order == "second first" else losses:
            each.backward()
        return
    if order == "predict":
        dual.predict(second)
    elif order == "student":
        loss = loss + dual.student(second).square().sum()
    elif order == "evaluation":
        with torch.no_grad():
            dual.eval()(second)
        dual.train()
    else:
        loss.backward(retain_graph=True)
        total(dual(second))
    loss.backward()


@pytest.mark.parametrize(("method", "order"), CASES)
def test_recomputation_reads_what_its_own_forward_gave(method: str, order: str) -> None:
    plain, saving = two(method)
    for dual in (plain, saving):
        run_in_order(dual, order)
    assert torch.equal(gradient(plain.student), gradient(saving.student))


@pytest.mark.parametrize("family", ["eva02", "beit", "dinov2_registers", "deit_distilled"])
def test_of_every_family(family: str) -> None:
    for dual in (duals := two("distill", family)):
        run_in_order(dual, "both")
    assert torch.equal(*(gradient(dual.student) for dual in duals))


def test_drop_path_masks_belong_to_their_forward() -> None:
    teacher, student = tiny(seed=1), tiny(seed=2, drop_path_rate=0.5)
    grads = []
    for enabled in (False, True):
        dual = DualViT(teacher, copy.deepcopy(student), "distill", share_drop_path=True).train()
        dual.student.set_grad_checkpointing(enabled)
        torch.manual_seed(0)
        run_in_order(dual, "in order")
        grads.append(gradient(dual.student))
    assert torch.equal(*grads)


@pytest.mark.parametrize("method", ["copy", "copy_q"])
@pytest.mark.parametrize("between", [False, True])
def test_a_copied_model_that_is_loaded(method: str, between: bool) -> None:
    dual, teacher = pair("alike", method)
    grads = []
    for enabled in (False, True):
        model = whole(dual, teacher).train()
        model.set_grad_checkpointing(enabled)
        losses = [model(images() * scale).square().sum() for scale in (1, 2)]
        if between:
            with torch.no_grad():
                model.eval()(images())
            model.train()
        for loss in losses:
            loss.backward()
        grads.append(gradient(model))
        assert isinstance(model.blocks, torch.nn.Module)
    assert relative_error(*grads) < 1e-12


@pytest.mark.parametrize("change", ["weights", "new weights", "mode", "release"])
def test_what_a_recomputation_cannot_give_back_is_refused(change: str) -> None:
    _, dual = two("distill")
    loss = total(dual(images()))
    if change == "weights":
        with torch.no_grad():
            dual.student.blocks[1].mlp.fc1.weight.mul_(2)
    elif change == "new weights":
        dual.student.blocks[1].load_state_dict(dual.student.blocks[1].state_dict(), assign=True)
    elif change == "mode":
        dual.eval()
    else:
        dual.release()
    with pytest.raises(TransferError, match="between a forward pass and its backward"):
        loss.backward()


def test_a_forward_that_fails_leaves_the_student_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is refused for its reentrant checkpointing."""
    _, dual = two("distill")
    monkeypatch.setattr("timm.layers.config._USE_REENTRANT_CKPT", True)
    with pytest.raises(TransferError, match="TIMM_REENTRANT_CKPT"):
        dual(images())
    assert isinstance(dual.student.blocks, torch.nn.Module)
    monkeypatch.undo()
    expected = dual.student.eval()(images())
    handle = dual.student.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dual(images())
    handle.remove()
    assert isinstance(dual.student.blocks, torch.nn.Module)
    assert torch.equal(dual.student(images()), expected)


def test_a_step_is_freed_with_its_backward() -> None:
    _, dual = two("distill")
    seen: list[weakref.ref[object]] = []
    dual.student.blocks[0].register_forward_pre_hook(
        lambda *_: seen.append(weakref.ref(dual._tapes["teacher"].step))
    )
    loss = total(dual(images()))
    assert seen[0]() is not None
    loss.backward()
    gc.collect()
    assert seen[0]() is None
