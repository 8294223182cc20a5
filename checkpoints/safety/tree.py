"""The tree of dictionaries and lists that a file of weights holds, and what is refused of a file."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from torch import Tensor

MAX_ENTRIES, MAX_NAME, MAX_PART = 2_000_000, 1000, 16 << 20
"""Entries of a tree, characters of a path in it, and bytes of its description in a torch file."""


class RefusedError(ValueError):
    """A file that is whole, and means harm; its text says why."""


def children(node: Any) -> dict[Any, Any]:
    """Return what a container holds by name or number; nothing for anything else."""
    if isinstance(node, argparse.Namespace):
        return vars(node)
    return (
        dict(enumerate(node)) if isinstance(node, (list, tuple)) else node if isinstance(node, dict) else {}
    )


def tensors_of(tree: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a tree by their path, names joined by dots.

    Raises ValueError for a tree that is deeper or larger than any checkpoint, or holds itself.
    """
    waiting, seen = [(prefix, tree)], 0
    while waiting:
        path, node = waiting.pop()
        inner = children(node)
        seen += len(inner)
        if len(path) > MAX_NAME or seen > MAX_ENTRIES:
            raise ValueError(
                f"it has more than {MAX_ENTRIES:,} entries, or a path of {MAX_NAME:,} characters"
            )
        if isinstance(node, Tensor):
            yield path, node
        named = [(f"{path}.{name}" if path else str(name), value) for name, value in inner.items()]
        waiting += reversed(named)
