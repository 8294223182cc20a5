"""Attention maps of a model, and how far two models' maps are apart.

Maps are formed densely here, (B, H, N, N) a layer: this is for a handful of images, not for training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...models.errors import TransferError
from ...models.families import blocks_of
from .layer_maps import LayerMap, layer_maps


def attention_maps(
    model: nn.Module, images: Tensor, layers: Sequence[int] | None = None
) -> dict[int, Tensor]:
    """Return the attention maps of `model` on `images` (B, C, H, W): (B, heads, N, N) by layer, in float32.

    Negative layers count from the end; the keys of the result are the layers as given. Maps of pyramids are over the
    N tokens of the layer's stage, zero outside of a query's window, or (B, heads, N, M) over M reduced keys. Blocks
    without attention are left out. The model runs in eval mode and is left as it was.

    Raises:
        TransferError: a layer that the model does not have.
        UnsupportedModelError: a model of another kind.
    """
    return {layer: each.dense() for layer, each in _chosen_maps(model, images, layers).items()}


def _chosen_maps(model: nn.Module, images: Tensor, layers: Sequence[int] | None) -> dict[int, LayerMap]:
    """Return the maps under the numbers of `layers` as given, such as -1."""
    depth = len(blocks_of(model))
    wanted = list(range(depth)) if layers is None else list(layers)
    for layer in wanted:
        if not -depth <= layer < depth:
            raise TransferError(f"layer {layer} does not exist: the model has {depth} blocks.")
    found = layer_maps(model, images, sorted({layer % depth for layer in wanted}))
    return {layer: found[layer % depth] for layer in wanted if layer % depth in found}


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
    from scipy.optimize import linear_sum_assignment  # here: it takes long, and few runs need it

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
        TransferError: unequal depths without `pairs`, or maps that cannot be compared: of other numbers of tokens, or
            of a block without attention.
    """
    if pairs is None:
        depths = len(blocks_of(teacher)), len(blocks_of(student))
        if depths[0] != depths[1]:
            raise TransferError(
                f"the teacher has {depths[0]} blocks and the student {depths[1]}: "
                "name the (teacher, student) pairs."
            )
        pairs = [(layer, layer) for layer in range(depths[0])]
    theirs = _maps_on_tokens(
        teacher, images if teacher_images is None else teacher_images, [t for t, _ in pairs]
    )
    ours = _maps_on_tokens(student, images, [s for _, s in pairs])
    return [map_divergence(theirs[t], ours[s], match_heads=match_heads) for t, s in pairs]


def _maps_on_tokens(model: nn.Module, images: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """Return the maps over all tokens. Raises TransferError: a block has no attention."""
    found = _chosen_maps(model, images, layers)
    missing = next((layer for layer in layers if layer not in found), None)
    if missing is not None:
        raise TransferError(
            f"layer {missing} of this {type(model).__name__} has no attention: name other pairs"
        )
    return {layer: each.on_tokens() for layer, each in found.items()}


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
