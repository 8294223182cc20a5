"""What one image costs outside the attention maps, counted from the layers."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from .families import attention_blocks, token_layout


def dense_macs(model: nn.Module) -> int:
    """Multiply-adds of one image in the patch embedding, the linear layers of the blocks, and the classifier.

    With those of the attention maps (`conversion.layer_macs`) these are all of a model but norms and activations,
    and an attention pool where it has one.
    """
    layout, any_model = token_layout(model), cast(Any, model)
    tokens, patches = layout.num_tokens, layout.grid[0] * layout.grid[1]
    linear = [module for block in attention_blocks(model) for module in _linear(block)]
    heads = [head for name in ("head", "head_dist") for head in _linear(getattr(model, name, None))]
    return (
        patches * int(any_model.patch_embed.proj.weight.numel())
        + tokens * sum(layer.weight.numel() for layer in linear)
        + sum(head.weight.numel() for head in heads)
    )


def _linear(module: nn.Module | None) -> list[nn.Linear]:
    """The linear layers of the original model; those of an operator count as its own."""
    modules = [] if module is None else module.named_modules()
    return [each for name, each in modules if isinstance(each, nn.Linear) and ".operator." not in f".{name}."]
