"""Put hosts in place of the attention layers of any supported model, and take them out again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from .errors import JsonDict, check_types
from .families import (
    NoAttention,
    Site,
    attention_of,
    attention_place,
    check_supported,
    native_host,
    paths_of,
    replace_block,
    sites,
    submodule,
    whole_grid,
)
from .host import AttentionHost
from .map_structure import MapStructure


def host_attention(model: nn.Module) -> dict[int, AttentionHost]:
    """Replace every attention layer of a model by a native host; layers that have a host keep it.

    Return the hosts by number of their block: a block may have no attention.

    Args:
        model: a supported model of timm or transformers, or one of a registered family.

    Raises:
        UnsupportedModelError: the model is not supported.
    """
    check_supported(model)
    return {site.index: host_layer(model, site) for site in sites(model) if site.num_heads}


def host_layer(model: nn.Module, site: Site) -> AttentionHost:
    """Replace the attention layer of one site by a native host; a layer that has a host keeps it."""
    block = site.block(model)
    host = native_host(model, block)
    if host is not site.layer(model):
        put_attention(model, site, host)
    return host


@dataclass(frozen=True)
class Call:
    """The arguments with which timm's block calls its attention layer."""

    inputs: tuple[Any, ...]
    keywords: JsonDict


def watch_layer(model: nn.Module, site: Site, see: Callable[[AttentionHost, Call], None]) -> RemovableHandle:
    """Call `see` with the host of a layer and the arguments of each call, before the layer runs.

    A layer that gets less than the whole grid, such as windows, is replaced by its host. Another layer stays where it
    is: a host is made for each call, in the mode that the layer is in.
    """
    block = site.block(model)
    layer = host_layer(model, site) if whole_grid(block) is not block else site.layer(model)

    def hook(module: nn.Module, inputs: tuple[Any, ...], keywords: JsonDict) -> None:
        see(native_host(model, site.block(model)), Call(inputs, keywords))

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


def map_structure(model: nn.Module, site: Site) -> MapStructure:
    """Return which keys each query of a layer sees; a converted layer's operator sees all tokens.

    Raises UnsupportedModelError: the model has no image size.
    """
    return native_host(model, site.block(model)).structure(site.shape.geometry.grid)


def has_cosine_logits(model: nn.Module, site: Site) -> bool:
    """Return whether a layer takes its softmax over cosines of queries and keys."""
    return native_host(model, site.block(model)).has_cosine_logits


def put_attention(model: nn.Module, site: Site, attention: nn.Module) -> None:
    """Put a layer that takes the whole grid in place of the attention of a site."""
    block = whole_grid(site.block(model))
    block._modules[attention_place(block)] = attention
    site.replace_block(model, block)


def remove_attention(model: nn.Module, site: Site, plan_size: tuple[int, int] | None) -> None:
    """Take the attention of a site out of its block, with its norm and its dropped path."""
    nothing = NoAttention()
    nothing.plan_size = plan_size
    put_attention(model, site, nothing)
    for name in ("norm1", "drop_path1"):
        site.block(model)._modules[name] = nn.Identity()


@check_types()
def release_attention(model: nn.Module) -> nn.Module:
    """Put timm's layers back in place of native hosts, and return the model. Converted layers stay.

    Args:
        model: any model, which is changed in place.
    """
    for path in paths_of(model):
        host = attention_of(submodule(model, path))
        if isinstance(host, AttentionHost) and not host.permanent:
            [block] = host._block or (submodule(model, path),)
            block._modules[attention_place(block)] = host.original
            block.training = host.original.training = host.training
            replace_block(model, path, block)
    return model
