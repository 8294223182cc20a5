"""Read the weights in a training state of this package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ...models.errors import CheckpointError
from ...models.lora import merged
from ..class_names import KEY as LABEL_NAMES
from ..preprocessing import Preprocessing
from ..provenance import PICKED, carried_license, of_state
from ..report import shortened
from ..sources import Part
from ..state_file import BEST, META_KEY
from ..weight_files import Content
from ..weights import Weights

TABLES = (
    "", "student", "student.model_args", "config", "config.student", "config.student.model_args", "config.data",
    "config.transfer", "position", "position.metrics", "origins", "origins.teacher", "origins.teachers",
    "origins.init",
)  # fmt: skip
"""Places of a state's meta that hold a table, where they hold anything."""
NAMES = (
    "student.architecture", "config.student.model", "config.data.dataset", "config.data.data_path",
    "config.transfer.method", "origins.teacher.licence", "origins.init.licence",
)  # fmt: skip
DESCRIBED = (*(field.name for field in fields(Preprocessing)), LABEL_NAMES)


def read_state_weights(content: Content, part: Part) -> Weights:
    """Return a run's state: `student.…` as trained, `ema.…` its average; of an autoencoder, the encoder alone.

    Raises CheckpointError: the state has no such part, or is damaged.
    """
    tensors = _part(content.tree, part)
    if not tensors:
        what = "moving average" if part == "ema" else part
        raise CheckpointError(f"{content.path} holds no {what}; leave #{part} out")
    if part == "ema":  # whole numbers have no average: they are the student's own
        own = _part(content.tree, "student")
        tensors = {name: t for name, t in own.items() if not t.is_floating_point()} | tensors
    if any(name.startswith("encoder.") for name in tensors):
        encoder = "encoder."
        tensors = {name.removeprefix(encoder): t for name, t in tensors.items() if name.startswith(encoder)}
    try:
        tensors = merged(tensors)
        meta = json.loads(content.metadata[META_KEY])
    except (ValueError, KeyError, RuntimeError) as error:  # RecursionError is a RuntimeError
        raise CheckpointError(
            f"{content.path} is damaged: {type(error).__name__} {str(error)[:200]}"
        ) from error
    _check_meta(content.path, meta)
    provenance = of_state(meta, part)
    if content.path.name == BEST:
        provenance[PICKED] = (meta.get("position") or {}).get("best_metric", "top1")
    entry = meta.get("student") or {}
    config = {key: entry[key] for key in DESCRIBED if entry.get(key) is not None}
    config["license"] = carried_license(provenance)
    return Weights(
        tensors,
        str(content.path),
        f"the {'average' if part == 'ema' else 'student'} in a run's training state",
        entry.get("architecture"),
        dict(entry.get("model_args") or {}),
        config,
        provenance=provenance,
    )


def _part(tree: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Return the tensors of one model in a state, under their own names."""
    prefix = f"{part}."
    return {name.removeprefix(prefix): t for name, t in tree.items() if name.startswith(prefix)}


def _check_meta(path: Path, meta: Any) -> None:
    """Raise CheckpointError unless each of `TABLES` is a mapping and each of `NAMES` a text, where they are there."""
    for place in TABLES:
        found = _at(meta, place)
        if found is not None and not isinstance(found, Mapping):
            raise CheckpointError(f"{path} is damaged: {place or 'it'}={shortened(found)} is no table")
    for place in NAMES:
        found = _at(meta, place)
        if found is not None and not isinstance(found, str):
            raise CheckpointError(f"{path} is damaged: {place}={shortened(found)} is no text")


def _at(meta: Any, place: str) -> Any:
    """Return what lies at a place such as `config.data`, None where nothing does."""
    for name in filter(None, place.split(".")):
        meta = meta.get(name) if isinstance(meta, Mapping) else None
    return meta
