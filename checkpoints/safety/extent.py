"""How many bytes a tensor takes, from its shape alone, with every number checked before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...models.errors import CheckpointError

MAX_DIMS = 64
"""torch's own limit."""
MAX_NUMBER = 2**63 - 1


def is_count(value: Any) -> bool:
    """Whether a value from a file is a whole number that torch takes as a size."""
    return type(value) is int and 0 <= value <= MAX_NUMBER


def count(where: str, shape: Any) -> int:
    """The number of elements of a tensor of this shape; `where` names file and tensor.

    Raises CheckpointError: the shape is none, negative, or larger than any tensor.
    """
    if not isinstance(shape, (list, tuple)) or not all(type(size) is int for size in shape):
        raise CheckpointError(f"{where} is damaged: its shape is {_short(shape)}, not whole numbers")
    if any(size < 0 for size in shape):
        raise CheckpointError(f"{where} is damaged: its shape {_short(shape)} has a negative size")
    elements, extent = 1, 1
    for size in shape[: MAX_DIMS + 1]:
        elements *= size
        extent *= max(size, 1)  # torch multiplies strides behind an empty dimension, too
        if extent > MAX_NUMBER or len(shape) > MAX_DIMS:
            raise CheckpointError(f"{where} is damaged: its shape {_short(shape)} is larger than any tensor")
    return elements


def last_element(shape: Sequence[int], stride: Sequence[int]) -> int:
    """How far behind its first element the last element of a view lies; -1 for an empty one."""
    if 0 in shape:
        return -1
    return sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, (list, tuple)) and len(value) < 20 else type(value).__name__
    return text if len(text) < 80 else f"{text[:76]}…"
