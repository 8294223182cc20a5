"""Looking at attention: the maps of a model, and how far two models' maps are apart.

Maps are formed densely here, (B, H, N, N) a layer: this is for a handful of images, not for training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...models.attention.base import Heads
from ...models.conversion import ConvertedAttention
from ...models.copied import CopiedAttention
from ...models.errors import TransferError
from ...models.families import attention_blocks, check_supported, evaluating
from ...models.host import AttentionHost, Given, observe, release_attention


@torch.no_grad()
def attention_maps(
    model: nn.Module, images: Tensor, layers: Sequence[int] | None = None
) -> dict[int, Tensor]:
    """Return the attention maps of `model` on `images` (B, C, H, W): (B, heads, N, N) by layer, in float32.

    Negative layers count from the end; the keys of the result are the layers as given. The model runs in eval
    mode and is left as it was.

    Raises:
        TransferError: a layer that the model does not have.
        UnsupportedModelError: a model of another kind.
    """
    blocks = attention_blocks(model)
    wanted = list(range(len(blocks))) if layers is None else list(layers)
    for layer in wanted:
        if not -len(blocks) <= layer < len(blocks):
            raise TransferError(f"layer {layer} does not exist: the model has {len(blocks)} blocks.")
    maps: dict[int, Tensor] = {}
    with _evaluating(model):
        hooks = [_keep_map(blocks[layer].attn, maps, layer) for layer in wanted]
        try:
            model(images)
        finally:
            for hook in hooks:
                hook.remove()
    return {layer: maps[layer] for layer in wanted}


def _keep_map(attention: nn.Module, maps: dict[int, Tensor], layer: int) -> RemovableHandle:
    """Keep the map that a layer applies, in float32: of a copied layer the teacher's, where it copies that."""

    def see(given: Given) -> None:
        if isinstance(attention, ConvertedAttention):
            maps[layer] = attention.operator.matrix(attention.project(*given)).float()
        elif isinstance(attention, CopiedAttention):
            maps[layer] = attention.operator.map(attention.project(*given)).float()
        else:
            maps[layer] = _softmax_map(AttentionHost(attention).project(*given))

    return observe(attention, see)


def _softmax_map(heads: Heads) -> Tensor:
    q, k = heads.qk()
    logits_BHNN = (q.float() @ k.float().transpose(-2, -1)) * heads.scale
    if heads.bias is not None:
        logits_BHNN = logits_BHNN + heads.bias.float()
    return logits_BHNN.softmax(dim=-1)


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of distributions over the last dimension, in nats (0 to ln 2).

    (KL(p ‖ m) + KL(q ‖ m)) / 2 with m = (p + q) / 2; the other dimensions are broadcast and kept.
    """
    middle = (p + q) / 2
    terms = torch.xlogy(p, p) + torch.xlogy(q, q) - 2 * torch.xlogy(middle, middle)
    return (terms.sum(dim=-1) / 2).clamp_min(0.0)


def map_divergence(teacher_BHNN: Tensor, student_BHNN: Tensor, *, match_heads: bool = False) -> float:
    """Return the mean Jensen-Shannon divergence of two layers' maps over images, heads and queries, in nats.

    Head h is compared with head h, or, with `match_heads`, with its partner in the assignment of least total
    divergence (needed where the two have unequal numbers of heads; heads without a partner are left out).

    Raises:
        TransferError: unequal numbers of tokens, or of heads without `match_heads`.
    """
    _check_comparable(teacher_BHNN, student_BHNN, match_heads)
    if not match_heads:
        return js_divergence(teacher_BHNN, student_BHNN).mean().item()
    cost_TS = torch.stack(
        [js_divergence(head, student_BHNN).mean(dim=(0, 2)) for head in teacher_BHNN.split(1, dim=1)]
    )
    rows, columns = linear_sum_assignment(cost_TS.cpu().numpy())
    return cost_TS[torch.as_tensor(rows), torch.as_tensor(columns)].mean().item()


def divergence_by_layer(
    teacher: nn.Module,
    student: nn.Module,
    images: Tensor,
    *,
    teacher_images: Tensor | None = None,
    pairs: Sequence[tuple[int, int]] | None = None,
    match_heads: bool = False,
) -> list[float]:
    """Return `map_divergence` for each (teacher layer, student layer) pair; all layers by default.

    `teacher_images` are the same images as the teacher wants them, where the two are normalized differently.

    Raises:
        TransferError: unequal depths without `pairs`, or maps that cannot be compared.
    """
    if pairs is None:
        depths = len(attention_blocks(teacher)), len(attention_blocks(student))
        if depths[0] != depths[1]:
            raise TransferError(
                f"the teacher has {depths[0]} blocks and the student {depths[1]}: "
                "name the (teacher, student) pairs."
            )
        pairs = [(layer, layer) for layer in range(depths[0])]
    theirs = attention_maps(
        teacher, images if teacher_images is None else teacher_images, [t for t, _ in pairs]
    )
    ours = attention_maps(student, images, [s for _, s in pairs])
    return [map_divergence(theirs[t], ours[s], match_heads=match_heads) for t, s in pairs]


def _check_comparable(teacher_BHNN: Tensor, student_BHNN: Tensor, match_heads: bool) -> None:
    if teacher_BHNN.shape[-2:] != student_BHNN.shape[-2:]:
        raise TransferError(
            f"maps over {teacher_BHNN.shape[-1]} and {student_BHNN.shape[-1]} tokens cannot be compared."
        )
    if not match_heads and teacher_BHNN.shape[1] != student_BHNN.shape[1]:
        raise TransferError(
            f"the teacher has {teacher_BHNN.shape[1]} heads and the student {student_BHNN.shape[1]}: "
            "match_heads=True compares each with its nearest."
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a supported model into eval mode while inside; then restore the mode of each module."""
    layers = [(block, block.attn) for block in attention_blocks(model)]
    try:
        check_supported(release_attention(model), copied=True)
    finally:
        for block, layer in layers:
            block.attn = layer
    with evaluating(model):
        yield
