"""Describe in words what loading did: every key that was left out or left fresh, with the reason."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..models.errors import escaped
from .keys import FRESH_NORM, OTHER_HEAD


@dataclass(frozen=True)
class LoadReport:
    """The outcome of one load. Keys that have no reason never get here: they are refused."""

    origin: str
    format: str
    loaded: int
    """Tensors taken over."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Keys of the model that the weights lack, and why that is expected."""
    unexpected: Mapping[str, str] = field(default_factory=dict)
    """Keys of the weights that the model has no place for, and why that is expected."""
    resampled: Mapping[str, str] = field(default_factory=dict)
    """Position embeddings that were resampled, and how."""
    notes: tuple[str, ...] = ()
    license: str | None = None
    revision: str | None = None
    """Commit on the hub."""

    def lines(self) -> list[str]:
        """Return one line for each fact; keys with the same reason share one."""
        lines = [f"loaded {self.loaded} tensors from {self.origin} ({self.format})"]
        lines += [f"resampled {name}: {how}" for name, how in self.resampled.items()]
        lines += [f"not in the weights: {line}" for line in grouped(self.missing)]
        lines += [f"not in the model: {line}" for line in grouped(self.unexpected)]
        return lines + list(self.notes)

    def warnings(self) -> list[str]:
        """Return a sentence for each part of the model that is fresh although the weights bring their own."""
        found = []
        if FRESH_NORM in self.missing.values():
            found.append(
                "its final norm is fresh, and that of the weights is left out, because they were trained with another "
                "pooling: student.global_pool=auto keeps theirs"
            )
        if OTHER_HEAD in self.unexpected.values():
            found.append(
                "its head is fresh, and that of the weights is left out, because it has other classes"
            )
        return found

    def summary(self) -> str:
        """Return the lines as text."""
        return "\n".join(self.lines())

    def __str__(self) -> str:
        return "; ".join(self.lines())


def grouped(keys: Mapping[str, str]) -> list[str]:
    """Return one line for each reason, with the keys that have it."""
    groups: dict[str, list[str]] = {}
    for key, reason in keys.items():
        groups.setdefault(reason, []).append(key)
    return [f"{some(names)} ({reason})" for reason, names in groups.items()]


def some(names: Iterable[str], limit: int = 4) -> str:
    """Return the first few names and how many more there are."""
    listed = list(names)
    more = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {more} more" if more > 0 else "")


def printable(text: str) -> str:
    """`text` in one line, with an escape in place of each character that could steer a terminal."""
    return escaped(text).replace("\t", "\\t").replace("\n", "\\n")


def shortened(value: Any) -> str:
    """Return a value of unknown size in a few words."""
    return " ".join(reprlib.repr(value).split())
