"""Multiply-adds of a model, layer by layer, and of everything but its attention."""

from __future__ import annotations

from torch import nn

from .converted import converted_layers
from .families import sites
from .operation_count import attention_operations, count_layers


def attention_macs(model: nn.Module) -> list[int]:
    """Return the multiply-adds of one image in each layer's attention, without projections; 0 without attention.

    A layer that is not converted has its native cost: reduced keys, or windows of the padded grid.
    """
    converted = converted_layers(model)
    return [
        converted[index].operator.macs(site.shape.geometry) if index in converted else operations.additions
        for index, (site, operations) in enumerate(
            zip(sites(model), attention_operations(model), strict=True)
        )
    ]


def other_macs(model: nn.Module) -> int:
    """Return the multiply-adds of one image in the linear layers and convolutions, without those of operators.

    Raises UnsupportedModelError: the model does not run at its image size.
    """
    count = count_layers(model)
    return (count.linear + count.convolution).multiplications
