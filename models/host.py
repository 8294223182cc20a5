"""The module that replaces the attention of a timm block.

A host shares the parameters, buffers and submodules of the timm attention that it replaces, under the same
names, so state dicts do not change. It projects tokens to queries, keys and values (with the layer's own norms
and rotary embedding), calls an *operator*, and projects its output. With the operator `softmax` it computes
the same as timm, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .attention.base import QKV, Geometry, Heads, Operator
from .attention.softmax import Softmax
from .errors import JsonDict, UnsupportedModelError
from .families import attention_blocks, check_supported
from .map_structure import MapStructure

Given = tuple[Tensor, Tensor | None, Tensor | None]
"""The input of an attention layer: tokens (B, N, C), rotary embedding, shared relative position bias."""


def observe(layer: nn.Module, see: Callable[[Given], None]) -> RemovableHandle:
    """Call `see` with the input of an attention layer (timm's or a host) before it runs."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], keywords: JsonDict) -> None:
        see(_given(*inputs, **keywords))

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


def _given(
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    shared_rel_pos_bias: Tensor | None = None,
) -> Given:
    return x, rope, shared_rel_pos_bias


class AttentionHost(nn.Module):
    """A timm attention layer with any operator; `original` is the layer that it replaces."""

    permanent = False
    """Whether a saved model keeps the host instead of the original layer."""
    geometry: Geometry | None = None
    """The tokens of the sequence, for operators that need the grid."""
    after_heads: tuple[str, ...] = ("norm", "gate", "proj", "proj_drop")
    """The children through which the output of the heads goes."""
    has_cosine_logits = False
    """Whether queries and keys have unit length before the learned scale, as in Swin V2."""

    def __init__(self, original: nn.Module, operator: Operator | None = None) -> None:
        super().__init__()
        self._parameters = original._parameters
        self._buffers = original._buffers
        self._non_persistent_buffers_set = original._non_persistent_buffers_set
        self._modules = {name: child for name, child in original._modules.items() if name != "operator"}
        self.training = original.training
        self._original = (original,)  # in a tuple, so that it is not registered a second time
        self.operator: Operator = operator or Softmax()
        layer: Any = original
        self.num_heads: int = layer.num_heads
        self.scale: float = getattr(layer, "scale", 1.0)  # Swin V2 scales its queries itself
        self.num_prefix_tokens: int = getattr(layer, "num_prefix_tokens", 0)
        self.rotate_half: bool = getattr(layer, "rotate_half", False)
        self.kv_groups: int = getattr(layer, "num_kv_groups", 1)
        self.separate_bias: bool = getattr(layer, "qkv_bias_separate", False)

    @property
    def original(self) -> nn.Module:
        return self._original[0]

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        shared_rel_pos_bias: Tensor | None = None,
    ) -> Tensor:
        """Attend over tokens (B, N, C). Refuse masks, which a plain image transformer does not have."""
        if attn_mask is not None or is_causal:
            raise UnsupportedModelError(
                "attn_mask and is_causal are not supported by a hosted attention layer"
            )
        return self.merge(self.attend(self.project(x, rope, shared_rel_pos_bias)), x)

    def attend(self, heads: Heads) -> Tensor:
        """Return the output (B, H, N, D) before the heads are joined."""
        return self.operator(heads)

    def attended(self, heads: Heads) -> Heads:
        """Return the projections on which timm's layer takes its softmax, such as those of each window."""
        return heads

    def structure(self, grid: tuple[int, int]) -> MapStructure:
        """Return which keys each query of timm's layer sees on a grid."""
        return MapStructure()

    def heads_of(self, *inputs: Any, **keywords: Any) -> Heads:
        """Return the projections for the arguments with which timm's block calls the layer."""
        return self.project(*_given(*inputs, **keywords))

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
            whole: Tensor = fused(x)
            return whole
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
        layer: Any = self.original
        own: Tensor = layer._get_rel_pos_bias()
        return own if shared is None else own + shared

    def _child(self, name: str, x: Tensor) -> Tensor:
        child: Any = self._modules.get(name)
        return x if child is None else child(x)


def host_attention(model: nn.Module) -> list[AttentionHost]:
    """Replace every attention layer of `model` by a host; layers that have a host keep it."""
    check_supported(release_attention(model))
    hosts = []
    for block in attention_blocks(model):
        if not isinstance(block.attn, AttentionHost):  # a converted layer is one
            block.attn = AttentionHost(block.attn)
        hosts.append(block.attn)
    return hosts


def release_attention(model: nn.Module) -> nn.Module:
    """Replace the hosts by timm's attention layers, except in converted layers, and return the model."""
    for block in attention_blocks(model):
        host = getattr(block, "attn", None)
        if isinstance(host, AttentionHost) and not host.permanent:
            block.attn = host.original
    return model
