"""The native parts of a vision transformer that affect its attention, read from the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from timm.layers.mlp import GluMlp, SwiGLU
from torch import nn

from .families import attention_blocks

DEFAULT_LAYER_SCALE = 1e-5  # timm's own, for releases whose LayerScale does not keep its initial value
ACTIVATIONS = {
    "GELU": "gelu",
    "QuickGELU": "quick_gelu",
    "GELUTanh": "gelu_tanh",
    "SiLU": "silu",
    "ReLU": "relu",
}


@dataclass(frozen=True)
class NativeParts:
    """The components of a model's blocks and embeddings, apart from sizes."""

    layer_scale: float | None  # initial value; None without LayerScale
    registers: int
    pre_norm: bool  # a norm between the embedding and the first block
    activation: str  # timm's name where it has one
    mlp: str  # "MLP", "SwiGLU" or "GLU", with " with norm" where a norm sits inside
    position: tuple[str, ...]  # of "learned absolute", "relative bias", "shared relative bias", "rotary"
    qk_norm: bool
    attention_norm: bool  # a norm on the attention output before its projection
    gate: bool
    qkv_bias: bool
    pooling: str


def native_parts(model: nn.Module) -> NativeParts:
    """Read the parts from the embeddings and the first block (all blocks of a model are alike)."""
    block = attention_blocks(model)[0]
    attention = block.attn
    registers = getattr(model, "reg_token", None)
    return NativeParts(
        layer_scale=layer_scale_init(block),
        registers=0 if registers is None else int(registers.shape[1]),
        pre_norm=has_norm(getattr(model, "norm_pre", None)),
        activation=_activation(block.mlp),
        mlp=_mlp(block.mlp),
        position=_position(model, attention),
        qk_norm=has_norm(getattr(attention, "q_norm", None)),
        attention_norm=has_norm(getattr(attention, "norm", None)),
        gate=getattr(attention, "gate", None) is not None,
        qkv_bias=has_qkv_bias(attention),
        pooling=str(getattr(model, "global_pool", "")),
    )


def has_norm(module: nn.Module | None) -> bool:
    """Return whether an optional module is present, that is, neither None nor an identity."""
    return module is not None and not isinstance(module, nn.Identity)


def layer_scale_init(block: nn.Module) -> float | None:
    """Return the initial value of a block's LayerScale; None without LayerScale."""
    scale = getattr(block, "ls1", None)
    if has_norm(scale):
        return float(getattr(scale, "init_values", DEFAULT_LAYER_SCALE))
    if getattr(block, "gamma_1", None) is not None:
        return float(getattr(block, "init_values", DEFAULT_LAYER_SCALE))
    return None


def has_qkv_bias(attention: Any) -> bool:
    """Return whether queries have a bias, wherever the attention layer stores it."""
    if getattr(attention, "q_bias", None) is not None:
        return True
    projection = attention.qkv if attention.qkv is not None else attention.q_proj
    return projection.bias is not None


def _activation(mlp: Any) -> str:
    name = type(mlp.act).__name__
    return ACTIVATIONS.get(name, name)


def _mlp(mlp: Any) -> str:
    gated = "SwiGLU" if _activation(mlp) == "silu" else "GLU"
    kind = gated if isinstance(mlp, GluMlp | SwiGLU) else "MLP"
    return f"{kind} with norm" if has_norm(getattr(mlp, "norm", None)) else kind


def _position(model: nn.Module, attention: Any) -> tuple[str, ...]:
    present = {
        "learned absolute": getattr(model, "pos_embed", None) is not None,
        "relative bias": getattr(attention, "relative_position_bias_table", None) is not None,
        "shared relative bias": getattr(model, "rel_pos_bias", None) is not None,
        "rotary": getattr(model, "rope", None) is not None,
    }
    return tuple(kind for kind, there in present.items() if there)
