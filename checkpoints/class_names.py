"""Compare the classes of heads by name: timm's `label_names`, matched between two models."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..models.errors import Json

KEY = "label_names"
"""The entry of config.json that timm and the hub read; also of a training state."""
WORDNET = re.compile(r"n\d{8}")
"""An id of WordNet, which ImageNet's folders are named by; other sources name the same classes in words."""


@dataclass(frozen=True)
class Head:
    """The head of a model and its classes."""

    num_classes: int = 0
    """0 without a head."""
    label_names: tuple[str, ...] | None = None
    """The classes in their order, where they are known."""


def read_names(described: Json, num_classes: int) -> tuple[str, ...] | None:
    """Return the names of `num_classes` outputs in their order; None if the description does not name each."""
    names = described.get(KEY)
    if isinstance(names, Mapping):
        numbered = {str(number): name for number, name in names.items()}
        names = [numbered.get(str(number)) for number in range(len(numbered))]
    if not isinstance(names, Sequence) or isinstance(names, str) or not names or len(names) != num_classes:
        return None
    if not all(isinstance(name, str) for name in names) or len(set(names)) < num_classes:
        return None
    return tuple(names)


def comparable(one: Sequence[str] | None, other: Sequence[str] | None) -> bool:
    """Return whether both sides have names, and of the same kind."""
    return bool(one) and bool(other) and _by_wordnet(one or ()) == _by_wordnet(other or ())


def same_classes(one: Sequence[str] | None, other: Sequence[str] | None) -> bool:
    """Return whether two heads may have the same classes, in any order, as far as their names are known."""
    return not comparable(one, other) or set(one or ()) == set(other or ())


def places(own: Sequence[str] | None, wanted: Sequence[str] | None) -> list[int] | None:
    """Return the index in `own` of each of `wanted`, the same classes; None if they are in that order already."""
    if not comparable(own, wanted) or list(own or ()) == list(wanted or ()):
        return None
    numbers = {name: number for number, name in enumerate(own or ())}
    return [numbers[name] for name in wanted or ()]


def difference(one: Sequence[str], other: Sequence[str]) -> str:
    """Return the first class that only one of two lists has, for example "class 0 'cat' and 'dog'"."""
    for number, (first, second) in enumerate(zip(one, other, strict=False)):
        if first != second:
            return f"class {number} {first!r} and {second!r}"
    return f"{len(one)} and {len(other)} classes"


def _by_wordnet(names: Sequence[str]) -> bool:
    return all(WORDNET.fullmatch(name) for name in names)
