"""Multiply-adds of a pyramid, layer by layer, and of everything but its attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .any_timm import image_channels
from .attention.base import Heads
from .converted import converted_layers
from .errors import UnsupportedModelError
from .families import NoAttention, Site, family_of, is_pyramid, sites
from .grid_hosts import GridHost, SwinV2Host
from .hosting import native_host


def attention_macs(model: nn.Module) -> list[int]:
    """Return the multiply-adds of one image in each layer's attention, without projections; 0 without attention.

    A layer that is not converted has its native cost: reduced keys, or windows of the padded grid.
    """
    converted, found = converted_layers(model), []
    for site in sites(model):
        attention = site.block(model).attn
        if isinstance(attention, NoAttention):
            found.append(0)
        elif site.index in converted:
            found.append(converted[site.index].operator.macs(site.shape.geometry))
        else:
            queries, keys = _native_pairs(model, site)
            found.append(2 * queries * keys * site.head_dim * site.num_heads)
    return found


def _native_pairs(model: nn.Module, site: Site) -> tuple[int, int]:
    """Return the numbers of queries and of keys of each query in timm's layer."""
    if not is_pyramid(model):
        return site.shape.geometry.num_tokens, site.shape.geometry.num_tokens
    block = site.block(model)
    host = block.attn if isinstance(block.attn, GridHost) else native_host(block)
    return host.native_pairs(site.shape.geometry)


def other_macs(model: nn.Module) -> int:
    """Return the multiply-adds of one image in the linear layers and convolutions, without those of operators.

    The model runs on the meta device, which computes only shapes.

    Raises UnsupportedModelError: the model does not run at its image size.
    """
    counts: list[int] = []
    hooks = [
        module.register_forward_hook(partial(_count, counts))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and ".operator." not in f".{name}."
    ]
    try:
        _run_on_meta(model)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(counts) + sum(_uncalled(model))


def _count(counts: list[int], module: Any, inputs: object, out: Tensor) -> None:
    counts.append(out.numel() // module.weight.shape[0] * module.weight.numel())


def _uncalled(model: nn.Module) -> list[int]:
    """Return the cost of projections of Swin V2, whose weights are used without calling their module."""
    found = []
    for site in sites(model):
        attention: Any = site.block(model).attn
        fused = attention._modules.get("qkv")
        if fused is None:
            continue
        geometry, hosted = site.shape.geometry, isinstance(attention, GridHost)
        own = attention if hosted else native_host(site.block(model))
        if isinstance(own, SwinV2Host) and own.has_separate_biases:
            # timm pads the grid before it projects
            tokens = geometry.num_tokens if hosted else own.native_pairs(geometry)[0]
            found.append(tokens * int(fused.weight.numel()))
    return found


def _run_on_meta(model: nn.Module) -> None:
    size = family_of(model).image_size(model) or (0, 0)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    empty = {name: tensor.to("meta") for name, tensor in tensors.items()}
    dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
    image = torch.empty(1, image_channels(model), *size, dtype=dtype, device="meta")
    layers = converted_layers(model).values()
    for layer in layers:  # an operator has its own count, and may not run without values
        layer.__dict__["attend"] = _any_heads
    try:
        with torch.no_grad():
            functional_call(model, empty, (image,))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run on images of {size[0]}x{size[1]}: {reason}"
        ) from error
    finally:
        for layer in layers:
            del layer.__dict__["attend"]


def _any_heads(heads: Heads) -> Tensor:
    """Return any projection: it has the shape of the output."""
    return heads.known
