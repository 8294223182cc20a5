"""Recorded layers as a file, which all processes of a search measure on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ...models.errors import ConfigError
from .matching import RecordedLayer

PARTS = tuple(field.name for field in fields(RecordedLayer))


def layers_to_bytes(teachers: Sequence[Sequence[RecordedLayer]]) -> bytes:
    """Return the layers of each teacher as a safetensors file with the tensors `TEACHER.LAYER.PART`."""
    return save(
        {
            f"{teacher}.{index}.{part}": getattr(layer, part).contiguous()
            for teacher, layers in enumerate(teachers)
            for index, layer in enumerate(layers)
            for part in PARTS
        }
    )


def read_layers(path: Path) -> list[list[RecordedLayer]]:
    """Read the recorded layers of each teacher. Raises ConfigError: the file is missing or damaged."""
    try:
        tensors = load_file(path)
        layers = sorted({tuple(map(int, name.split(".")[:2])) for name in tensors})
        found: list[list[RecordedLayer]] = [[] for _ in {teacher for teacher, _ in layers}]
        for teacher, index in layers:
            parts = (tensors[f"{teacher}.{index}.{part}"] for part in PARTS)
            found[teacher].append(RecordedLayer(*parts))
        return found
    except (OSError, SafetensorError, KeyError, ValueError, IndexError) as error:
        raise ConfigError(
            f"{path} is not readable as recorded layers; remove it, and it is made again"
        ) from error
