"""Hold weights with everything that their source records: every reader returns it, every loader takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..models.errors import CheckpointError, Json
from .report import shortened


@dataclass(frozen=True)
class Weights:
    """Tensors under timm's names, and what is known of the model that they belong to."""

    tensors: dict[str, Tensor]
    origin: str
    """The file, folder or repository, as errors name it."""
    format: str
    """In words, for the report."""
    architecture: str | None = None
    """timm name; None where the source does not say."""
    model_args: Json = field(default_factory=dict)
    """Keyword arguments of timm's constructor."""
    pretrained_cfg: Json = field(default_factory=dict)
    """timm's description: mean, std, license, classifier, input size."""
    norm_eps: float | None = None
    """The norms' epsilon where the source says one; timm has no argument for it that JSON could hold."""
    revision: str | None = None
    notes: tuple[str, ...] = ()
    """Sentences for the report."""
    provenance: Json = field(default_factory=dict)
    """The provenance of a student of this package: teacher, recipe, results (`provenance.py`)."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Keys of the source that its format has no use for, and why."""

    @property
    def img_size(self) -> tuple[int, int] | None:
        """Height and width of the images that the weights were trained on, where the source says it."""
        size = self.model_args.get("img_size")
        if size is None and "input_size" in self.pretrained_cfg:
            size = tuple(self.pretrained_cfg["input_size"])[1:]
        return None if size is None else as_pair(size)


def as_pair(size: Any) -> tuple[int, int]:
    """(height, width) from one whole number or two. Raises CheckpointError: it is neither."""
    pair = (size, size) if isinstance(size, int) else size
    if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(type(side) is int for side in pair):
        raise CheckpointError(
            f"img_size={shortened(size)} is no size in pixels: write one whole number, or height and width"
        )
    return pair[0], pair[1]
