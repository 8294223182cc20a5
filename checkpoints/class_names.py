"""The classes of a head by name: timm's `label_names`, and how the names of two sides go together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..models.json_types import Json

KEY = "label_names"
"""The entry of config.json that timm and the hub read; also of a training state."""
WORDNET = re.compile(r"n\d{8}")
"""An id of WordNet, which ImageNet's folders are named by; other sources name the same classes in words."""


def read_names(described: Json, num_classes: int) -> tuple[str, ...] | None:
    """The names of `num_classes` outputs in their order; None where the description does not say one for each."""
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
    """Whether both sides have names, and of the same kind."""
    return bool(one) and bool(other) and _by_wordnet(one or ()) == _by_wordnet(other or ())


def same_classes(one: Sequence[str] | None, other: Sequence[str] | None) -> bool:
    """Whether two heads may be taken to have the same classes, in any order: as far as their names are known."""
    return not comparable(one, other) or set(one or ()) == set(other or ())


def places(own: Sequence[str] | None, wanted: Sequence[str] | None) -> list[int] | None:
    """Which of the outputs `own` is each of `wanted`, the same classes; None where they are in that order already."""
    if not comparable(own, wanted) or list(own or ()) == list(wanted or ()):
        return None
    numbers = {name: number for number, name in enumerate(own or ())}
    return [numbers[name] for name in wanted or ()]


def difference(one: Sequence[str], other: Sequence[str]) -> str:
    """The first class that two lists have not in common, as in "class 0 'cat' and 'dog'"."""
    for number, (first, second) in enumerate(zip(one, other, strict=False)):
        if first != second:
            return f"class {number} {first!r} and {second!r}"
    return f"{len(one)} and {len(other)} classes"


def _by_wordnet(names: Sequence[str]) -> bool:
    return all(WORDNET.fullmatch(name) for name in names)
