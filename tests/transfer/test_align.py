"""Alignment: each layer learns from the teacher's inputs, alone, and ends at the teacher's output."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import timm
import torch
import torch.nn.functional as F
from graftvit.models.attention.base import FirstRows, Geometry, Heads, LowRank, Sparse, Term, term_rows
from graftvit.models.attention.hash import MODES, HashAttention
from graftvit.models.attention.softmax import softmax_rows
from graftvit.models.conversion import convert, converted_layers, new_parameters, resize
from graftvit.models.errors import TransferError, UnsupportedModelError
from graftvit.models.families import blocks_of, sites
from graftvit.transfer import DualViT
from graftvit.transfer.align import (
    LAYER_LOSSES,
    NUM_PROBES,
    Alignment,
    LayerTarget,
    inner,
    map_error,
    output_error,
    probe_error,
    row_error,
    squared_distance,
)
from graftvit.transfer.analysis.compare.comparison_cells import layer_errors
from support.models.operator_cases import CASES, Case, draw
from support.models.pyramids import SIZES, images, tiny
from timm.models.swin_transformer import window_reverse
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

SMALL: dict[str, Any] = {
    "embed_dim": 16, "depth": 3, "num_heads": 2, "img_size": (16, 24), "patch_size": 4, "num_classes": 3,
}  # fmt: skip
IMAGES = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
GEOMETRY = Geometry(1, (5, 7))


def vit(name: str = "vit_tiny_patch16_224", **more: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **more}).eval()


def test_losses_are_their_equations() -> None:
    operator = Case("linear").build(GEOMETRY)
    student, teacher = draw(GEOMETRY), draw(GEOMETRY, seed=1)
    _, _, v_s = student.qkv()
    _, _, v_t = teacher.qkv()
    theirs, ours = softmax_rows(teacher, slice(None)), operator.matrix(student)
    target = LayerTarget(teacher, theirs @ v_t)
    tokens = GEOMETRY.num_tokens
    assert float(output_error(operator, student, target)) == pytest.approx(
        float((ours @ v_s - theirs @ v_t).square().mean()), rel=1e-9
    )
    exact = float((ours - theirs).square().sum((2, 3)).mean() / tokens)
    assert float(map_error(operator, student, target)) == pytest.approx(exact, rel=1e-6)
    torch.manual_seed(0)
    estimates = torch.stack([probe_error(operator, student, target) for _ in range(400)])
    assert float(estimates.mean()) == pytest.approx(exact, rel=0.05)
    rows = torch.stack([row_error(operator, student, target) for _ in range(50)])
    all_rows = -(theirs * ours.log()).sum(-1)
    assert float(rows.mean()) == pytest.approx(float(all_rows.mean()), rel=0.05)


@pytest.mark.parametrize("plan", ["*: linear", "*: hash(anchors=9)"])
@pytest.mark.parametrize("loss", sorted(LAYER_LOSSES))
def test_every_loss_falls(loss: str, plan: str) -> None:
    teacher = vit()
    student = convert(teacher, plan, calibration=THREE)
    alignment = Alignment(teacher, student, loss)
    layers: list[Any] = list(converted_layers(student).values())
    parameters = [parameter for layer in layers for parameter in layer.qkv.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0)
    totals = []
    for _ in range(60):
        torch.manual_seed(1)  # the same rows and probes each time
        total = torch.stack(list(alignment(IMAGES).values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    if "hash" in plan:
        assert min(totals[-5:]) < totals[0]
        assert all(layer.qkv.weight.grad[:16].any() for layer in layers)  # the query rows
    else:
        assert totals[-1] < 0.9 * totals[0] or (loss == "rows" and totals[-1] < totals[0])


def test_layers_and_the_teacher_are_left_alone() -> None:
    """What layer 0 of the student does has no part in the loss of layer 2: inputs are the teacher's."""
    teacher = vit().train()
    state, modules = copy.deepcopy(teacher.state_dict()), list(teacher.modules())
    student = convert(teacher, "0: linear; 2: linear")
    alignment = Alignment(teacher, student)
    losses = alignment.train()(IMAGES)
    assert set(losses) == {0, 2}
    losses[2].backward()
    layers: dict[int, Any] = converted_layers(student)
    assert layers[2].qkv.weight.grad is not None
    assert all(parameter.grad is None for parameter in layers[0].parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    layers[0].qkv.weight.data.mul_(3)
    after = alignment(IMAGES)
    assert float(after[2]) == float(losses[2])
    assert float(after[0]) != float(losses[0])
    assert list(teacher.modules()) == modules
    assert all(torch.equal(state[key], tensor) for key, tensor in teacher.state_dict().items())
    names = [name for name, _ in alignment.named_parameters()]
    assert names
    assert all(name.startswith("student.") for name in names)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("eva02_tiny_patch14_224", {"patch_size": 4}),
        ("vit_small_patch16_dinov3", {}),
        ("vit_small_patch14_reg4_dinov2", {}),
        ("deit_tiny_distilled_patch16_224", {}),
    ],
)
def test_other_families(name: str, more: Any) -> None:
    teacher = vit(name, **{"num_heads": 4, **more})
    losses = Alignment(teacher, convert(teacher, "*: linear"))(IMAGES)
    assert len(losses) == 3
    torch.stack(list(losses.values())).sum().backward()


def test_programs_are_aligned_by_their_outputs() -> None:
    teacher = vit()
    student = convert(teacher, "*: attnzero_105; 0: program(code=add(l2(nt(v tn(k v))) q))")
    losses = Alignment(teacher, student)(IMAGES)
    torch.stack(list(losses.values())).sum().backward()
    assert all(
        x.grad is not None and x.grad.any() for n, x in student.named_parameters() if ".attn.qkv." in n
    )
    with pytest.raises(TransferError, match="map"):
        Alignment(teacher, student, "map")


def test_mistakes_are_named() -> None:
    teacher = vit()
    linear, hashed = convert(teacher, "*: linear"), convert(teacher, "*: hash(anchors=9)", calibration=THREE)
    published = convert(teacher, "*: hash(mode=reference, anchors=9)", calibration=THREE)
    for theirs, ours, match, message in (
        (teacher, vit(), "output", "no layer of the student is converted"),
        (teacher, linear, "outpt", r"align\.match=outpt; did you mean 'output'"),
        (teacher, convert(teacher, "*: kernel(feature=relu)"), "rows", "have no cross-entropy"),
        (teacher, published, "rows", r"align\.match=rows: .*no distributions.*use output, map or probes"),
        (vit(depth=2), linear, "output", "give the model that the student was converted from"),
        (
            vit(img_size=(24, 16)),
            linear,
            "output",
            r"6x4 tokens .* 4x6 tokens .* leave teacher\.img_size",
        ),
    ):
        with pytest.raises(TransferError, match=message):
            Alignment(theirs, ours, match)
    with pytest.raises(
        UnsupportedModelError, match="images of 24x16 are given, and VisionTransformer takes 16x24"
    ):
        Alignment(vit(dynamic_img_size=True), linear)(torch.zeros(1, 3, 24, 16))
    with pytest.raises(
        TransferError, match=r"layer 0 .*hash.* in place of softmax attention: use mode=align"
    ):
        DualViT(teacher, hashed, "distill")
    assert new_parameters(linear) == [], "new parameters are those of operators"


def test_images_of_another_size_have_their_own_grid() -> None:
    free = vit(dynamic_img_size=True).double()
    images = torch.randn(2, 3, 24, 8, dtype=torch.float64)
    found = Alignment(free, convert(free, "*: window(window=2)"))(images)
    sized = convert(free, "*: window(window=2)")
    for model in (sized, free):
        resize(model, (24, 8))
    wanted = Alignment(free, sized)(images)
    assert {index: float(loss) for index, loss in found.items()} == {
        index: pytest.approx(float(loss), rel=1e-12) for index, loss in wanted.items()
    }


@pytest.mark.parametrize("loss", ["map", "probes", "rows"])
def test_maps_without_a_parameter_are_refused_where_no_other_layer_learns(loss: str) -> None:
    teacher = vit()
    uniform = convert(teacher, "*: uniform")
    with pytest.raises(TransferError, match=f"match={loss}: the maps of uniform depend on no parameter"):
        Alignment(teacher, uniform, loss)
    assert all(each.requires_grad for each in Alignment(teacher, uniform, "output")(IMAGES).values())
    alignment = Alignment(teacher, convert(teacher, "0: uniform; 2: linear"), loss)
    losses = alignment(IMAGES)
    assert {index: each.requires_grad for index, each in losses.items()} == {0: False, 2: True}
    alignment.freeze_others()  # DDP waits for the gradient of every parameter that is not frozen
    first, _, last = blocks_of(alignment.student)
    assert not any(parameter.requires_grad for parameter in first.parameters())
    sum(losses.values()).backward()
    learned = [p for p in last.parameters() if p.requires_grad]
    assert learned
    assert all(p.grad is not None for p in learned)


ODD = Geometry(1, (5, 6))
"""31 tokens, so that `rows` takes every row."""
THREE = torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def two_layers() -> nn.Module:
    return vit(depth=2)


def dense_map(operator: HashAttention, q: Tensor) -> Tensor:
    """The map from the equations; the gradient of a sign is that of its argument clamped to [-1, 1]."""
    u = q / q.norm(dim=-1, keepdim=True)
    distance = (u[:, :, :, None] - operator.anchors[:, None]).square().sum(-1)
    variance = distance.mean((2, 3), keepdim=True)
    centered = torch.exp(-distance / (2 * variance)) - operator.mean[:, None]
    y = torch.einsum("bhnm,hrm->bhnr", centered, operator.weight)
    clamped = y.clamp(-1, 1)
    z = clamped + (y.sign() - clamped).detach()
    products, tokens = z @ z.transpose(2, 3), q.shape[2]
    constant = z.shape[-1] + 1
    sums = (products + constant).sum(-1, keepdim=True)
    same = torch.eye(tokens, dtype=q.dtype) if operator.mode == "reference" else 1.0
    return (products + constant * same) / sums


def dense_loss(name: str, ours: Tensor, values: Tensor, teacher: LayerTarget) -> Tensor:
    theirs, tokens = softmax_rows(teacher.heads, slice(None)), ours.shape[-1]
    if name == "output":
        return (ours @ values - teacher.output).square().mean()
    if name == "map":
        return (theirs - ours).square().sum((2, 3)).mean() / tokens
    if name == "rows":
        return -(theirs * ours.log()).sum(-1).mean()
    signs = torch.randint(0, 2, (1, 1, tokens, NUM_PROBES)).to(ours) * 2 - 1
    return ((ours - theirs) @ signs).square().sum((2, 3)).mean() / (NUM_PROBES * tokens)


LOSSES = [
    (loss, mode) for loss in sorted(LAYER_LOSSES) for mode in MODES if (loss, mode) != ("rows", "reference")
]


@pytest.mark.parametrize(("loss", "mode"), LOSSES)
def test_a_loss_and_its_gradient_are_those_of_the_dense_map(loss: str, mode: str) -> None:
    operator = cast(HashAttention, Case("hash", {"mode": mode}).build(ODD))
    other, q, v = draw(ODD, seed=1), *draw(ODD).qkv()[::2]
    target = LayerTarget(other, softmax_rows(other, slice(None)) @ other.values())
    q, v = q.requires_grad_(), v.requires_grad_()
    torch.manual_seed(5)
    found = LAYER_LOSSES[loss](operator, Heads(q, None, v, None, 1.0, geometry=ODD), target)
    torch.manual_seed(5)
    wanted = dense_loss(loss, dense_map(operator, q), v, target)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    ours, dense = (torch.autograd.grad(each, [q, v], allow_unused=True) for each in (found, wanted))
    assert ours[0] is not None
    assert ours[0].abs().max() > 0
    for got, expected in zip(ours, dense, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("method", ["attention_output", "block_output", "feature", "logits"])
def test_losses_of_outputs_reach_the_shared_projection(method: str) -> None:
    teacher = two_layers()
    student = convert(teacher, "*: hash(anchors=9)", calibration=THREE)
    taught = DualViT(teacher, student, method)(THREE)
    assert float(taught.transfer_loss.detach()) > 0
    taught.transfer_loss.backward()
    layers = [cast(Any, layer) for layer in converted_layers(student).values()]
    assert all(layer.qkv.weight.grad is not None for layer in layers)
    assert layers[0].qkv.weight.grad[:16].any()


LINEAR = [case for case in CASES if case.build(GEOMETRY).traits.linear_in_v]


def dense(term: Term, heads: Heads) -> Tensor:
    return term_rows(term, torch.arange(GEOMETRY.num_tokens), heads)


@pytest.mark.parametrize("case", LINEAR, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_distance_is_the_dense_one(case: Case, with_bias: bool) -> None:
    operator, heads, teacher = case.build(GEOMETRY), draw(GEOMETRY), draw(GEOMETRY, seed=1, size=2)
    if with_bias:
        teacher.bias = torch.randn(2, GEOMETRY.num_tokens, GEOMETRY.num_tokens, dtype=torch.float64)
    q, k, _ = (x.requires_grad_() for x in heads.qkv())
    found = squared_distance(teacher, operator.terms(heads))
    wanted = (softmax_rows(teacher, slice(None)) - operator.matrix(heads)).square().sum((2, 3))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    if not found.requires_grad:  # uniform attention has no queries and keys
        return
    inputs = [q, k, *operator.parameters()]
    gradients = [torch.autograd.grad(x.sum(), inputs, allow_unused=True) for x in (found, wanted)]
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


SPARSE = [
    case for case in LINEAR if any(isinstance(t, Sparse) for t in case.build(GEOMETRY).terms(draw(GEOMETRY)))
]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("case", SPARSE, ids=str)
def test_large_logits_in_half_precision(case: Case, with_bias: bool) -> None:
    half, operator = torch.bfloat16, case.build(GEOMETRY).float()
    student = draw(GEOMETRY)
    student = student.with_qkv(*(x.float() for x in student.qkv()))
    q, k, v = (60 * x.to(half) for x in draw(GEOMETRY, seed=1, size=2).qkv())
    bias = None
    if with_bias:
        bias = 99 * torch.randn(2, *2 * (GEOMETRY.num_tokens,), generator=torch.Generator().manual_seed(0))
    teacher = Heads(q, k, v, None if bias is None else bias.to(half), 0.3)
    exact = Heads(q.double(), k.double(), v.double(), None if bias is None else bias.to(half).double(), 0.3)
    with torch.autocast("cpu", half):
        found = squared_distance(teacher, operator.terms(student))
    wanted = (softmax_rows(exact, slice(None)) - operator.matrix(student)).square().sum((2, 3))
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-2, atol=1e-2)


def test_inner_products_of_all_kinds_of_terms() -> None:
    heads, tokens = draw(GEOMETRY), GEOMETRY.num_tokens
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    index = torch.randint(tokens, (tokens, 4), generator=generator)
    other = torch.randint(tokens, (tokens, 3), generator=generator)
    terms: list[Term] = [
        LowRank(random(2, 2, tokens, 3), random(2, 2, tokens, 3)),
        LowRank(random(2, 2, tokens, 5), random(2, 2, tokens, 5)),
        Sparse(random(2, 2, tokens, 4), index),
        Sparse(random(2, 2, tokens, 3), other),
        FirstRows(random(2, 2, 2, tokens)),
    ]
    for a in terms:
        for b in terms:
            torch.testing.assert_close(inner(a, b), (dense(a, heads) * dense(b, heads)).sum((2, 3)))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


RANKS: dict[str, Any] = {
    "linformer": {"num_keys": 16},
    "nystrom": {"num_landmarks": 16},
    "agent": {"num_agents": 16},
    "hilo": {"alpha": 0},
}
"""By default these grow with the grid."""
CHEAP = sorted(
    {case.operator for case in LINEAR if case.build(GEOMETRY).traits.linear_cost} - {"uniform", "scan"}
)


@pytest.mark.parametrize("name", CHEAP)
def test_memory_is_linear_in_the_number_of_tokens(name: str) -> None:
    """Four times the tokens take about four times the memory; a map would be sixteen times as large."""
    largest = []
    for side in (14, 28):
        geometry = Geometry(1, (side, side))
        heads = draw(geometry, torch.float32, batch=1)
        operator = Case(name, RANKS.get(name, {})).build(geometry, torch.float32)
        q, _, _ = (x.requires_grad_() for x in heads.qkv())
        with Largest() as mode:
            distance = squared_distance(draw(geometry, torch.float32, batch=1, seed=1), operator.terms(heads))
            distance.sum().backward()
        assert q.grad is not None
        largest.append(mode.elements)
    assert largest[1] <= 6 * largest[0]


KINDS = ("pvt", "pvt_li", "svt", "pcpvt", "swin", "swinv2")
PLAN = "stage1: linear; stage2.0: softmax"


def student_of(teacher: nn.Module, plan: str = PLAN) -> nn.Module:
    """Return a conversion whose layers are not the teacher's any more."""
    student = convert(teacher, plan, without=["bias"])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return student


def grid_of(windows: Tensor, block: Any) -> Tensor:
    """Return timm's windows (B·W, M, C) of a block of Swin as tokens (B, N, C) of the grid."""
    height, width = block.input_resolution
    rows, columns = block.window_size
    padded = -(-height // rows) * rows, -(-width // columns) * columns
    x = window_reverse(windows.unflatten(1, (rows, columns)), block.window_size, *padded)
    x = x[:, :height, :width].roll(tuple(block.shift_size), (1, 2))
    return x.flatten(1, 2)


def teacher_output(teacher: nn.Module, index: int, batch: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Return the input of the output projection of timm's layer without padded tokens, and what the layer was given."""
    block: Any = sites(teacher)[index].block(teacher)
    seen: dict[str, Any] = {}
    hooks = [
        block.register_forward_pre_hook(lambda _, given: seen.update(block=given)),
        block.norm1.register_forward_hook(lambda *given: seen.update(norm=given[2])),
        block.attn.proj.register_forward_pre_hook(lambda _, given: seen.update(out=given[0])),
    ]
    with torch.no_grad():
        teacher(batch)
    for hook in hooks:
        hook.remove()
    return grid_of(seen["out"], block) if hasattr(block, "shift_size") else seen["out"], seen


def reference(teacher: nn.Module, student: nn.Module, batch: Tensor) -> dict[int, Tensor]:
    """Return the mean squared errors of the inputs of the output projections."""
    losses: dict[int, Tensor] = {}
    for index, layer in converted_layers(student).items():
        block: Any = sites(teacher)[index].block(teacher)
        target, seen = teacher_output(teacher, index, batch)
        own: list[Tensor] = []
        proj: Any = layer.proj
        hook = proj.register_forward_pre_hook(lambda _, given, own=own: own.append(given[0]))
        if not hasattr(block, "shift_size"):
            layer(seen["norm"], *seen["block"][1:])
        else:  # the block of Swin V2 has its norm after the attention
            layer(seen["block"][0] if hasattr(block.attn, "logit_scale") else seen["norm"])
        hook.remove()
        losses[index] = F.mse_loss(own[0], target)
    return losses


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_are_those_of_timms_layers(kind: str, size: str) -> None:
    teacher = tiny(kind, SIZES[size]).double()
    student = student_of(teacher).eval()
    batch = images(SIZES[size]).double()
    state, modules = dict(teacher.state_dict()), list(teacher.modules())
    alignment = Alignment(teacher, student)
    found, wanted = alignment(batch), reference(teacher, student, batch)
    assert found.keys() == wanted.keys() == set(converted_layers(student))
    for index, loss in found.items():
        assert float(loss) == pytest.approx(float(wanted[index]), rel=1e-5)
    assert list(teacher.modules()) == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in teacher.state_dict().items())
    torch.stack(list(found.values())).sum().backward()
    learned = {id(parameter) for parameter in student.parameters() if parameter.grad is not None}
    assert learned == {id(parameter) for parameter in alignment.used_parameters()}


@pytest.mark.parametrize("match", ["map", "probes", "rows"])
def test_maps_are_compared_where_the_teachers_are_of_all_tokens(match: str) -> None:
    teacher = tiny("pvt")  # without a reduction in the second stage
    losses = Alignment(teacher, student_of(teacher, "stage2: linear"), match)(images((32, 32)))
    torch.stack(list(losses.values())).sum().backward()
    for kind in ("pvt", "svt", "swin", "swinv2"):
        with pytest.raises(TransferError, match=f"match={match}: layer 0 of the teacher has windows"):
            Alignment(tiny(kind), student_of(tiny(kind)), match)


def test_another_model_is_refused() -> None:
    with pytest.raises(TransferError, match=r"the teacher is a Twins .* and the student a PyramidVision"):
        Alignment(tiny("svt"), student_of(tiny("pvt")))
    with pytest.raises(
        TransferError, match="layer 0 has 1 heads of 8, width 8 and 8x8 tokens in the teacher"
    ):
        Alignment(tiny("pvt"), student_of(tiny("pvt", (48, 48))))


@pytest.mark.parametrize("kind", KINDS)
def test_layer_errors_are_relative_errors_of_the_same_outputs(kind: str) -> None:
    teacher = tiny(kind, (40, 24)).double()
    student, batch = student_of(teacher).eval(), images((40, 24)).double()
    modules = list(teacher.modules())
    found, squares = layer_errors(teacher, student, [batch]), reference(teacher, student, batch)
    assert list(teacher.modules()) == modules
    for index, error in squares.items():
        target = teacher_output(teacher, index, batch)[0]
        assert found[index] == pytest.approx(float(error / target.square().mean()) ** 0.5, rel=1e-5)
