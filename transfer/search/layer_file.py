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


def layers_to_bytes(layers: Sequence[RecordedLayer]) -> bytes:
    """Return the layers as a safetensors file with the tensors `LAYER.PART`."""
    return save(
        {
            f"{index}.{part}": getattr(layer, part).contiguous()
            for index, layer in enumerate(layers)
            for part in PARTS
        }
    )


def read_layers(path: Path) -> list[RecordedLayer]:
    """Read recorded layers. Raises ConfigError: the file is missing or damaged."""
    try:
        tensors = load_file(path)
        count = len(tensors) // len(PARTS)
        return [RecordedLayer(*(tensors[f"{index}.{part}"] for part in PARTS)) for index in range(count)]
    except (OSError, SafetensorError, KeyError) as error:
        raise ConfigError(
            f"{path} is not readable as recorded layers; remove it, and it is made again"
        ) from error
