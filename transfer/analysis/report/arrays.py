"""Arrays as an .npz file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ....checkpoints.atomic import write_file
from .ink import Array


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays by name to an .npz file, whole or not at all. Raises WriteFailedError as `write_file`."""
    save: Callable[..., None] = np.savez
    size = sum(array.nbytes for array in arrays.values())
    write_file(path, lambda temporary: save(temporary, **arrays), size=size)
