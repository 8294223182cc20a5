"""Check the description of a model in its weights as soon as it is read: a file may contain anything."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, SupportsIndex

from timm.models import is_model, split_model_name_tag

from ...models.conversion import ARCHITECTURE as CONVERTED
from ...models.copied import ARCHITECTURE as COPIED
from ...models.copied import Copying
from ...models.errors import CheckpointError
from ..architecture import build
from ..preprocessing import Preprocessing
from ..report import BIAS_TABLE, shortened
from ..weight_files import Weights

INNER = {CONVERTED: "architecture", COPIED: "student"}
"""The argument of each architecture of ours that names the one of timm which it changes."""
MAX_WHOLE, MAX_LAYERS = 10_000_000, 1000
"""No model has more classes, pixels a side or features, or more layers."""
MAX_ENTRIES, MAX_LEVELS, MAX_TEXT = 100_000, 16, 100_000
WHOLE = {"num_classes", "in_chans", "num_heads", "embed_dim", "depth", "patch_size", "img_size", "plan_size"}
"""Arguments of timm's plain vision transformers that are whole numbers, or lists of them."""
LAYERS = ("depth", "depths", "layers", "num_layers")
"""Arguments of timm's constructors that say how often something is built."""


def check_description(weights: Weights) -> Weights:
    """Return the weights themselves, once their description of the model has been checked.

    Raises CheckpointError: the architecture, its arguments, the description of the images or the provenance have the
    wrong type; a number is out of bounds; the base of a converted model is not one of timm's architectures; or the
    description of what a student copies cannot be read.
    """
    described = {"model_args": weights.model_args, "pretrained_cfg": weights.pretrained_cfg}
    for name, table in described.items():
        _require(isinstance(table, Mapping), weights, name, table, "no table of settings")
        check_settings(f"{weights.origin}: {name}", table, len(weights.tensors))
    names = {name: weights.pretrained_cfg.get(name) for name in ("license", "classifier")}
    for name, value in {"architecture": weights.architecture, **names}.items():
        texts: Any = [value]
        if name == "classifier" and isinstance(value, (list, tuple)) and value:
            texts = value
        _require(all(one is None or isinstance(one, str) for one in texts), weights, name, value, "no name")
    Preprocessing.read(weights.pretrained_cfg)
    if weights.architecture in INNER:
        _check_inner(weights, weights.architecture)
    return weights


def _require(holds: bool, weights: Weights, name: str, value: Any, words: str) -> None:
    if not holds:
        raise CheckpointError(f"{weights.origin} says {name}={shortened(value)}, which is {words}")


def _check_inner(weights: Weights, outer: str) -> None:
    """Check a model that one of our architectures makes out of a model of timm."""
    named, plan = weights.model_args.get(INNER[outer]), weights.model_args.get("plan")
    known = isinstance(named, str) and is_model(split_model_name_tag(named)[0]) and named != outer
    _require(known, weights, INNER[outer], named, "no architecture of timm")
    _require(outer != CONVERTED or isinstance(plan, str), weights, "plan", plan, "no text")
    if outer == COPIED:
        try:
            Copying.from_json(weights.model_args["copied"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{weights.origin} says of what it copies: {error}") from error
    if named in INNER:
        _check_inner(weights, named)


def check_settings(where: str, settings: Any, num_tensors: int = 0) -> None:
    """Refuse settings that no model has; what is no JSON (a caller's function or class) is left to timm.

    Args:
        where: file and setting, as the error names them.
        num_tensors: of the weights that the settings came with; a model has no more layers than its weights tensors.

    Raises CheckpointError: a number that is not finite, is negative or beyond `MAX_WHOLE`, more layers than there are
    tensors, or more entries, levels or text than any model needs.
    """
    for number, (path, key, value, level) in enumerate(_entries(where, settings)):
        if number > MAX_ENTRIES or level > MAX_LEVELS:
            many = (
                f"it has more than {MAX_ENTRIES:,} entries, or is nested more than {MAX_LEVELS} levels deep"
            )
            raise CheckpointError(f"{path[:200]} is refused: {many}")
        problem = _problem(key, value, num_tensors)
        if problem is not None:
            raise CheckpointError(f"{path}={shortened(value)} is refused: {problem}")


def _entries(where: str, settings: Any) -> Iterator[tuple[str, str, Any, int]]:
    """Yield path, last name, value and level of all in `settings`; an entry of a list has the name of the list."""
    waiting = [(where, "", settings, 0)]
    while waiting:
        path, key, value, level = waiting.pop()
        yield path, key, value, level
        if isinstance(value, Mapping):
            named = ((str(name)[:80], inner) for name, inner in value.items())
            waiting += [(f"{path}.{name}", name, inner, level + 1) for name, inner in named]
        elif isinstance(value, (list, tuple)):
            waiting += [(path, key, inner, level + 1) for inner in value]


def _problem(key: str, value: Any, num_tensors: int) -> str | None:
    is_number, is_whole = isinstance(value, (int, float)), isinstance(value, (list, tuple, SupportsIndex))
    if key in WHOLE and value is not None and (isinstance(value, bool) or not is_whole):
        return "it is a whole number, or a list of them"
    if key.endswith("_rate") and is_number and not 0 <= value <= 1:
        return "a rate is from 0 to 1"
    if isinstance(value, float) and not math.isfinite(value):
        return "a number must be finite"
    if isinstance(value, int) and not 0 <= value <= MAX_WHOLE:
        return f"a whole number is from 0 to {MAX_WHOLE:,}"
    if key in LAYERS and isinstance(value, int) and value > max(num_tensors, MAX_LAYERS):
        return f"more layers than any model has, and its weights have {num_tensors:,} tensors"
    if isinstance(value, str) and len(value) > MAX_TEXT:
        return f"no text has more than {MAX_TEXT:,} characters"
    return None


# Hold the windows that a source gives a Swin against its tables of relative position biases, a row for each offset.
#
# Swin V2 computes its biases and has no tables, so nothing in its weights shows the windows.


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
