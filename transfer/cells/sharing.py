"""Choose cells by name, and run them one after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

from ...models.errors import ConfigError, did_you_mean
from .records import State

T = TypeVar("T")


def pick_named(
    cells: Sequence[T], names: Sequence[str] | None, names_of: Callable[[T], Collection[str]], origin: str
) -> list[T]:
    """Return the cells that go by one of `names`; all for None.

    Raises ConfigError: a name is that of no cell; `origin` is the flag that gave it.
    """
    if names is None:
        return list(cells)
    valid = {name for cell in cells for name in names_of(cell)}
    for name in names:
        if name not in valid:
            raise ConfigError(f"{origin} {name}: there is no such cell; {did_you_mean(name, valid)}")
    return [cell for cell in cells if set(names) & set(names_of(cell))]


def left_to_run(cells: Sequence[T], state: Callable[[T], State], tell: Callable[[str], None]) -> list[T]:
    """Return the cells that are not done, and tell how many are."""
    left = [cell for cell in cells if state(cell) != "done"]
    tell(f"{len(cells) - len(left)} of {len(cells)} cells are done")
    return left


def run_in_turn(cells: Sequence[T], run: Callable[[T], str], tell: Callable[[str], None]) -> None:
    """Run cells one after another.

    `run` returns the result in words. `tell` gets a line before and after each cell, the latter with the time left.
    """
    start = time.monotonic()
    for number, cell in enumerate(cells, 1):
        tell(f"[{number}/{len(cells)}] {cell}")
        result = run(cell)
        left = (time.monotonic() - start) / number * (len(cells) - number)
        tell(f"    {result}; {left:.0f} s to go")
