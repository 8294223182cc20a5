"""The attention map of each layer of a model, with the places of its keys.

Maps are formed densely here, (B, H, N, M) a layer: this is for a handful of images, not for training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...models.attention.base import Heads
from ...models.converted import ConvertedAttention
from ...models.copied import CopiedAttention
from ...models.families import (
    Site,
    attention_blocks,
    check_supported,
    evaluating,
    family_of,
    is_pyramid,
    sites,
)
from ...models.grid_hosts import Call, GridHost, native_host, watch_layer
from ...models.host import AttentionHost, Given, observe, release_attention
from ...models.pyramid_conversion import sharing_copy
from .key_places import Cells, KeyPlaces


@dataclass(frozen=True)
class LayerMap:
    """A layer's map on some images, (B, H, N, M) in float32, and the places of its keys."""

    weights: Tensor
    places: KeyPlaces

    def on_tokens(self) -> Tensor:
        """Return the map over all tokens of the stage, (B, H, N, N)."""
        return self.places.on_tokens(self.weights)

    def dense(self) -> Tensor:
        """Return the map over all keys of the layer: zero for those outside of a query's window."""
        return self.weights if self.places.windows is None else self.on_tokens()


@torch.no_grad()
def layer_maps(
    model: nn.Module, images: Tensor, layers: Sequence[int], *, asking: Mapping[int, int] | None = None
) -> dict[int, LayerMap]:
    """Return the maps of layers by number, without those of blocks that have no attention.

    `asking` has one token for each layer, whose row alone is returned, (B, H, 1, M): rows of an operator that is not
    linear in V are expensive. The model runs in eval mode and is left as it was.

    Raises UnsupportedModelError: a model of another kind.
    """
    if is_pyramid(model):
        return _pyramid_maps(model, images, layers, asking or {})
    maps: dict[int, LayerMap] = {}
    with _evaluating(model):
        blocks = attention_blocks(model)
        [geometry] = family_of(model).geometries(model, (images.shape[-2], images.shape[-1]))
        hooks = [
            _keep_map(
                blocks[layer].attn,
                partial(_keep, maps, layer, KeyPlaces(geometry)),
                (asking or {}).get(layer),
            )
            for layer in layers
        ]
        try:
            model(images)
        finally:
            for hook in hooks:
                hook.remove()
    return maps


def key_count(model: nn.Module, site: Site) -> int:
    """Return the number of keys of each query of a layer; 0 for a block without attention."""
    attention = site.block(model).attn
    if not site.num_heads:
        return 0
    if isinstance(attention, ConvertedAttention) or not is_pyramid(model):
        return site.shape.geometry.num_tokens
    host = attention if isinstance(attention, GridHost) else native_host(site.block(model))
    return host.native_pairs(site.shape.geometry)[1]


def softmax_map(heads: Heads) -> Tensor:
    """Return the softmax map (B, H, N, M) of projections, in float32."""
    q, k = heads.qk()
    logits_BHNM = (q.float() @ k.float().transpose(-2, -1)) * heads.scale
    if heads.bias is not None:
        logits_BHNM = logits_BHNM + heads.bias.float()
    return logits_BHNM.softmax(dim=-1)


def _keep(maps: dict[int, LayerMap], layer: int, places: KeyPlaces, weights: Tensor) -> None:
    maps[layer] = LayerMap(weights, places)


def _keep_map(attention: nn.Module, keep: Callable[[Tensor], None], asking: int | None) -> RemovableHandle:
    """Keep the map that a layer of a plain transformer applies: of a copied layer the teacher's, where it copies it."""

    def see(given: Given) -> None:
        if isinstance(attention, ConvertedAttention):
            keep(_operator_map(attention, attention.project(*given), asking))
        elif isinstance(attention, CopiedAttention):
            keep(_row(attention.operator.map(attention.project(*given)).float(), asking))
        else:
            keep(_row(softmax_map(AttentionHost(attention).project(*given)), asking))

    return observe(attention, see)


def _operator_map(layer: ConvertedAttention, heads: Heads, asking: int | None) -> Tensor:
    """Return the map of an operator, or one row of it."""
    if asking is None:
        return layer.operator.matrix(heads).float()
    return layer.operator.rows(heads, torch.tensor([asking], device=heads.known.device)).float()


def _row(map_BHNM: Tensor, asking: int | None) -> Tensor:
    return map_BHNM if asking is None else map_BHNM[:, :, asking, None]


def _pyramid_maps(
    model: nn.Module, images: Tensor, layers: Sequence[int], asking: Mapping[int, int]
) -> dict[int, LayerMap]:
    """Return the maps of a pyramid. A copy runs that shares its weights, because hosts replace blocks of Swin."""
    check_supported(model, pyramids=True)
    twin, maps = sharing_copy(model).eval(), dict[int, LayerMap]()
    for site in sites(twin):
        if site.index in layers and site.num_heads:
            watch_layer(twin, site, partial(_keep_pyramid_map, maps, site.index, asking.get(site.index)))
    twin(images)
    return maps


def _keep_pyramid_map(
    maps: dict[int, LayerMap], index: int, asking: int | None, host: AttentionHost, call: Call
) -> None:
    heads = host.heads_of(*call.inputs, **call.keywords)
    if isinstance(host, ConvertedAttention):
        maps[index] = LayerMap(_operator_map(host, heads, asking), KeyPlaces(heads.tokens()))
        return
    attended = host.attended(heads)
    places = _key_places(host, attended)
    weights = places.without_padding(attended.joined(softmax_map(attended)))
    maps[index] = LayerMap(_row(weights, asking), places)


def _key_places(host: AttentionHost, attended: Heads) -> KeyPlaces:
    """Return where the keys lie on which a layer takes its softmax."""
    geometry = attended.tokens()
    height, width = geometry.grid
    kind, (rows, columns) = host.structure(geometry.grid).reduction or ("", (1, 1))
    cells = {
        "pool": Cells((rows, columns), None),
        "stride": Cells((height // rows, width // columns), (rows, columns)),
    }
    return KeyPlaces(geometry, attended.windows, cells.get(kind))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a plain transformer into eval mode while inside; then restore the mode of each module."""
    layers = [(block, block.attn) for block in attention_blocks(model)]
    try:
        check_supported(release_attention(model), copied=True)
    finally:
        for block, layer in layers:
            block.attn = layer
    with evaluating(model):
        yield
