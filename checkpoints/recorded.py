"""Describe the train modes in recorded recipes, so that a student can be read without the package's engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..models.copying.copying_operators import COPIES
from ..models.errors import Json


@dataclass(frozen=True)
class RecordedMode:
    """The effect of a mode on a student."""

    words: str
    transfers: bool = False
    """Whether it read the section `transfer`."""
    matches: bool = False
    """Whether it read the section `align`."""


MODES = {
    "transfer": RecordedMode("transfer of attention from a frozen teacher", transfers=True),
    "align": RecordedMode(
        "alignment of each converted layer with a frozen teacher's, on the teacher's own inputs", matches=True
    ),
    "finetune": RecordedMode("fine-tuning"),
    "scratch": RecordedMode("training from scratch, without a teacher"),
    "pretrain": RecordedMode("masked autoencoding, without labels; these are the weights of the encoder"),
}
"""By the value of `mode`."""
_UNKNOWN = RecordedMode("")


def recorded_mode(recipe: Json) -> RecordedMode:
    """Return the effect of the recipe's mode; empty for an unknown mode."""
    return MODES.get(str(recipe.get("mode")), _UNKNOWN)


def copied_by(recipe: Json) -> bool:
    """Return whether a run of this recipe put its teacher's attention in place of the student's."""
    settings = recipe.get("transfer")
    if not isinstance(settings, Mapping) or not recorded_mode(recipe).transfers:
        return False
    return settings.get("method") in COPIES
