"""What pictures and pages show of a model: the maps of its layers, and the places that its merges read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ....models.families import TokenLayout
from ..key_places import KeyPlaces
from ..merge_places import MergePlaces


@dataclass(frozen=True)
class ShownLayer:
    """The attention of a layer; float32."""

    stage: int
    layout: TokenLayout
    maps: Tensor | None
    """(H, N, M), over the keys of `places`; None for a block without attention."""
    places: KeyPlaces
    rolled: Tensor | None
    """The rollout from the first layer of the stage, (N, N); None in an average."""

    @property
    def heads(self) -> int:
        return 0 if self.maps is None else len(self.maps)

    @property
    def signed(self) -> bool:
        """Whether some weight is negative."""
        return self.maps is not None and bool((self.maps < 0).any())


@dataclass(frozen=True)
class ShownLook:
    """The layers of a model, and its deformable merges."""

    layers: Sequence[ShownLayer]
    merges: Sequence[MergePlaces] = ()

    @property
    def layouts(self) -> list[TokenLayout]:
        return [layer.layout for layer in self.layers]
