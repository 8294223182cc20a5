"""Losses into hashed attention, against its dense map on codes with a straight-through gradient, in float64."""

from __future__ import annotations

from typing import Any, cast

import pytest
import timm
import torch
from graftvit.models.attention.base import Geometry, Heads
from graftvit.models.attention.hash import MODES, HashAttention
from graftvit.models.attention.softmax import softmax_rows
from graftvit.models.conversion import convert, converted_layers
from graftvit.models.errors import TransferError
from graftvit.transfer import DualViT
from graftvit.transfer.recovery.align import LAYER_LOSSES, NUM_PROBES, Alignment, LayerTarget
from support.models.operator_cases import Case, draw
from torch import Tensor, nn

GEOMETRY = Geometry(1, (5, 6))
"""31 tokens, so that `rows` takes every row."""
IMAGES = torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def vit() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": (16, 24)}
    return timm.create_model("vit_tiny_patch16_224", patch_size=4, num_classes=3, **sizes).eval()


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
    operator = cast(HashAttention, Case("hash", {"mode": mode}).build(GEOMETRY))
    other, q, v = draw(GEOMETRY, seed=1), *draw(GEOMETRY).qkv()[::2]
    target = LayerTarget(other, softmax_rows(other, slice(None)) @ other.values())
    q, v = q.requires_grad_(), v.requires_grad_()
    torch.manual_seed(5)
    found = LAYER_LOSSES[loss](operator, Heads(q, None, v, None, 1.0, geometry=GEOMETRY), target)
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


@pytest.mark.parametrize("loss", sorted(LAYER_LOSSES))
def test_the_shared_projection_learns_by_every_loss(loss: str) -> None:
    teacher = vit()
    student = convert(teacher, "*: hash(anchors=9)", calibration=IMAGES)
    alignment = Alignment(teacher, student, loss)
    layers = converted_layers(student).values()
    optimizer = torch.optim.AdamW(
        [p for layer in layers for p in cast(Any, layer).qkv.parameters()], lr=3e-3, weight_decay=0
    )
    totals = []
    for _ in range(40):
        torch.manual_seed(1)
        total = torch.stack(list(alignment(IMAGES).values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert min(totals[-5:]) < totals[0]
    assert all(cast(Any, layer).qkv.weight.grad[:16].any() for layer in layers)  # the query rows


def test_the_published_map_has_no_rows_to_compare() -> None:
    teacher = vit()
    student = convert(teacher, "*: hash(mode=reference, anchors=9)", calibration=IMAGES)
    with pytest.raises(
        TransferError, match=r"align\.match=rows: .*no distributions.*use output, map or probes"
    ):
        Alignment(teacher, student, "rows")


@pytest.mark.parametrize("method", ["attention_output", "block_output", "feature", "logits"])
def test_losses_of_outputs_reach_the_shared_projection(method: str) -> None:
    teacher = vit()
    student = convert(teacher, "*: hash(anchors=9)", calibration=IMAGES)
    taught = DualViT(teacher, student, method)(IMAGES)
    assert float(taught.transfer_loss.detach()) > 0
    taught.transfer_loss.backward()
    layers = [cast(Any, layer) for layer in converted_layers(student).values()]
    assert all(layer.qkv.weight.grad is not None for layer in layers)
    assert layers[0].qkv.weight.grad[:16].any()


def test_losses_of_softmax_maps_are_refused_by_name() -> None:
    teacher = vit()
    student = convert(teacher, "*: hash(anchors=9)", calibration=IMAGES)
    with pytest.raises(
        TransferError, match=r"layer 0 .*hash.* in place of softmax attention: use mode=align"
    ):
        DualViT(teacher, student, "distill")
