"""The words of `--sweep`: which values a setting takes, and what they are called in a file name."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...models.errors import ConfigError
from ..config import parse_setting
from ..fields import find_key, leaves, unknown

MAX_CELLS = 1000
"""Slurm takes arrays of up to 1000 jobs unless the site says otherwise (MaxArraySize=1001)."""
EXAMPLE = "as in --sweep seed=0..4 or --sweep 'transfer.layers=first:6,[0,3,5],all'"
CLOSING = {")": "(", "]": "[", "}": "{"}
RANGE = re.compile(r"([-+]?[0-9]{1,18})\.\.([-+]?[0-9]{1,18})")
LABEL_LENGTH = 40


@dataclass(frozen=True)
class Axis:
    """A setting and the values that it takes, as texts of the command line."""

    key: str
    values: tuple[str, ...]

    def labels(self) -> list[str]:
        """The values as parts of a file name, all different, also where upper and lower case are one."""
        slugs = [_slug(value) for value in self.values]
        folded = [slug.casefold() for slug in slugs]
        return [
            slug if 0 < len(slug) <= LABEL_LENGTH and folded.count(slug.casefold()) == 1 else _hashed(slug, value)
            for slug, value in zip(slugs, self.values, strict=True)
        ]  # fmt: skip

    def __str__(self) -> str:
        return f"{self.key}={','.join(_quoted(self.key, value) for value in self.values)}"


def parse_axes(words: Iterable[str]) -> list[Axis]:
    """`transfer.layers=first:6,all` and `seed=0..4`, each as an axis, in the given order.

    Commas separate values, `a..b` is all whole numbers from a to b, and a value with commas of its own stands in
    square brackets.

    Raises ConfigError: a key is unknown, stands twice or cannot be swept, or a list is empty or malformed.
    """
    axes: list[Axis] = []
    for word in words:
        axis = _parse_axis(word)
        for other in axes:
            _check_apart(axis.key, other.key)
        axes.append(axis)
    if not axes:
        raise ConfigError(f"--sweep needs a setting and its values, {EXAMPLE}")
    return axes


def short_keys(axes: Sequence[Axis]) -> list[str]:
    """The last part of each key, or the whole key where two would read the same."""
    last = [_slug(axis.key.rpartition(".")[2]) for axis in axes]
    return [name if last.count(name) == 1 else _slug(axis.key) for name, axis in zip(last, axes, strict=True)]


def shortened(name: str, length: int) -> str:
    """The name, its end replaced by a hash of all of it where it is longer than `length`."""
    return name if len(name) <= length else f"{name[: length - 9]}~{_digest(name)}"


def _parse_axis(word: str) -> Axis:
    name, equals, text = word.partition("=")
    if not equals:
        raise ConfigError(f"--sweep {word!r} has no values; write key=value,value,..., {EXAMPLE}")
    key = find_key(name.strip())
    if key is None:
        raise unknown(name.strip(), where="--sweep")
    if key == "output_dir":
        raise ConfigError("--sweep output_dir: each cell has a folder of its own below the one output_dir")
    values = _values(key, text)
    # equal values (1e-3 and 0.001) would be two cells of one run
    seen: list[object] = []
    for value in values:
        parsed = parse_setting(key, value, origin=key).value
        if parsed in seen:
            raise ConfigError(f"--sweep {name}: the value {value!r} is given twice")
        seen.append(parsed)
    return Axis(key, tuple(values))


def _check_apart(key: str, other: str) -> None:
    if key == other:
        raise ConfigError(f"--sweep {key} is given twice; put all its values into one list")
    if key.startswith(f"{other}.") or other.startswith(f"{key}."):
        raise ConfigError(f"--sweep {key} and --sweep {other} set the same thing; give one of the two")


def _values(key: str, text: str) -> list[str]:
    values: list[str] = []
    for item in _split(key, text):
        if not item:
            raise ConfigError(f"--sweep {key}={text!r} has an empty value; separate values by one comma each")
        found = RANGE.fullmatch(item)
        if found:
            values += _range(key, item, int(found[1]), int(found[2]))
        elif ".." in item and re.fullmatch(r"[-+0-9.]*[0-9][-+0-9.]*", item):
            raise ConfigError(f"--sweep {key}: {item!r} is no range; write whole numbers, as in 0..4")
        else:
            values.append(_unwrapped(key, item))
    if len(values) > MAX_CELLS:
        raise ConfigError(f"--sweep {key} has {len(values):,} values, but a sweep has {MAX_CELLS} at most")
    return values


def _range(key: str, item: str, first: int, last: int) -> list[str]:
    if first > last:
        raise ConfigError(f"--sweep {key}: the range {item!r} is empty; write {last}..{first}")
    if last - first >= MAX_CELLS:
        raise ConfigError(f"--sweep {key}: the range {item!r} has more than {MAX_CELLS} values")
    return [str(number) for number in range(first, last + 1)]


def _split(key: str, text: str) -> list[str]:
    """The items between the commas that stand in no brackets."""
    items, open_brackets = [""], ""
    for letter in text:
        if letter == "," and not open_brackets:
            items.append("")
            continue
        items[-1] += letter
        if letter in CLOSING.values():
            open_brackets += letter
        elif letter in CLOSING:
            if not open_brackets.endswith(CLOSING[letter]):
                raise ConfigError(f"--sweep {key}={text!r}: {letter!r} closes a bracket that was not opened")
            open_brackets = open_brackets[:-1]
    if open_brackets:
        raise ConfigError(f"--sweep {key}={text!r}: the bracket {open_brackets[-1]!r} is not closed")
    return [item.strip() for item in items]


def _unwrapped(key: str, item: str) -> str:
    """A value without the brackets that only keep its commas; inside a mapping they make a list."""
    inner = item[1:-1].strip()
    wraps = item[0] == "[" and item[-1] == "]" and inner and inner[0] != "["
    if not wraps or key not in leaves():
        return item
    depth = 0
    for letter in inner:  # `[ab].*[cd]` is no value in brackets
        depth += (letter == "[") - (letter == "]")
        if depth < 0:
            return item
    return inner


def _quoted(key: str, value: str) -> str:
    several = len(_split(key, value)) > 1 or RANGE.fullmatch(value)
    return f"[{value}]" if several else value


def _slug(text: str) -> str:
    """Letters, digits, points, dashes; a dash in place of anything else."""
    slug = re.sub(r"[^A-Za-z0-9_.+-]+", "-", text)
    return slug.strip("-") if slug != text else slug


def _hashed(slug: str, text: str) -> str:
    # no slug has a tilde: what stands here is told apart from every plain name
    return f"{slug[:LABEL_LENGTH]}~{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
