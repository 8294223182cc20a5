"""Hosts: the modules that replace the attention of a block.

A host shares the parameters, buffers and submodules of the timm attention that it replaces, under the same
names, so state dicts do not change. It projects tokens to queries, keys and values (with the layer's own norms
and rotary embedding), calls an *operator*, and projects its output. With the operator `softmax` it computes
the same as timm, bit for bit.

A native host of a layer with windows or reduced keys computes what timm's layer does: its operator is a softmax, and
gets the projections of each window. A host that was created with an operator gives it the projections of all tokens.
Hosts of one family alone are in the family's file (`families/`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from .attention.base import QKV, AttentionOperator, Geometry, Heads, Operator
from .attention.softmax import Softmax
from .errors import UnsupportedModelError
from .map_structure import MapStructure, Size, Windows

Given = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""The input of a layer: tokens (B, N, C), rotary embedding, shared relative position bias, mask (B, 1, 1 or N, N)."""


def _given(
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    shared_rel_pos_bias: Tensor | None = None,
) -> Given:
    if is_causal:
        raise UnsupportedModelError("a causal mask (is_causal) is not supported by a hosted attention layer")
    return x, rope, shared_rel_pos_bias, attn_mask


BIAS = (
    "relative_position_bias_table",
    "relative_position_index",
    "cpb_mlp",
    "relative_coords_table",
    "rel_pos",
    "meta_mlp",
    "relative_coordinates_log",
    "attention_biases",
    "attention_bias_idxs",
    "rel_pos_h",
    "rel_pos_w",
)
"""The parts of a layer from which a relative position bias is computed."""


def has_bias(attention: nn.Module) -> bool:
    """Return whether a layer adds a relative position bias of its own to its logits."""
    parts = {**attention._parameters, **attention._modules}
    return any(parts.get(name) is not None for name in BIAS)


def wrong_bias(own: Size, grid: Size) -> UnsupportedModelError:
    """Return the error of a converted layer whose bias is of another grid than its tokens."""
    return UnsupportedModelError(
        f"the relative position bias of this layer is of a grid of {own[0]}x{own[1]} tokens, and the images have "
        f"{grid[0]}x{grid[1]}: resize the model (graftvit.models.conversion.resize), or give up bias"
    )


REDUCTION = ("sr", "norm", "pool", "act")
"""The parts of PVT's layers that make keys fewer."""


class AttentionHost(nn.Module):
    """A timm attention layer with any operator; `original` is the layer that it replaces.

    This class is the host of layers whose softmax is over all tokens, as in a plain vision transformer.
    """

    permanent = False
    """Whether a saved model keeps the host instead of the original layer."""
    geometry: Geometry | None = None
    """The tokens of the sequence, for operators that need the grid."""
    gets_grid = False
    """Whether the layer knows the grid of its input: the block passes it, or the input has its shape."""
    after_heads: tuple[str, ...] = ("norm", "gate", "proj", "proj_drop")
    """The children through which the output of the heads goes."""
    counted_as = "num_heads"
    """The attribute of the layer with the number of its heads."""
    shows_tokens = True
    """The layer's input is (B, N, C) or (B, height, width, C), with the tokens in the order of the heads' output."""
    cuts_rows = True
    """A conversion may drop the rows of fused projections that an operator does not need, which are equal parts."""
    reduction: Sequence[str] = REDUCTION
    """The parts of a layer that make its keys fewer, which a converted layer has not."""
    has_cosine_logits = False
    """Whether queries and keys have unit length before the learned scale, as in Swin V2."""
    _block: tuple[Any, ...] = ()
    """timm's block of a native host; in a tuple, so that it is not registered."""

    def __init__(self, original: Any, operator: Operator | None = None) -> None:
        super().__init__()
        self._parameters = original._parameters
        self._buffers = original._buffers
        self._non_persistent_buffers_set = original._non_persistent_buffers_set
        self._modules = {name: child for name, child in original._modules.items() if name != "operator"}
        self.training = original.training
        self._original = (original,)  # in a tuple, so that it is not registered a second time
        self.operator: Operator = operator or Softmax()
        self.num_heads = int(getattr(original, self.counted_as))
        self.scale: float = getattr(original, "scale", 1.0)  # Swin V2 scales its queries itself
        self.num_prefix_tokens: int = getattr(original, "num_prefix_tokens", 0)
        self.rotate_half: bool = getattr(original, "rotate_half", False)
        self.kv_groups: int = getattr(original, "num_kv_groups", 1)
        self.separate_bias: bool = getattr(original, "qkv_bias_separate", False)
        self.has_bias = has_bias(original)

    @property
    def drop_rate(self) -> float:
        """The part of its map that the layer drops in training."""
        return float(getattr(self._modules.get("attn_drop"), "p", 0.0))

    @property
    def original(self) -> Any:
        return self._original[0]

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        shared_rel_pos_bias: Tensor | None = None,
    ) -> Tensor:
        """Attend over tokens (B, N, C); `attn_mask` (B, 1, 1 or N, N) is added to the logits, and shuts out padding."""
        given = _given(x, rope, attn_mask, is_causal, shared_rel_pos_bias)
        return self.merge(self.attend(self._masked(*given)), x)

    def attend(self, heads: Heads) -> Tensor:
        """Return the output (B, H, N, D) before the heads are joined."""
        return self.operator(heads)

    def with_local(self, out_BHND: Tensor, heads: Heads) -> Tensor:
        """Return the output of the heads with what timm's layer adds to it, such as a convolution of the values."""
        return out_BHND

    def attended(self, heads: Heads) -> Heads:
        """Return the projections on which timm's layer takes its softmax, such as those of each window."""
        return heads

    def structure(self, grid: tuple[int, int]) -> MapStructure:
        """Return which keys each query of timm's layer sees on a grid."""
        return MapStructure()

    def native_pairs(self, geometry: Geometry) -> tuple[int, int]:
        """Return the numbers of queries and of keys of each query in timm's layer, for its cost."""
        return geometry.num_tokens, geometry.num_tokens

    def all_pairs(self, geometry: Geometry) -> int:
        """Return the number of pairs of a query and a key in all heads of timm's layer."""
        queries, keys = self.native_pairs(geometry)
        return queries * keys * self.num_heads

    def has_whole_map(self, geometry: Geometry) -> bool:
        """Return whether `heads_of` has all of the map of timm's layer: of all pairs of tokens, with its bias."""
        return True

    def fit_bias(self, grid: Size) -> None:
        """Prepare the bias of a converted layer for all pairs of tokens of a grid."""

    def prepare(self, bare: nn.Module) -> None:
        """Change a copy of timm's layer, which shares its parts, for a conversion to attention over all tokens."""

    def heads_of(self, *inputs: Any, **keywords: Any) -> Heads:
        """Return the projections for the arguments with which timm's block calls the layer."""
        return self._masked(*_given(*inputs, **keywords))

    def _masked(self, x: Tensor, rope: Tensor | None, shared: Tensor | None, mask: Tensor | None) -> Heads:
        """Return the projections with a mask as timm's layer adds it, or as the mask of keys of an operator."""
        heads = self.project(x, rope, shared)
        if mask is None:
            return heads
        if not self.permanent:
            return heads.each(lambda part: part, mask if heads.bias is None else heads.bias + mask)
        traits = cast(AttentionOperator, self.operator).traits
        if traits.needs_grid or not traits.key_mask:
            raise UnsupportedModelError(
                f"{type(self.operator).__name__} does not take padded tokens, as batches of images of several sizes "
                "have: give images of one size as a tensor (B, C, H, W), or convert to linear or softmax"
            )
        heads.key_mask = (mask > torch.finfo(mask.dtype).min / 2).any(-2)[:, 0]
        return heads

    def project(
        self, x: Tensor, rope: Tensor | None = None, shared_rel_pos_bias: Tensor | None = None
    ) -> Heads:
        """Compute the projections that the operator needs, and no others."""
        needs = [part for part in QKV if part in self.operator.needs]
        projected = dict(zip(needs, self._projections(x, needs), strict=True))
        heads = {part: self._position(part, tensor, rope) for part, tensor in projected.items()}
        dropout: Any = self.attn_drop
        return Heads(
            q=heads.get("q"),
            k=heads.get("k"),
            v=heads.get("v"),
            bias=self._bias(shared_rel_pos_bias) if "q" in heads or "k" in heads else None,
            scale=self.scale,
            dropout=dropout.p if self.training else 0.0,
            geometry=self.geometry,
        )

    def merge(self, out_BHND: Tensor, x: Tensor) -> Tensor:
        """Join the heads and project them back, with the layer's norm and gate if it has them."""
        out = out_BHND.transpose(1, 2).flatten(2)
        out = self._child("norm", out)
        gate: Any = self._modules.get("gate")
        if gate is not None:
            out = out * gate(x).sigmoid()
        return self._child("proj_drop", self._child("proj", out))

    def _projections(self, x: Tensor, needs: list[str]) -> list[Tensor]:
        """Return (B, H, N, D) for each part in `needs`, before norms and rotary embedding."""
        fused: Any = self._modules.get("qkv")
        if fused is None:
            return [self._separate(x, part) for part in needs]
        if len(needs) == len(QKV) or type(fused) is not nn.Linear:
            parts = dict(zip(QKV, self._split(self._fused(x, slice(None)), 3), strict=True))
            return [parts[part] for part in needs]
        if needs == ["q", "v"]:
            return [*self._rows(x, 0, 1), *self._rows(x, 2, 3)]
        return self._rows(x, QKV.index(needs[0]), QKV.index(needs[-1]) + 1)

    def _separate(self, x: Tensor, part: str) -> Tensor:
        heads = self.num_heads if part == "q" else self.num_heads // self.kv_groups
        projected = self._child(f"{part}_proj", x)
        return projected.reshape(*x.shape[:2], heads, -1).transpose(1, 2)

    def _rows(self, x: Tensor, start: int, stop: int) -> list[Tensor]:
        """Compute parts `start` to `stop` of q, k and v from only those rows of the fused weight."""
        fused: Any = self.qkv
        width = fused.out_features // 3
        return self._split(self._fused(x, slice(start * width, stop * width)), stop - start)

    def _fused(self, x: Tensor, rows: slice) -> Tensor:
        fused: Any = self.qkv
        if self._parameters.get("q_bias") is not None:  # BEiT and EVA have biases of q and v, and zeros for k
            bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))[rows]  # type: ignore[arg-type]
            if self.separate_bias:
                return F.linear(x, fused.weight[rows]) + bias
            return F.linear(x, fused.weight[rows], bias)
        if rows == slice(None):
            return fused(x)
        return F.linear(x, fused.weight[rows], None if fused.bias is None else fused.bias[rows])

    def _split(self, x: Tensor, parts: int) -> list[Tensor]:
        return list(x.reshape(*x.shape[:2], parts, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0))

    def _position(self, part: str, x_BHND: Tensor, rope: Tensor | None) -> Tensor:
        """Apply per-head norm and rotary embedding to q and k; repeat grouped keys and values for their heads."""
        dtype = x_BHND.dtype
        if part != "v":
            x_BHND = self._child(f"{part}_norm", x_BHND)
            if rope is not None:
                prefix, patches = x_BHND.split(
                    [self.num_prefix_tokens, x_BHND.shape[2] - self.num_prefix_tokens], dim=2
                )
                rotated = apply_rot_embed_cat(patches, rope, half=self.rotate_half)
                x_BHND = torch.cat([prefix, rotated], dim=2).type(dtype)
        if part != "q" and self.kv_groups > 1:
            x_BHND = x_BHND.repeat_interleave(self.kv_groups, dim=1)
        return x_BHND

    def _bias(self, shared: Tensor | None) -> Tensor | None:
        if self._parameters.get("relative_position_bias_table") is None:
            return shared
        own: Tensor = self.original._get_rel_pos_bias()
        return own if shared is None else own + shared

    def _child(self, name: str, x: Tensor) -> Tensor:
        child: Any = self._modules.get(name)
        return x if child is None else child(x)


class GridHost(AttentionHost):
    """An attention layer of a pyramid; its input is (B, N, C) with the grid, or (B, height, width, C).

    Tokens before those of the grid are prefix tokens. This class is the host of layers with one projection `qkv` whose
    softmax is over all tokens.
    """

    gets_grid = True
    after_heads = ("proj", "proj_drop")  # `norm` is that of reduced keys
    kept: Sequence[str] = QKV
    """The parts of q, k and v that the projections still compute: a conversion drops the others."""
    reads: Sequence[str] = ()
    """The parts that the layer itself reads, beside its operator."""

    def __init__(self, original: nn.Module, operator: Operator | None = None) -> None:
        super().__init__(original, operator)
        self.is_native = operator is None

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:  # type: ignore[override]
        """Attend over all tokens of the grid."""
        heads = self.project(x, size)
        return self.merge(self.with_local(self.attend(heads), heads), x)

    def attend(self, heads: Heads) -> Tensor:
        if not self.is_native:
            return self.operator(heads)
        attended = self.attended(heads)
        return attended.joined(self.operator(attended))

    def has_whole_map(self, geometry: Geometry) -> bool:
        tokens = geometry.num_tokens
        return self.native_pairs(geometry) == (tokens, tokens) and not self.has_bias

    def project(self, x: Tensor, size: Size | None = None) -> Heads:  # type: ignore[override]
        """Compute the projections that the operator needs, and no others."""
        grid = (x.shape[1], x.shape[2]) if size is None else (size[0], size[1])
        x_BNC = x.flatten(1, 2) if size is None else x
        parts = self.parts(x_BNC, grid)
        needs = {*self.operator.needs, *self.reads}
        heads = {part: self._by_head(tensor) for part, tensor in parts.items() if part in needs}
        q = self.normed("q", heads.get("q"))
        return Heads(
            q=q,
            k=self.normed("k", heads.get("k")),
            v=heads.get("v"),
            bias=None if self.is_native else self.grid_bias(grid, q),
            scale=self.scale,
            dropout=self.drop_rate if self.training else 0.0,
            geometry=Geometry(x_BNC.shape[1] - grid[0] * grid[1], grid),
        )

    def heads_of(self, *inputs: Any, **keywords: Any) -> Heads:
        return self.project(*inputs, **keywords)

    def parts(self, x_BNC: Tensor, grid: Size) -> dict[str, Tensor]:
        """Return the parts `kept` of q, k and v, (B, N, H·D); native keys and values may have fewer tokens."""
        return dict(zip(self.kept, self._project(x_BNC).chunk(len(self.kept), -1), strict=True))

    def normed(self, part: str, x_BHND: Tensor | None) -> Tensor | None:
        """Return queries or keys after the layer's own norm."""
        return x_BHND

    def grid_bias(self, grid: Size, q_BHND: Tensor | None) -> Tensor | None:
        """Return the bias of all pairs of tokens, (1 or B, H, N, N), of a converted layer that has one."""
        return None

    def merge(self, out_BHND: Tensor, x: Tensor) -> Tensor:
        """Join the heads and project them back; return the shape of the input."""
        out = self._child("proj_drop", self._child("proj", out_BHND.transpose(1, 2).flatten(2)))
        return out.reshape(x.shape)

    def set_input_size(
        self, feat_size: Size, window_size: Size, always_partition: bool | None = None
    ) -> None:
        """Change the grid as timm does; called by timm on blocks of Swin, which a native host replaced."""
        self._block[0].set_input_size(feat_size, window_size, always_partition)

    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers that are not in the state dict; called by timm."""
        if hasattr(self.original, "init_non_persistent_buffers"):
            self.original.init_non_persistent_buffers()

    def _project(self, x_BNC: Tensor) -> Tensor:
        return self._child("qkv", x_BNC)

    def _by_head(self, x_BNC: Tensor) -> Tensor:
        x_BNHD: Tensor = x_BNC.unflatten(2, (self.num_heads, -1))
        return x_BNHD.transpose(1, 2)


class ReducedHost(GridHost):
    """PVT, PVTv2 and the sub-sampled layers of Twins: natively, keys and values are of a smaller grid."""

    def parts(self, x_BNC: Tensor, grid: Size) -> dict[str, Tensor]:
        rest = [part for part in self.kept if part != "q"]
        needs = self.operator.needs
        found = {"q": self._child("q", x_BNC)} if "q" in self.kept and "q" in needs else {}
        if any(part in needs for part in rest):
            source = x_BNC if self._modules.get("sr") is None else self._reduced(x_BNC, grid)
            found |= zip(rest, self._child("kv", source).chunk(len(rest), -1), strict=True)
        return found

    def structure(self, grid: Size) -> MapStructure:
        pool, reduction = self._modules.get("pool"), self._modules.get("sr")
        if isinstance(pool, nn.AdaptiveAvgPool2d):
            side = int(pool.output_size)  # type: ignore[arg-type]
            return MapStructure(reduction=("pool", (side, side)))
        if isinstance(reduction, nn.Conv2d):
            rows, columns = reduction.stride
            return MapStructure(reduction=("stride", (int(rows), int(columns))))
        return MapStructure()

    def native_pairs(self, geometry: Geometry) -> tuple[int, int]:
        height, width = geometry.grid
        reduction = self.structure(geometry.grid).reduction
        if reduction is None:
            return geometry.num_tokens, geometry.num_tokens
        kind, (rows, columns) = reduction
        keys = rows * columns if kind == "pool" else (height // rows) * (width // columns)
        return geometry.num_tokens, keys

    def _reduced(self, x_BNC: Tensor, grid: Size) -> Tensor:
        image = x_BNC.transpose(1, 2).unflatten(2, grid)
        small = self._child("sr", self._child("pool", image)).flatten(2).transpose(1, 2)
        return self._child("act", self._child("norm", small))


class WindowHost(GridHost):
    """The local layers of Twins: natively, softmax within windows."""

    def windows(self, grid: Size) -> Windows:
        """Return the native windows of a grid."""
        return Windows(grid, (self.original.ws, self.original.ws))

    def window_bias(self, windows: Windows, like: Tensor) -> Tensor | None:
        """Return what is added to the native logits of each window, (1 or W, H, M, M)."""
        return None

    def attended(self, heads: Heads) -> Heads:
        windows = self.windows(heads.tokens().grid)
        pads = self._zero() if windows.is_padded else heads  # not read without padding
        q, k, v = (
            None if x is None else windows.cut(x, pad)
            for x, pad in ((heads.q, pads.q), (heads.k, pads.k), (heads.v, pads.v))
        )
        known = q if q is not None else k
        bias = None if known is None else self.window_bias(windows, known)
        if bias is not None and bias.shape[0] > 1:  # one for each window, the same for every image
            bias = bias.expand(len(heads.known), *bias.shape).flatten(0, 1)
        return Heads(q, k, v, bias, heads.scale, heads.dropout, heads.geometry, windows=windows)

    def structure(self, grid: Size) -> MapStructure:
        windows = self.windows(grid)
        if windows.window == grid and not any(windows.shift):
            return MapStructure()
        return MapStructure(windows.window, windows.shift, windows.spread)

    def native_pairs(self, geometry: Geometry) -> tuple[int, int]:
        windows = self.windows(geometry.grid)
        return windows.padded[0] * windows.padded[1], windows.window[0] * windows.window[1]

    def _zero(self) -> Heads:
        """Return the projections of a token of zeros, with which timm pads the grid."""
        fused: Any = self.qkv
        weight: Tensor = fused.weight
        return self.project(weight.new_zeros(1, 1, weight.shape[1]), (1, 1))
