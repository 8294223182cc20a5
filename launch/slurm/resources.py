"""Parse and compare GPUs by type and other generic resources, as sbatch takes them and sinfo prints them."""

from __future__ import annotations

import re
from collections.abc import Mapping


def parse_gpus(text: str) -> dict[str, int]:
    """`4` as {"": 4}, `a100:4` as {"a100": 4}, `a100:2,h100:1` as both. Raises ValueError."""
    found: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"(?:([A-Za-z][\w.-]*):)?([0-9]+)", part, re.ASCII)
        if match is None or (match[1] or "") in found:
            raise ValueError("a number, or types with their numbers, as in a100:4 or a100:2,h100:1")
        found[match[1] or ""] = int(match[2])
    return found


def gpus_in(gres: str | None) -> dict[str, int]:
    """Return the GPUs of `gpu:a100:4,tmpdisk:100` by type; also of sinfo's form with sockets: `gpu:a100:4(S:0-1)`."""
    found: dict[str, int] = {}
    for part in _parts(gres):
        kind, _, rest = part.partition(":")
        if kind not in ("gpu", "gres/gpu"):
            continue
        name, _, count = rest.rpartition(":")
        if not count.isdecimal():  # `gpu` and `gpu:a100` count as one
            name, count = count, "1"
        found[name] = found.get(name, 0) + int(count)
    return found


def generic_in(gres: str | None) -> dict[str, int]:
    """Return other resources: `gpu:4,tmpdisk:ssd:2K` as {"tmpdisk:ssd": 2048}; by name and type, and by name alone."""
    found: dict[str, int] = {}
    for part in _parts(gres):
        name, *rest = part.lower().removeprefix("gres/").replace(":no_consume", "").split(":")
        if name in ("gpu", "none", "null"):
            continue
        count = re.fullmatch(r"([0-9]+)([kmgtp]?)", rest[-1]) if rest else None
        kinds = rest[:-1] if count else rest
        size = int(count[1]) << 10 * " kmgtp".index(count[2] or " ") if count else 1
        key = ":".join([name, *kinds])
        found[key] = found.get(key, 0) + size
    return found


def most_of(generic: Mapping[str, int], wanted: str) -> int:
    """Return how many units a node with `generic` can give: of the named type, or of all types without a name."""
    return sum(count for name, count in generic.items() if name == wanted or name.startswith(f"{wanted}:"))


def without_gpus(gres: str) -> str | None:
    """Return the other resources of the request; None if there are none."""
    return ",".join(part for part in _parts(gres) if not gpus_in(part)) or None


def count_gpus(gpus: Mapping[str, int]) -> int:
    """GPUs of whatever type."""
    return sum(gpus.values())


def has_gpus(gpus: Mapping[str, int], wanted: Mapping[str, int]) -> bool:
    """Return whether a node with `gpus` can give the GPUs of a request."""
    named = {name: count for name, count in wanted.items() if name}
    typed = {name.lower(): count for name, count in gpus.items()}
    enough = all(typed.get(name.lower(), 0) >= count for name, count in named.items())
    return enough and count_gpus(gpus) >= count_gpus(wanted)


def _parts(gres: str | None) -> list[str]:
    return [part.strip() for part in re.sub(r"\([^)]*\)", "", gres or "").split(",") if part.strip()]
