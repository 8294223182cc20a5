"""Labels by name: another split is numbered as the training split is, whatever classes it has images of."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ...checkpoints.class_names import comparable
from ...checkpoints.report import some
from ...models.errors import DataError
from .images import ImageSource, SourceView

logger = logging.getLogger(__name__)

NAMED = 5
"""How many classes an error names."""
TRAINING = "the training split has no images of: {}; name the class folders alike, or take these away"
MODEL = (
    "the model was not trained for: {}; name the class folders as its label_names are, take these away, or measure "
    "its features with --metrics knn"
)
"""Whose classes these are, in an error."""


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
        raise DataError(f"split {split!r} has classes that {owner.format(some(foreign, NAMED))}")
    labels = {label: known[name] for label, name in enumerate(own)}
    return SourceView(source, tuple(names), labels=labels)
