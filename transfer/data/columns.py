"""Which columns of a table hold the images and their labels: by the settings, else by usual names and kinds."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from ...models.errors import DataError, Json
from ..config import DataConfig

logger = logging.getLogger(__name__)

IMAGES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp")
LABELS = ("label", "labels", "fine_label", "class", "target", "cls", "category", "coarse_label")


class Columns(NamedTuple):
    """Names of two columns; `label` is None without labels."""

    image: str
    label: str | None


def find_columns(config: DataConfig, features: Json) -> Columns:
    """Return the columns of a data set with these `features` (of the package datasets, by name).

    Raises DataError: a setting names none of them, none holds images, or the labels are no numbers and no names.
    """
    image = _find(config, "image_column", features, IMAGES, "Image")
    if image is None:
        raise DataError(
            f"{config.dataset} has no column that looks like images, only {_listed(features)}: "
            "set data.image_column"
        )
    label = _find(config, "label_column", features, LABELS, "ClassLabel")
    if label is not None and not is_label(features[label]):
        raise DataError(
            f"data.label_column={label} of {config.dataset} holds {features[label]}, not one label an image; "
            f"its columns are {_listed(features)}"
        )
    logger.info("%s: images from column %s, labels from %s", config.dataset, image, label or "none")
    return Columns(image, label)


def is_label(feature: Any) -> bool:
    """Return whether a column holds one class an image: a number or a name."""
    return getattr(feature, "dtype", "").startswith(("int", "uint", "string", "large_string", "bool"))


def _find(config: DataConfig, setting: str, features: Json, names: tuple[str, ...], kind: str) -> str | None:
    wanted = getattr(config, setting)
    if wanted is not None:
        if wanted not in features:
            raise DataError(
                f"data.{setting}={wanted} is no column of {config.dataset}; there are {_listed(features)}"
            )
        return str(wanted)
    named = [name for name in names if name in features]
    of_kind = [name for name, feature in features.items() if type(feature).__name__ == kind]
    return next(iter([name for name in named if name in of_kind] or named or of_kind), None)


def _listed(features: Json) -> str:
    return ", ".join(sorted(features))
