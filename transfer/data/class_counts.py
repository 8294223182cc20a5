"""How many classes a data set has, by its names, its labels and `data.num_classes`."""

from __future__ import annotations

from collections.abc import Sequence

from ...checkpoints.class_names import comparable, difference
from ...models.errors import ConfigError, DataError
from ..config import DataConfig


def check_num_classes(config: DataConfig, names: Sequence[str] | None) -> None:
    """ConfigError where `data.num_classes` is not the number of a data set's named classes."""
    if names and config.num_classes not in (None, len(names)):
        raise ConfigError(
            f"data.num_classes={config.num_classes}, but the data set has {len(names)} named classes: leave it out "
            f"(--num_classes none) or give {len(names)}"
        )


def count_classes(
    config: DataConfig, names: Sequence[str] | None, targets: Sequence[int] | None, labels: bool
) -> int:
    """`num_classes` as given or as the set says; ConfigError where neither is there, or they disagree.

    Where no `labels` are needed, 0 for a set that has none, and what the set says counts.
    """
    largest = max(targets, default=-1) if targets is not None else -1
    known = max(len(names or ()), largest + 1)
    unlabeled = sum(target < 0 for target in targets or ())
    if unlabeled and largest >= 0 and labels:
        raise DataError(
            f"{unlabeled} of {len(targets or ())} images have no label, and this needs one for each"
        )
    if unlabeled:
        if labels and config.dataset not in ("", "folder"):
            raise DataError(f"{config.dataset} has no labels, and this needs them: set data.label_column")
        if labels:
            raise DataError(
                f"data.data_path={config.data_path} has no class folders, and this needs labels: put the images of "
                "each class into a folder of its own"
            )
        return 0
    if not labels:
        return max(known, config.num_classes or 0)
    check_num_classes(config, names)
    count = config.num_classes or known
    if count == 0:
        raise ConfigError(f"data.num_classes must be set: {config.dataset} does not say how many it has")
    if largest >= count:
        raise ConfigError(f"data.num_classes={count}, but the data set has the label {largest}")
    return count


def check_stream(config: DataConfig, stream: object, names: Sequence[str] | None) -> None:
    """DataError where a stream numbers its classes otherwise than `names`."""
    own = stream_classes(stream)
    if own is not None and names is not None and comparable(own, names) and list(own) != list(names):
        raise DataError(
            f"{config.dataset} has {difference(own, names)} of the model, and a stream keeps its numbers: "
            "read it with hfds/, or as a folder"
        )


def stream_classes(stream: object) -> tuple[str, ...] | None:
    """Return the names of a stream's classes, where it has some."""
    return tuple(getattr(getattr(stream, "reader", None), "class_to_idx", ())) or None
