"""Some classes of a larger set (`data.classes`), such as the hundred of ImageNet-100."""

from __future__ import annotations

from pathlib import Path

from timm.utils.misc import natural_key

from ...checkpoints.files import read_regular
from ...models.errors import ConfigError, DataError, did_you_mean
from ..config import DataConfig
from .images import ImageSource, SourceView

IMAGENET_100 = "imagenet-100"
"""The name of the list that comes with the package."""


def keep_classes(config: DataConfig, source: ImageSource) -> ImageSource:
    """`source` without the classes that `data.classes` leaves out, in the order that folders of these alone have.

    Raises DataError: the set has no classes with names, or not these.
    """
    names = wanted_classes(config)
    if names is None:
        return source
    if source.class_names is None or source.targets is None:
        raise DataError("data.classes needs a data set whose classes have names, and this one has none")
    for name in names:
        if name not in source.class_names:
            near = did_you_mean(name, source.class_names)
            raise DataError(f"data.classes names {name!r}, which is no class of the data set; {near}")
    known = {name: label for label, name in enumerate(source.class_names)}
    labels = {known[name]: label for label, name in enumerate(names)}
    kept = [index for index, target in enumerate(source.targets) if target in labels]
    return SourceView(source, tuple(names), kept, labels)


def wanted_classes(config: DataConfig) -> list[str] | None:
    """Return the names in `data.classes`, sorted as timm sorts folders; None where all are kept.

    Raises ConfigError: the file cannot be read, or no name is given.
    """
    given = config.classes
    if given is None:
        return None
    if given == IMAGENET_100:
        given = _read(Path(__file__).with_name("imagenet100.txt"))
    if isinstance(given, str):
        given = _read(Path(given)) if given.endswith(".txt") or Path(given).is_file() else given.split(",")
    names = sorted({name.strip() for name in given} - {""}, key=natural_key)
    if not names:
        raise ConfigError(
            f"data.classes={config.classes!r} names no class; give names, or a file with a name a line"
        )
    return names


def _read(path: Path) -> list[str]:
    """Yield the lines of a file, without comments."""
    try:
        lines = read_regular(path, refusal=ConfigError).splitlines()
    except ConfigError as error:
        raise ConfigError(f"data.classes: {error}") from error
    return [line for line in lines if not line.startswith("#")]
