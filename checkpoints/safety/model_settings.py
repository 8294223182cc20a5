"""Settings of a model that came with its weights: plain values of sane sizes, before anything is built of them."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any, SupportsIndex

from ...models.errors import CheckpointError

MAX_WHOLE = 10_000_000
"""No model has more classes, pixels a side or features than this."""
MAX_LAYERS = 1000
MAX_ENTRIES, MAX_LEVELS, MAX_TEXT = 100_000, 16, 100_000
WHOLE = frozenset(
    {"num_classes", "in_chans", "num_heads", "embed_dim", "depth", "patch_size", "img_size", "plan_size"}
)
"""Arguments of timm's plain vision transformers that are whole numbers, or lists of them."""
LAYERS = ("depth", "depths", "layers", "num_layers")
"""Arguments of timm's constructors that say how often something is built."""


def check_settings(where: str, settings: Any, num_tensors: int = 0) -> None:
    """Refuses settings that no model has; what is no JSON (a caller's function or class) is left to timm.

    Args:
        where: file and setting, as the error names them.
        num_tensors: of the weights that the settings came with; a model has no more layers than its weights tensors.

    Raises CheckpointError: a number that is not finite, is negative or beyond `MAX_WHOLE`, more layers than there are
    tensors, or more entries, levels or text than any model needs.
    """
    layers = max(num_tensors, MAX_LAYERS)
    for number, (path, key, value) in enumerate(_entries(where, settings)):
        if number > MAX_ENTRIES:
            raise CheckpointError(f"{where} has more than {MAX_ENTRIES:,} entries, which no model needs")
        problem = _problem(key, value)
        if problem is None and key in LAYERS and isinstance(value, int) and value > layers:
            problem = f"more layers than any model has, and its weights have {num_tensors:,} tensors"
        if problem is not None:
            raise CheckpointError(f"{path}={shortened(value)} is refused: {problem}")


def shortened(value: Any) -> str:
    """A value of unknown size in a few words."""
    return " ".join(reprlib.repr(value).split())


def _entries(where: str, settings: Any) -> Iterator[tuple[str, str, Any]]:
    """Path, last name and value of everything in `settings`; an entry of a list has the name of the list."""
    waiting = [(where, "", settings, 0)]
    while waiting:
        path, key, value, level = waiting.pop()
        yield path, key, value
        if level > MAX_LEVELS:
            raise CheckpointError(f"{path[:200]} is refused: it is nested more than {MAX_LEVELS} levels deep")
        if isinstance(value, Mapping):
            named = ((str(name)[:80], inner) for name, inner in value.items())
            waiting += [(f"{path}.{name}", name, inner, level + 1) for name, inner in named]
        elif isinstance(value, (list, tuple)):
            waiting += [(path, key, inner, level + 1) for inner in value]


def _problem(key: str, value: Any) -> str | None:
    if key in WHOLE and not _is_whole(value):
        return "it is a whole number, or a list of them"
    if key.endswith("_rate") and isinstance(value, (int, float)) and not 0 <= value <= 1:
        return "a rate is from 0 to 1"
    if isinstance(value, float) and not math.isfinite(value):
        return "a number must be finite"
    if isinstance(value, int) and not 0 <= value <= MAX_WHOLE:
        return f"a whole number is from 0 to {MAX_WHOLE:,}"
    if isinstance(value, str) and len(value) > MAX_TEXT:
        return f"no text has more than {MAX_TEXT:,} characters"
    return None


def _is_whole(value: Any) -> bool:
    """Whether a setting that is left out, a whole number, or a list, whose entries are looked at by themselves."""
    return (
        value is None
        or isinstance(value, (list, tuple))
        or (isinstance(value, SupportsIndex) and not isinstance(value, bool))
    )
