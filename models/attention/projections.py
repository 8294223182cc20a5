"""The rows of an attention layer's projections, under one interface for every way in which timm keeps them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError


class Projections:
    """Views of the weights (H·D, C) and biases (H·D,) that project queries, keys and values: setting them in place
    sets the layer's. `kept` names those that a conversion left in the layer."""

    def __init__(self, layer: nn.Module, kept: Collection[str] = "qkv") -> None:
        self._layer = layer
        self._kept = kept

    def weight(self, part: str) -> Tensor:
        """Return the weight of "q", "k" or "v".

        Raises UnsupportedModelError: the layer does not keep it in a linear layer.
        """
        linear, rows = self._find(part)
        return linear.weight.data[rows]

    def bias(self, part: str) -> Tensor | None:
        """Return the bias of "q", "k" or "v"; None without one."""
        own = getattr(self._layer, f"{part}_bias", None)
        if own is not None:
            return torch.as_tensor(own.data)
        linear, rows = self._find(part)
        return None if linear.bias is None else linear.bias.data[rows]

    def _find(self, part: str) -> tuple[nn.Linear, slice]:
        layer: Any = self._layer
        if part not in self._kept:
            raise UnsupportedModelError(
                f"this {type(layer).__name__} has lost the rows of {part} in its conversion: run `graftvit convert` on "
                "the original model, and start from the folder that it writes"
            )
        for name, parts in (("qkv", "qkv"), ("kv", "kv"), ("q", "q"), (f"{part}_proj", part)):
            linear = layer._modules.get(name)
            if part in parts and isinstance(linear, nn.Linear):
                width, place = linear.out_features // len(parts), parts.index(part)
                return linear, slice(place * width, (place + 1) * width)
        raise UnsupportedModelError(
            f"{type(layer).__name__} has no linear layer that projects its {part}: take start=q for the operator hash"
        )
