"""Hosts for the attention of pyramids: each works on all tokens of its stage's grid.

A native host computes what timm's layer does, with reduced keys, windows, shift, bias and scale: its operator is a
softmax, and gets the projections of each window. A host that was created with an operator gives it the projections of
all tokens of the grid.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.pvt_v2 import Attention as PVTAttention
from timm.models.swin_transformer import WindowAttention as WindowAttentionV1
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from timm.models.twins import GlobalSubSampleAttn, LocallyGroupedAttn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .attention.base import QKV, Geometry, Heads, Operator
from .converted import ConvertedAttention
from .errors import JsonDict
from .families import Block, NoAttention, Site, check_supported, is_pyramid, sites
from .host import AttentionHost, host_attention, release_attention
from .map_structure import MapStructure, Size, Windows, whole_grid

LARGEST_LOG_SCALE = math.log(1.0 / 0.01)
"""The limit of the logarithm of Swin V2's learned scale."""


class GridHost(AttentionHost, ABC):
    """An attention layer of a pyramid; its input is (B, N, C) with the grid, or (B, height, width, C).

    Tokens before those of the grid are prefix tokens.
    """

    after_heads = ("proj", "proj_drop")  # `norm` is that of reduced keys
    kept: Sequence[str] = QKV
    """The parts of q, k and v that the projections still compute: a conversion drops the others."""
    _block: tuple[nn.Module, ...] = ()
    """timm's block of a native host that replaced it; in a tuple, so that it is not registered."""

    def __init__(self, original: nn.Module, operator: Operator | None = None) -> None:
        super().__init__(original, operator)
        self.is_native = operator is None

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:  # type: ignore[override]
        """Attend over all tokens of the grid."""
        return self.merge(self.attend(self.project(x, size)), x)

    def attend(self, heads: Heads) -> Tensor:
        if not self.is_native:
            return self.operator(heads)
        attended = self.attended(heads)
        return attended.joined(self.operator(attended))

    @abstractmethod
    def native_pairs(self, geometry: Geometry) -> tuple[int, int]:
        """Return the numbers of queries and of keys of each query in timm's layer, for its cost."""

    def project(self, x: Tensor, size: Size | None = None) -> Heads:  # type: ignore[override]
        """Compute the projections that the operator needs, and no others."""
        grid = (x.shape[1], x.shape[2]) if size is None else (size[0], size[1])
        x_BNC = x.flatten(1, 2) if size is None else x
        parts = self.parts(x_BNC, grid)
        heads = {part: self._by_head(tensor) for part, tensor in parts.items() if part in self.operator.needs}
        dropout: Any = self.attn_drop
        return Heads(
            q=self.normed("q", heads.get("q")),
            k=self.normed("k", heads.get("k")),
            v=heads.get("v"),
            bias=None if self.is_native else self.grid_bias(grid),
            scale=self.scale,
            dropout=dropout.p if self.training else 0.0,
            geometry=Geometry(x_BNC.shape[1] - grid[0] * grid[1], grid),
        )

    def heads_of(self, *inputs: Any, **keywords: Any) -> Heads:
        return self.project(*inputs, **keywords)

    @abstractmethod
    def parts(self, x_BNC: Tensor, grid: Size) -> dict[str, Tensor]:
        """Return the parts `kept` of q, k and v, (B, N, H·D); native keys and values may have fewer tokens."""

    def normed(self, part: str, x_BHND: Tensor | None) -> Tensor | None:
        """Return queries or keys after the layer's own norm."""
        return x_BHND

    def grid_bias(self, grid: Size) -> Tensor | None:
        """Return the relative position bias of all pairs of tokens, (1, H, N, N), for a converted layer that has it."""
        return None

    def merge(self, out_BHND: Tensor, x: Tensor) -> Tensor:
        """Join the heads and project them back; return the shape of the input."""
        out = self._child("proj_drop", self._child("proj", out_BHND.transpose(1, 2).flatten(2)))
        return out.reshape(x.shape)

    def set_input_size(
        self, feat_size: Size, window_size: Size, always_partition: bool | None = None
    ) -> None:
        """Change the grid as timm does; called by timm on blocks of Swin, which a native host replaced."""
        block: Any = self._block[0]
        block.set_input_size(feat_size, window_size, always_partition)

    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers that are not in the state dict; called by timm."""
        layer: Any = self.original
        if hasattr(layer, "init_non_persistent_buffers"):
            layer.init_non_persistent_buffers()

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
        layer: Any = self.original
        return Windows(grid, (layer.ws, layer.ws))

    def window_bias(self, windows: Windows, like: Tensor) -> Tensor | None:
        """Return what is added to the native logits of each window, (1 or W, H, M, M)."""
        return None

    def parts(self, x_BNC: Tensor, grid: Size) -> dict[str, Tensor]:
        return dict(zip(self.kept, self._project(x_BNC).chunk(len(self.kept), -1), strict=True))

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
        return MapStructure(windows.window, windows.shift)

    def native_pairs(self, geometry: Geometry) -> tuple[int, int]:
        windows = self.windows(geometry.grid)
        return windows.padded[0] * windows.padded[1], windows.window[0] * windows.window[1]

    def _project(self, x_BNC: Tensor) -> Tensor:
        return self._child("qkv", x_BNC)

    def _zero(self) -> Heads:
        """Return the projections of a token of zeros, with which timm pads the grid."""
        fused: Any = self.qkv
        weight: Tensor = fused.weight
        return self.project(weight.new_zeros(1, 1, weight.shape[1]), (1, 1))


class SwinHost(WindowHost):
    """Swin: natively, softmax within windows of the shifted grid, with a relative position bias."""

    def windows(self, grid: Size) -> Windows:
        block: Any = self._block[0]
        return Windows(grid, tuple(block.window_size), tuple(block.shift_size))

    def window_bias(self, windows: Windows, like: Tensor) -> Tensor:
        bias = self.relative_bias()
        mask = self._shift_mask(windows, like)
        return bias.to(like.dtype) if mask is None else (bias + mask.unsqueeze(1)).to(like.dtype)

    def relative_bias(self) -> Tensor:
        """Return the bias of all pairs of tokens of the window that the layer is set to, (1, H, M, M)."""
        layer: Any = self.original
        bias: Tensor = layer._get_rel_pos_bias()
        return bias

    def _shift_mask(self, windows: Windows, like: Tensor) -> Tensor | None:
        """Return -100 between tokens of a window that are no neighbors in the grid, (W, M, M); None without a shift."""
        block: Any = self._block[0]
        if block.dynamic_mask:
            mask: Tensor | None = block.get_attn_mask(like.new_empty(1, *windows.padded, 1))
            return mask
        fixed: Tensor | None = block.attn_mask
        return fixed


class SwinV2Host(SwinHost):
    """Swin V2: cosine attention with a learned scale, and a bias computed from the distance of two tokens."""

    has_cosine_logits = True

    def normed(self, part: str, x_BHND: Tensor | None) -> Tensor | None:
        if x_BHND is None:
            return None
        x_BHND = F.normalize(x_BHND, dim=-1)
        if part == "k":
            return x_BHND
        scale: Any = self.logit_scale
        return x_BHND * torch.clamp(scale, max=LARGEST_LOG_SCALE).exp()

    def relative_bias(self) -> Tensor:
        layer: Any = self.original
        tokens = layer.window_size[0] * layer.window_size[1]
        table = layer.cpb_mlp(layer.relative_coords_table).view(-1, self.num_heads)
        bias = table[layer.relative_position_index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1)
        return 16 * torch.sigmoid(bias).unsqueeze(0)

    @property
    def has_separate_biases(self) -> bool:
        """Whether the biases of q and v are parameters of the layer, not of its projection."""
        return bool(self._separate_biases())

    def _separate_biases(self) -> list[Tensor]:
        biases = [getattr(self, f"{part}_bias", None) for part in self.kept]  # parameters, and a buffer for k
        return [bias for bias in biases if bias is not None]

    def _project(self, x_BNC: Tensor) -> Tensor:
        biases = self._separate_biases()
        if not biases:
            return self._child("qkv", x_BNC)
        fused: Any = self.qkv
        bias = torch.cat(biases)
        if self.separate_bias:
            return F.linear(x_BNC, fused.weight) + bias
        return F.linear(x_BNC, fused.weight, bias)


# Put hosts in place of the attention layers of any supported model, and take them out again.

HOSTS: dict[type[nn.Module], type[GridHost]] = {
    PVTAttention: ReducedHost,
    GlobalSubSampleAttn: ReducedHost,
    LocallyGroupedAttn: WindowHost,
    WindowAttentionV1: SwinHost,
    WindowAttentionV2: SwinV2Host,
}


def host_layers(model: nn.Module) -> dict[int, AttentionHost]:
    """Replace every attention layer of a model of any family by a native host; layers that have a host keep it.

    Return the hosts by number of their block: a block may have no attention.

    Raises UnsupportedModelError: the model is not supported.
    """
    if not is_pyramid(model):
        return dict(enumerate(host_attention(model)))
    check_supported(model, pyramids=True)
    return {site.index: host_layer(model, site) for site in sites(model) if site.num_heads}


def host_layer(model: nn.Module, site: Site) -> AttentionHost:
    """Replace the attention layer of one site of a pyramid by a native host; a layer that has a host keeps it."""
    block = site.block(model)
    if isinstance(block.attn, AttentionHost):
        return block.attn
    host = native_host(block)
    put_attention(model, site, host)
    return host


def native_host(block: Block) -> GridHost:
    """Return a host for the attention layer of a pyramid's block, without putting it there."""
    kind = next(host for layer, host in HOSTS.items() if isinstance(block.attn, layer))
    host = kind(block.attn)
    host._block = (block,)
    return host


@dataclass(frozen=True)
class Call:
    """The arguments with which timm's block calls its attention layer."""

    inputs: tuple[Any, ...]
    keywords: JsonDict


def watch_layer(model: nn.Module, site: Site, see: Callable[[AttentionHost, Call], None]) -> RemovableHandle:
    """Call `see` with a native host of a layer and the arguments of each call, before the layer runs.

    A layer of a pyramid is replaced by its host, because timm's layer may see only windows.
    """
    layer = host_layer(model, site) if is_pyramid(model) else site.block(model).attn

    def hook(module: nn.Module, inputs: tuple[Any, ...], keywords: JsonDict) -> None:
        # A host is made for each call, in the mode that the layer is in.
        host = module if isinstance(module, AttentionHost) else AttentionHost(module)
        see(host, Call(inputs, keywords))

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


def map_structure(model: nn.Module, site: Site) -> MapStructure:
    """Return which keys each query of a layer sees; a converted layer's operator sees all tokens.

    Raises UnsupportedModelError: the model has no image size.
    """
    layer = site.block(model).attn
    if isinstance(layer, ConvertedAttention) or not is_pyramid(model):
        return MapStructure()
    return _as_host(layer, site.block(model)).structure(site.shape.geometry.grid)


def has_cosine_logits(model: nn.Module, site: Site) -> bool:
    """Return whether a layer takes its softmax over cosines of queries and keys."""
    layer, pyramid = site.block(model).attn, is_pyramid(model)
    return pyramid and _as_host(layer, site.block(model)).has_cosine_logits


def _as_host(layer: nn.Module, block: Block) -> AttentionHost:
    return layer if isinstance(layer, AttentionHost) else native_host(block)


def put_attention(model: nn.Module, site: Site, attention: nn.Module) -> None:
    """Put a layer that takes the whole grid in place of the attention of a site of a pyramid."""
    block = whole_grid(site.block(model))
    block._modules["attn"] = attention
    site.replace_block(model, block)


def remove_attention(model: nn.Module, site: Site, plan_size: tuple[int, int] | None) -> None:
    """Take the attention of a site of a pyramid out of its block, with its norm and its dropped path."""
    nothing = NoAttention()
    nothing.plan_size = plan_size
    put_attention(model, site, nothing)
    for name in ("norm1", "drop_path1"):
        site.block(model)._modules[name] = nn.Identity()


def release_layers(model: nn.Module) -> nn.Module:
    """Put timm's layers back in place of native hosts, and return the model. Converted layers stay."""
    if not is_pyramid(model):
        return release_attention(model)
    for site in sites(model):
        host = site.block(model).attn
        if isinstance(host, GridHost) and not host.permanent:
            [block] = host._block
            block._modules["attn"] = host.original
            block.training = host.original.training = host.training
            site.replace_block(model, block)
    return model
