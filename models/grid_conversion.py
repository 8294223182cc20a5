"""Convert the layers of a pyramid: drop what an operator does not need, and give it all tokens of the stage."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

from timm.models.pvt_v2 import Attention as PVTAttention
from timm.models.swin_transformer import WindowAttention as WindowAttentionV1
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from timm.models.twins import GlobalSubSampleAttn, LocallyGroupedAttn
from torch import Tensor, nn

from .attention.base import QKV, AttentionOperator
from .converted import ConvertedAttention, TokenGrid
from .dropped_parts import FUSED, dropped_names, kept_rows
from .errors import UnsupportedModelError
from .grid_hosts import GridHost, ReducedHost, SwinHost, SwinV2Host, WindowHost
from .layer_plan import Choice
from .shifted_windows import Size


class ConvertedGrid(GridHost, ConvertedAttention):
    """A converted layer of a pyramid; `original` is timm's layer without the parts that were dropped."""

    def __init__(
        self,
        original: nn.Module,
        operator: AttentionOperator,
        choice: Choice,
        tokens: TokenGrid,
        kept: Sequence[str],
    ) -> None:
        ConvertedAttention.__init__(self, original, operator, choice, tokens)
        self.is_native = False
        self.kept = tuple(kept)
        self.has_bias = has_bias(original)
        self.gave_up: tuple[str, ...] = ()
        """The parts of the layer that the conversion was told to give up: of `without`."""

    def set_input_size(
        self, feat_size: Size, window_size: Size, always_partition: bool | None = None
    ) -> None:
        """Resample the relative position bias, if there is one, for another grid; windows mean nothing here."""
        if self.has_bias:
            layer: Any = self.original
            layer.set_window_size(tuple(feat_size))


class ConvertedReduced(ReducedHost, ConvertedGrid):
    """A converted layer of PVTv2, or a sub-sampled one of Twins, without the reduction."""


class ConvertedLocal(WindowHost, ConvertedGrid):
    """A converted local layer of Twins, without windows."""


class ConvertedSwin(SwinHost, ConvertedGrid):
    """A converted layer of Swin, without windows and shift; its bias, if it is kept, is of the whole grid."""

    @property
    def window_size(self) -> Size:
        """The grid of the bias: code that resamples tables by timm's names reads it here."""
        layer: Any = self.original
        height, width = layer.window_size
        return height, width

    def grid_bias(self, grid: Size) -> Tensor | None:
        if not self.has_bias:
            return None
        height, width = self.window_size
        if (height, width) != tuple(grid):
            raise UnsupportedModelError(
                f"the relative position bias of this layer is of a grid of {height}x{width} tokens, and the images "
                f"have {grid[0]}x{grid[1]}: resize the model (graftvit.models.conversion.resize), or give up bias"
            )
        return self.relative_bias()


class ConvertedSwinV2(SwinV2Host, ConvertedSwin):
    """A converted layer of Swin V2: still cosine attention with its learned scale."""


CONVERTED: dict[type[nn.Module], type[ConvertedGrid]] = {
    PVTAttention: ConvertedReduced,
    GlobalSubSampleAttn: ConvertedReduced,
    LocallyGroupedAttn: ConvertedLocal,
    WindowAttentionV1: ConvertedSwin,
    WindowAttentionV2: ConvertedSwinV2,
}


def convert_layer(
    attention: nn.Module,
    operator: AttentionOperator,
    choice: Choice,
    tokens: TokenGrid,
    without: Collection[str] = (),
) -> ConvertedGrid:
    """Return the converted layer for timm's `attention`, which is not changed.

    Dropped are reductions, windows and shift, the rows of projections that the operator does not need, and a relative
    position bias that it does not take.
    """
    keep_bias = has_bias(attention) and operator.traits.bias
    kept = tuple(part for part in QKV if part in operator.needs)
    bare = _without_parts(attention, kept, keep_bias)
    if keep_bias:
        bare.set_window_size(tuple(tokens.geometry.grid))
    kind = next(converted for layer, converted in CONVERTED.items() if isinstance(attention, layer))
    layer = kind(bare, operator, choice, tokens, kept)
    if has_bias(attention) and not keep_bias:
        layer.gave_up = ("bias",)
    return layer


def has_bias(attention: nn.Module) -> bool:
    """Return whether a layer adds a relative position bias to its logits."""
    return "relative_position_bias_table" in attention._parameters or "cpb_mlp" in attention._modules


def _without_parts(attention: nn.Module, kept: Sequence[str], keep_bias: bool) -> Any:
    """Return a copy of timm's layer that shares the parts it keeps and lacks the others."""
    bare = copy.copy(attention)
    for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        bare.__dict__[name] = copy.copy(attention.__dict__[name])
    for name in dropped_names(kept, keep_bias):
        for parts in (bare._modules, bare._parameters, bare._buffers):
            parts.pop(name, None)
    for name in FUSED:
        fused = bare._modules.get(name)
        if fused is not None:
            bare._modules[name] = _rows(fused, name, kept)
    return bare


def _rows(fused: Any, parts: str, kept: Sequence[str]) -> nn.Module | None:
    """Return a fused projection with the kept ones of its equal parts; None without any."""
    if set(parts) <= set(kept):
        return fused  # type: ignore[no-any-return]
    if not set(parts) & set(kept):
        return None
    less = copy.copy(fused)
    less._parameters = {name: _part(tensor, parts, kept) for name, tensor in fused._parameters.items()}
    less.out_features = less.weight.shape[0]
    return less  # type: ignore[no-any-return]


def _part(tensor: nn.Parameter | None, parts: str, kept: Sequence[str]) -> nn.Parameter | None:
    if tensor is None:
        return None
    return nn.Parameter(kept_rows(tensor.detach(), parts, kept), requires_grad=tensor.requires_grad)
