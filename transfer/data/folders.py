"""What a folder of class folders may hold besides: images beside them, and class folders of one name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

NAMED = 5
"""How many of a kind a warning names."""


def tidy(reader: Any) -> None:
    """Leaves out the images of timm's folder `reader` that lie beside class folders, and tells what may be no class.

    timm names a class after the folder that an image lies in, wherever that is, and takes images beside the class
    folders for the first class.
    """
    root = Path(reader.root)
    names = list(reader.class_to_idx)
    if "" in names and len(names) > 1:
        _leave_out(reader, reader.class_to_idx[""], root)
    places: dict[str, set[str]] = {}
    for path, _ in reader.samples:
        folder = Path(path).parent
        places.setdefault(folder.name, set()).add(str(folder.relative_to(root)))
    several = {name: sorted(found) for name, found in places.items() if len(found) > 1}
    if several:
        listed = "; ".join(
            f"{name} ({', '.join(found[:NAMED])})" for name, found in list(several.items())[:NAMED]
        )
        logger.warning("%s: class folders of one name in several places are one class: %s", root, listed)


def _leave_out(reader: Any, beside: int, root: Path) -> None:
    kept = [(path, target) for path, target in reader.samples if target != beside]
    logger.warning(
        "%s: %d images beside the class folders are left out", root, len(reader.samples) - len(kept)
    )
    names = [name for name in reader.class_to_idx if name != ""]
    reader.class_to_idx = {name: place for place, name in enumerate(names)}
    reader.samples = [(path, reader.class_to_idx[Path(path).parent.name]) for path, _ in kept]
