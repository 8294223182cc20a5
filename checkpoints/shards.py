"""Weights spread over several files with an index, as Hugging Face libraries write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..models.errors import CheckpointError, JsonDict
from .regular_files import read_regular
from .report import some
from .weight_files import Content, read_file

INDEX_SUFFIX = ".index.json"


def read_shards(index: Path, find: Callable[[str], Path | None]) -> Content:
    """Return the tensors that an index lists, each from its file; `find` gives the path of a file by its name.

    Raises CheckpointError: the index is damaged or names files elsewhere, or a file or a tensor is missing.
    """
    names = weight_map(index)
    tree: JsonDict = {}
    for file in dict.fromkeys(names.values()):
        path = find(file)
        if path is None:
            raise CheckpointError(f"{index} lists {file}, which is not there: the weights are not whole")
        held = read_file(path, inside=index.parent).tree
        tree |= {name: tensor for name, tensor in held.items() if names.get(name) == file}
    absent = [name for name in names if name not in tree]
    if absent:
        raise CheckpointError(f"{index} lists {some(absent)}, which its files do not hold")
    return Content(index, {name: tree[name] for name in names}, {})


def weight_map(index: Path) -> dict[str, str]:
    """Tensor names to file names, each a plain name in the index's own folder."""
    text = read_regular(index)
    try:
        names = json.loads(text, object_pairs_hook=_unique)["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} is damaged: it has no weight_map") from error
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise CheckpointError(f"{index} is damaged: its weight_map does not name a file for each tensor")
    elsewhere = [file for file in names.values() if not _is_plain(file)]
    if elsewhere:
        raise CheckpointError(f"{index} is refused: it names {elsewhere[0][:80]!r}, outside of its folder")
    return names


def _is_plain(name: str) -> bool:
    return 0 < len(name) < 256 and name not in (".", "..") and not set(name) & set("/\\:\0")


def _unique(pairs: list[tuple[str, Any]]) -> JsonDict:
    """Return a table of JSON. Raises ValueError: a name is there twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name is there twice")
    return fields
