"""Put hosts in place of the attention layers of any supported model, and take them out again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timm.models.pvt_v2 import Attention as PVTAttention
from timm.models.swin_transformer import WindowAttention as WindowAttentionV1
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from timm.models.twins import GlobalSubSampleAttn, LocallyGroupedAttn
from torch import nn
from torch.utils.hooks import RemovableHandle

from .converted import ConvertedAttention
from .families import Block, NoAttention, Site, check_supported, is_pyramid, sites
from .grid_hosts import GridHost, ReducedHost, SwinHost, SwinV2Host, WindowHost
from .host import AttentionHost, host_attention, release_attention
from .json_types import JsonDict
from .map_structure import MapStructure
from .shifted_windows import whole_grid

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
