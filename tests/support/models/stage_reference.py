"""What every method gives for a pair of small models with stages, dense, from timm's own forward passes.

timm's layers call `scaled_dot_product_attention` once for each block, which `dense.dense_attention` shows. Maps are
written out over the whole grid: a column for each token, and further columns for the keys with which timm pads windows.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from graftvit.transfer.methods.registry import find_method
from support.models.dense import Layer, dense_attention
from support.models.method_cases import COPIES, Both, Kind, Place, Size, dense_copy, dense_loss
from timm.models.swin_transformer_v2 import WindowAttention as CosineAttention
from torch import Tensor, nn


def blocks_of(model: Any) -> list[Any]:
    """The blocks in order, found as timm's source names them."""
    if hasattr(model, "stages"):
        stages = [stage.blocks for stage in model.stages]
    elif hasattr(model, "layers"):
        stages = [layer.blocks for layer in model.layers]
    else:
        stages = model.blocks if hasattr(model, "patch_embeds") else [model.blocks]
    return [block for stage in stages for block in stage]


def places(model: Any, grids: Sequence[Size]) -> list[Place]:
    """The places of all blocks, of which `grids` says the grid."""
    return [_place(model, block, grid) for block, grid in zip(blocks_of(model), grids, strict=True)]


def _place(model: Any, block: Any, grid: Size) -> Place:
    attention = block.attn
    if hasattr(block, "shift_size"):
        window, shift = tuple(block.window_size), tuple(block.shift_size)
        cosine = isinstance(attention, CosineAttention)
        whole = window == grid and shift == (0, 0)
        kind: Kind = ("whole",) if whole else ("window", window, shift)
        return Place(grid, kind, cut(grid, window, shift), cosine)
    if hasattr(attention, "ws"):
        window = (attention.ws, attention.ws)
        return Place(grid, ("window", window, (0, 0)), cut(grid, window, (0, 0)))
    if getattr(attention, "pool", None) is not None:
        return Place(grid, ("pool", 7))
    if getattr(attention, "sr", None) is not None:
        return Place(grid, ("keys", attention.sr.stride[0]))
    return Place(grid, ("whole",), prefix=getattr(model, "num_prefix_tokens", 0))


def cut(grid: Size, window: Size, shift: Size) -> list[list[int | None]]:
    """The tokens of each window of the shifted grid."""
    (height, width), (rows, columns) = grid, window
    windows = []
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            tokens: list[int | None] = []
            for row in range(top, top + rows):
                for column in range(left, left + columns):
                    there = row < height and column < width
                    at = (row + shift[0]) % height * width + (column + shift[1]) % width
                    tokens.append(at if there else None)
            windows.append(tokens)
    return windows


def run(
    model: nn.Module, images: Tensor, override: Callable[[int, Layer], Tensor] | None = None
) -> tuple[Tensor, list[Layer]]:
    """Logits and attention layers of timm's own forward pass."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True  # type: ignore[assignment]
        if isinstance(module, CosineAttention):
            module.forward = types.MethodType(_cosine_attention, module)  # type: ignore[method-assign]
    layers: list[Layer] = []

    def within(index: int, own: Layer) -> Tensor:
        return own.out if override is None else override(index, _flat(own)).reshape(own.out.shape)

    with dense_attention(layers, within):
        logits = model(images)
    return logits, [_flat(layer) for layer in layers]


def _flat(layer: Layer) -> Layer:
    """The tensors with one dimension for images and windows; Twins has two."""
    tensors = layer.q, layer.k, layer.v, layer.map, layer.out, layer.logits
    return Layer(*(x.flatten(0, 1) if x.dim() == 5 else x for x in tensors), layer.scale)


def _cosine_attention(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """timm's attention of Swin V2 with the same softmax, called as the others call theirs."""
    windows, tokens, width = x.shape
    bias = None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))
    qkv = F.linear(x, self.qkv.weight, bias).reshape(windows, tokens, 3, self.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q = F.normalize(q, dim=-1) * self.logit_scale.clamp(max=4.605170185988092).exp()
    table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
    own = table[self.relative_position_index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1)
    added = (16 * own.sigmoid()).unsqueeze(0)
    if mask is not None:
        added = (added + mask.unsqueeze(1)).repeat(windows // len(mask), 1, 1, 1)
    out = F.scaled_dot_product_attention(q, F.normalize(k, dim=-1), v, added, scale=1.0)
    return self.proj(out.transpose(1, 2).reshape(windows, tokens, width))  # type: ignore[no-any-return]


def on_grid(x: Tensor, place: Place) -> Tensor:
    """A projection or an output (B, H, N, D) by token of the grid."""
    if place.windows is None:
        return x[:, :, place.prefix :]
    by_image = x.unflatten(0, (-1, len(place.windows)))
    tokens = [
        (token, by_image[:, number, :, at])
        for number, window in enumerate(place.windows)
        for at, token in enumerate(window)
        if token is not None
    ]
    return torch.stack([tensor for _, tensor in sorted(tokens, key=lambda each: each[0])], 2)


def dense_logits(layer: Layer, place: Place, *, padded: bool) -> Tensor:
    """The logits (B, H, N, K) of all keys, minus infinity where a query does not see a key.

    With `padded` the keys of padded tokens are further columns, else they are left out.
    """
    if place.windows is None:
        return layer.logits[:, :, place.prefix :, place.prefix :]
    by_image = layer.logits.unflatten(0, (-1, len(place.windows)))
    count = place.grid[0] * place.grid[1]
    pads = sum(token is None for window in place.windows for token in window)
    rows: dict[int, Tensor] = {}
    pad = count
    for number, window in enumerate(place.windows):
        columns = []
        for token in window:
            columns.append(pad if token is None else token)
            pad += token is None
        for at, token in enumerate(window):
            if token is None:
                continue
            seen = by_image[:, number, :, at]
            row = torch.full((*seen.shape[:2], count + pads), -torch.inf, dtype=seen.dtype)
            rows[token] = row.index_copy(2, torch.tensor(columns), seen)
    found = torch.stack([rows[token] for token in range(count)], 2)
    return found if padded else found[..., :count]


def block_outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The tokens (B, N, C) after each block, with prefix tokens."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, out: Tensor) -> None:
        outputs.append(out.flatten(1, 2) if out.dim() == 4 else out)

    hooks = [block.register_forward_hook(keep) for block in blocks_of(model)]
    model(images)
    for hook in hooks:
        hook.remove()
    return outputs


def expected(
    method: str,
    pairs: Sequence[tuple[int, int]],
    teacher: tuple[nn.Module, list[Place]],
    student: tuple[nn.Module, list[Place]],
    images: Tensor,
) -> tuple[Tensor, Tensor]:
    """The student's logits and the sum of the losses of the pairs of layers."""
    (model_t, places_t), (model_s, places_s) = teacher, student
    with torch.no_grad():
        target, theirs = run(model_t, images)
        their_blocks = block_outputs(model_t, images)
    if method in COPIES:
        teacher_of = {s: t for t, s in pairs}

        def copying(index: int, own: Layer) -> Tensor:
            if index not in teacher_of:
                return own.out
            t = teacher_of[index]
            place_t, place_s = _shared(places_t[t], places_s[index])
            shared, ours = slice(place_t.prefix, None), slice(place_s.prefix, None)
            given = getattr(theirs[t], "logits" if method == "copy" else method[-1])[:, :, shared]
            given = given[..., shared] if method == "copy" else given
            return dense_copy(method, own, ours, given, heads_of(method, own))

        logits, _ = run(model_s, images, copying)
        return logits, logits.new_zeros(())
    logits, ours = run(model_s, images)
    models = (model_s, model_t), images, (logits, target)
    if not pairs:
        return logits, dense_loss(method, Shown(*models))
    our_blocks, losses = block_outputs(model_s, images), []
    for t, s in pairs:
        place_t, place_s = _shared(places_t[t], places_s[s])
        layers = (ours[s], place_s, our_blocks[s]), (theirs[t], place_t, their_blocks[t])
        losses.append(dense_loss(method, Shown(*models, layers, heads_of(method, ours[s]))))
    return logits, torch.stack(losses).sum()


def heads_of(method: str, layer: Layer) -> dict[int, list[int]]:
    """All heads, one by one, of a method that compares heads; none of one that joins them."""
    count = 0 if find_method(method).joins_heads else layer.logits.shape[1]
    return {head: [head] for head in range(count)}


@dataclass(frozen=True)
class Shown:
    """The two models, or a layer of each, as a dense loss sees them (`Sides`): the student's first."""

    models: tuple[nn.Module, nn.Module]
    images: Tensor
    class_logits: Both
    layers: tuple[tuple[Layer, Place, Tensor], ...] = ()
    heads: Mapping[int, list[int]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def part(self, name: str) -> Both:
        """Queries, keys, values or outputs by token, or keys and values of a smaller grid."""
        mine, theirs = (on_grid(getattr(layer, name), place) for layer, place, _ in self.layers)
        return mine, theirs

    def logits(self) -> Both:
        """Those of all keys where both have the same padding; else a key that only one has is left out."""
        padded = self.layers[0][1].kind == self.layers[1][1].kind
        mine, theirs = (dense_logits(layer, place, padded=padded) for layer, place, _ in self.layers)
        return mine, theirs

    def block(self) -> Both:
        mine, theirs = (tokens[:, place.prefix :] for _, place, tokens in self.layers)
        return mine, theirs

    def features(self) -> Both:
        mine, theirs = (_pooled(model, self.images) for model in self.models)
        return mine, theirs.detach()

    def classes(self) -> Both:
        return self.class_logits

    def project(self, x: Tensor) -> Tensor:
        return x


def _shared(teacher: Place, student: Place) -> tuple[Place, Place]:
    """Both places without prefix tokens to leave out, where both have them."""
    if teacher.prefix != student.prefix:
        return teacher, student
    return replace(teacher, prefix=0), replace(student, prefix=0)


def _pooled(model: Any, images: Tensor) -> Tensor:
    feature: Tensor = model.forward_head(model.forward_features(images), pre_logits=True)
    return feature
