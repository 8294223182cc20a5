"""Where deformable merges read: the four places of the input that each merged token is made of.

Shape suffixes: h and w after merging, P places; t is a tap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...models.merges import merge_layers, merges_deformably
from ...models.token_merging import TokenMerging, tap_places

Place = tuple[float, float]


@dataclass(frozen=True)
class MergePlaces:
    """The places that a deformable merge reads on one image."""

    stage: int
    """The stage that is merged, from 0."""
    grid: tuple[int, int]
    """Rows and columns of its tokens."""
    token: Place
    """Height and width of one of them, in parts of the image."""
    image: tuple[int, int]
    """Height and width of the image in pixels, as the model takes it."""
    places_hwt2: Tensor
    """Row and column of each place, in tokens: 0, 0 is the middle of the first token."""

    @property
    def merged(self) -> tuple[int, int]:
        """Return rows and columns after the merge."""
        return self.places_hwt2.shape[0], self.places_hwt2.shape[1]

    def in_image(self) -> Tensor:
        """Return down and right of each place in parts of the image, (h, w, 4, 2)."""
        return (self.places_hwt2 + 0.5) * self.places_hwt2.new_tensor(self.token)

    def shift(self) -> Tensor:
        """Return the distance of each place from that of an ordinary convolution, in pixels, (h, w, 4)."""
        regular = _by_token(tap_places(self.places_hwt2.new_zeros(1, 8, *self.merged)))
        pixels = [part * side for part, side in zip(self.token, self.image, strict=True)]
        apart = (self.places_hwt2 - regular) * regular.new_tensor(pixels)
        distance: Tensor = torch.linalg.vector_norm(apart, dim=-1)
        return distance

    def outside(self) -> Tensor:
        """Return the share of places outside of the grid, where a merge reads zeros only, (h, w, 4)."""
        sides = self.places_hwt2.new_tensor(self.grid)
        return ((self.places_hwt2 <= -1) | (self.places_hwt2 >= sides)).any(-1).float()

    def token_at(self, place: Place) -> tuple[int, int] | None:
        """Return row and column of the merged token over a place of the image, in parts of its sides.

        None where no token is: a merge leaves out the last row or column of an odd grid.
        """
        row, column = (int(part / (2 * side)) for part, side in zip(place, self.token, strict=True))
        height, width = self.merged
        return (row, column) if row < height and column < width else None


def trace(merges: Sequence[MergePlaces], token: tuple[int, int]) -> Tensor:
    """Return the places that a token after the last of `merges` reads, down to the first, in parts of the image.

    The four places of the token lie on the grid before the merge. The nearest token of each, which an earlier merge
    has made, has four places of its own, and so on: at most 4^merges places, (P, 2). Places outside of a grid have no
    token and end there (Pan et al. 2022, figure 4).
    """
    tokens = torch.tensor([token])
    for merge in reversed(merges):
        height, width = merge.merged
        inside = (tokens >= 0).all(1) & (tokens[:, 0] < height) & (tokens[:, 1] < width)
        rows, columns = tokens[inside].T
        reached = merge.places_hwt2[rows, columns].flatten(0, 1)
        tokens = (reached + 0.5).floor().long()
    return (reached + 0.5) * reached.new_tensor(merges[0].token)


@contextmanager
def collect_merges(model: nn.Module, image: Tensor) -> Iterator[list[MergePlaces]]:
    """Collect the places of each deformable merge while the model runs on one image; none of other models."""
    sides = (image.shape[-2], image.shape[-1])
    found: list[MergePlaces] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor], offsets_BThw: Tensor) -> None:
        height, width = inputs[0].shape[2:]
        before = found[0].grid if found else (height, width)
        token = (2 ** len(found) / before[0], 2 ** len(found) / before[1])
        places = _by_token(tap_places(offsets_BThw.float())).cpu()
        found.append(MergePlaces(len(found), (height, width), token, sides, places))

    layers: list[TokenMerging] = merge_layers(model) if merges_deformably(model) else []
    hooks = [layer.dconv.conv_offset.register_forward_hook(keep) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _by_token(places_Bt2hw: Tensor) -> Tensor:
    """Return the places of the first image, (h, w, 4, 2)."""
    return places_Bt2hw[0].permute(2, 3, 0, 1)
