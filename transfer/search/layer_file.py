"""Recorded layers as a file, which all processes of a search measure on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import save

from ...checkpoints.weight_files import read_file
from ...models.errors import CheckpointError, ConfigError
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
        tensors = read_file(path).tree
        layers = sorted({tuple(map(int, name.split(".")[:2])) for name in tensors})
        found: list[list[RecordedLayer]] = [[] for _ in {teacher for teacher, _ in layers}]
        for teacher, index in layers:
            if (teacher, index) != (teacher % len(found), len(found[teacher])):
                raise ValueError(f"it lacks a layer before {teacher}.{index}")
            parts = (tensors.pop(f"{teacher}.{index}.{part}") for part in PARTS)
            found[teacher].append(_checked(RecordedLayer(*parts)))
        if tensors or not found:
            raise ValueError("it has other tensors than layers")
        return found
    except (CheckpointError, KeyError, ValueError, IndexError) as error:
        raise ConfigError(
            f"{path} is not readable as recorded layers; remove it, and it is made again ({error})"
        ) from error


def _checked(layer: RecordedLayer) -> RecordedLayer:
    """Raise ValueError unless these are the projections and the output of one attention, of two images or more."""
    q, k, v, out = layer.q, layer.k, layer.v, layer.out
    fits = all(part.ndim == 4 and part.numel() and part.dtype == torch.float32 for part in (q, k, v, out))
    if not fits or not (
        len(q) > 1
        and k.shape == (*q.shape[:2], k.shape[2], q.shape[3])
        and v.shape == (*k.shape[:3], v.shape[3])
        and out.shape == (*q.shape[:3], v.shape[3])
    ):
        raise ValueError("its tensors are not of one attention")
    return layer
