"""Multiply-adds and parameters of a model, counted from its layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from .attention.base import QKV
from .copied import CopiedAttention
from .copying.copying_operators import CopyMap
from .copying.teacher_view import LastAttention
from .families import attention_blocks, token_layout, vit


def dense_macs(model: nn.Module) -> int:
    """Return the multiply-adds of one image in the patch embedding, the blocks' linear layers and the classifier.

    Together with the attention maps (`conversion.layer_macs`) this is the whole model except norms, activations and an
    attention pool. Projections that a copied layer takes from its teacher are not counted.
    """
    geometry = token_layout(model).geometry
    tokens, patches = geometry.num_tokens, geometry.num_patches
    blocks = attention_blocks(model)
    linear = [module for block in blocks for module in _linear(block)]
    heads = [head for name in ("head", "head_dist") for head in _linear(getattr(model, name, None))]
    return (
        patches * int(vit(model).patch_embed.proj.weight.numel())
        + tokens * (sum(layer.weight.numel() for layer in linear) - sum(map(_unused, blocks)))
        + sum(head.weight.numel() for head in heads)
    )


def copied_macs(model: nn.Module) -> tuple[int, int]:
    """Return the multiply-adds of one image in a student that copies attention, and in the part of its teacher."""
    teacher: nn.Module = vit(model).teacher.model
    width = _head_dim(attention_blocks(teacher)[0].attn)
    student = dense_macs(model) + sum(_map_macs(model, block, width) for block in attention_blocks(model))
    beside = sum(_map_macs(teacher, block, width) for block in attention_blocks(teacher)[:-1])
    return student, dense_macs(teacher) + beside


def copied_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of parameters of a student that copies attention, and of the part of its teacher."""
    teacher = sum(parameter.numel() for parameter in vit(model).teacher.parameters())
    return sum(parameter.numel() for parameter in model.parameters()) - teacher, teacher


def _map_macs(model: nn.Module, block: nn.Module, teacher_width: int) -> int:
    """Return the multiply-adds of softmax attention, 2 N² D per head, whichever model computes queries and keys."""
    attention: Any = block.attn
    tokens, own_width = token_layout(model).num_tokens, _head_dim(attention)
    own = 2 * tokens**2 * own_width * int(attention.num_heads)
    if not isinstance(attention, CopiedAttention) or not isinstance(attention.operator, CopyMap):
        return own
    link = attention.operator.link
    matched = len(link.tokens.student.index(tokens))
    copied = 2 * matched**2 * max(teacher_width, own_width) * sum(link.sizes)
    return copied + (own if "q" in attention.operator.taught_needs else 0)


def _head_dim(attention: Any) -> int:
    projection = attention._modules.get("qkv")
    rows = attention.q_proj.out_features if projection is None else projection.out_features // 3
    return int(rows) // int(attention.num_heads)


def _unused(block: nn.Module) -> int:
    """Count the projection weights that a copied layer, or the last layer of a teacher's part, does not use."""
    attention: Any = block.attn
    if isinstance(attention, CopiedAttention):
        needs = attention.operator.taught_needs
    elif isinstance(block, LastAttention):
        needs = block.recorder.needs
    else:
        return 0
    fused = attention._modules.get("qkv")
    parts = [attention._modules.get(f"{part}_proj") for part in QKV if part not in needs]
    return sum(int(fused.weight.numel()) // 3 if part is None else int(part.weight.numel()) for part in parts)


def _linear(module: nn.Module | None) -> list[nn.Linear]:
    """Return the linear layers of the original model, without those of operators."""
    modules = [] if module is None else module.named_modules()
    return [each for name, each in modules if isinstance(each, nn.Linear) and ".operator." not in f".{name}."]
