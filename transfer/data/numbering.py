"""Labels by name: another split is numbered as the training split is, whatever classes it has images of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ...models.errors import DataError
from .images import UNLABELED, Header, ImageSource

NAMED = 5
"""How many classes an error names."""


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


def number_by_name(source: ImageSource, split: str, training: Sequence[str] | None) -> ImageSource:
    """`source` with the labels of the training split's classes, `training`, where both name theirs.

    Raises DataError: it has classes that the training split has not, so that there is no label for them.
    """
    own = source.class_names
    if own is None or training is None or list(own) == list(training):
        return source
    known = {name: label for label, name in enumerate(training)}
    foreign = [name for name in own if name not in known]
    if foreign:
        more = f" and {len(foreign) - NAMED} more" if len(foreign) > NAMED else ""
        raise DataError(
            f"split {split!r} has classes that the training split has no images of: "
            f"{', '.join(foreign[:NAMED])}{more}; name the class folders alike, or take these away"
        )
    return Renumbered(source, tuple(training), tuple(known[name] for name in own))
