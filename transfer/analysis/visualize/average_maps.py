"""Attention maps averaged over images, one batch at a time: the memory does not depend on the number of images.

Shape suffixes: B batch, H heads, N queries, M keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....models.errors import TransferError
from ....models.families import sites
from ..key_places import KeyPlaces
from ..layer_maps import LayerMap, key_count, layer_maps
from . import measures

MAX_SUM_BYTES = 4 * 2**30
MAX_BATCH_BYTES = 2**28
WEIGHT_BYTES, SUM_BYTES = 4, 8
"""Of a weight in float32, as maps are computed and written, and in float64, as they are added."""


@dataclass(frozen=True)
class MeanMap:
    """A layer's map, (H, N, M), and the entropy and mean distance of its heads (H), as means over images."""

    weights: Tensor
    entropy: Tensor
    distance: Tensor
    places: KeyPlaces


class MapSums:
    """Sums over images of each layer's map, in float64, and of the entropy and mean distance of its heads."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[int, list[Tensor]] = {}
        self._places: dict[int, KeyPlaces] = {}

    def add(self, maps: dict[int, LayerMap]) -> None:
        """Add the maps (B, H, N, M) of all layers on one batch of images."""
        for layer, found in maps.items():
            self._places[layer] = found.places
            weights, start = found.weights, found.places.geometry.num_prefix
            distance = measures.mean_distance(weights[..., start:, start:], found.places.distances())
            new = [weights, measures.entropy(weights), distance]
            if layer not in self._sums:
                self._sums[layer] = [each.new_zeros(each.shape[1:], dtype=torch.float64) for each in new]
            for total, each in zip(self._sums[layer], new, strict=True):
                for image in each:  # a copy of the whole batch in float64 would take twice its memory
                    total += image
        self.count += len(next(iter(maps.values())).weights)

    def means(self) -> dict[int, MeanMap]:
        """Return the means by layer, in float64."""
        means = {}
        for layer, sums in self._sums.items():
            weights, entropy, distance = (total / self.count for total in sums)
            means[layer] = MeanMap(weights, entropy, distance, self._places[layer])
        return means


def average_maps(model: nn.Module, batches: Iterable[Tensor], layers: Sequence[int]) -> dict[int, MeanMap]:
    """Return the mean over all images of the maps of these layers; without those of blocks that have no attention.

    The model runs in eval mode and is left as it was. Raises UnsupportedModelError: a model of another kind.
    """
    sums = MapSums()
    for images in batches:
        sums.add(layer_maps(model, images, layers))
    return sums.means()


def map_weights(model: nn.Module, layers: Sequence[int]) -> int:
    """Return the number of weights in the maps of these layers on one image.

    Raises TransferError: their sums would not fit in 4 GB.
    """
    places = [sites(model)[layer] for layer in layers]
    numbers = [
        site.num_heads * site.shape.geometry.num_tokens * key_count(model, site) if site.num_heads else 0
        for site in places
    ]
    size = SUM_BYTES * sum(numbers)
    if size > MAX_SUM_BYTES:
        most = max(range(len(numbers)), key=numbers.__getitem__)
        raise TransferError(
            f"the sums of the maps of {len(layers)} layers take {size / 2**30:.1f} GB, and at most "
            f"{MAX_SUM_BYTES / 2**30:.0f} are taken (layer {layers[most]} has most); give fewer layers by --layers, or "
            "a smaller --img_size"
        )
    return sum(numbers)


def batch_that_fits(weights: int, wanted: int) -> int:
    """Return the number of images in a batch: `wanted`, or less so that their maps take at most 256 MB."""
    return max(1, min(wanted, MAX_BATCH_BYTES // (WEIGHT_BYTES * max(1, weights))))
