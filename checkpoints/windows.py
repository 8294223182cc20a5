"""Hold the windows that a source gives a Swin against its tables of relative position biases, a row for each offset.

Swin V2 computes its biases and has no tables, so nothing in its weights shows the windows.
"""

from __future__ import annotations

import math

from ..models.errors import CheckpointError
from .fit import BIAS_TABLE
from .report import shortened
from .timm_models import build
from .weights import Weights


def check_windows(weights: Weights) -> Weights:
    """Return the weights themselves, once the windows in their description have been checked.

    Raises CheckpointError: `window_size` makes tables of other lengths than those of the weights, or no model.
    """
    tables = {key: tensor for key, tensor in weights.tensors.items() if key.endswith(BIAS_TABLE)}
    if not tables or weights.architecture is None or weights.model_args.get("window_size") is None:
        return weights
    described = build(weights.architecture, weights.model_args, on_meta=True, within=weights.tensors)
    wanted = described.state_dict()
    for key, table in tables.items():
        rows = len(wanted[key]) if key in wanted else None
        if table.ndim and rows is not None and len(table) != rows:
            given = shortened(weights.model_args["window_size"])
            raise CheckpointError(
                f"{weights.origin} says window_size={given}, but {key} has {len(table)} rows and not {rows}"
                f"{_side(len(table))}; give config.json the window_size that the model was trained with"
            )
    return weights


def _side(rows: int) -> str:
    """Return the windows that a table belongs to, in words, if they are square."""
    root = math.isqrt(rows)
    side = (root + 1) // 2
    return f": its windows are {side}x{side}" if root * root == rows and root % 2 else ""
