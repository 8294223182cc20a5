"""Labels by name: another split is numbered as the training split is, whatever classes it has images of."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ...checkpoints.class_names import comparable
from ...models.errors import DataError
from .images import UNLABELED, Header, ImageSource

logger = logging.getLogger(__name__)

NAMED = 5
"""How many classes an error names."""
TRAINING = "the training split has no images of: {}; name the class folders alike, or take these away"
MODEL = (
    "the model was not trained for: {}; name the class folders as its label_names are, take these away, or measure "
    "its features with --metrics knn"
)
"""Whose classes these are, in an error."""


@dataclass(frozen=True)
class Renumbered:
    """The images of `source` with the label of each class in `class_names`; `labels` has the new one of each old."""

    source: ImageSource
    class_names: Sequence[str]
    labels: Sequence[int]

    @property
    def targets(self) -> Sequence[int] | None:
        targets = self.source.targets
        return None if targets is None else [self._label(target) for target in targets]

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> tuple[Image.Image, int]:
        image, target = self.source.read(index)
        return image, self._label(target)

    def header(self, index: int) -> Header:
        return self.source.header(index)

    def path(self, index: int) -> str:
        return self.source.path(index)

    def _label(self, target: int) -> int:
        return target if target == UNLABELED else self.labels[target]


def number_by_name(
    source: ImageSource, split: str, names: Sequence[str] | None, owner: str = TRAINING
) -> ImageSource:
    """`source` with a label for each class that is its place in `names`, where both sides name theirs.

    `owner` says in an error whose names these are. Raises DataError: `source` has a class that is not in `names`.
    """
    own = source.class_names
    if own is None or names is None or list(own) == list(names):
        return source
    if not comparable(own, names):
        logger.warning("split %r and its model name classes in other words: they go by number", split)
        return source
    known = {name: label for label, name in enumerate(names)}
    foreign = [name for name in own if name not in known]
    if foreign:
        raise DataError(f"split {split!r} has classes that {owner.format(listed(foreign))}")
    return Renumbered(source, tuple(names), tuple(known[name] for name in own))


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"
