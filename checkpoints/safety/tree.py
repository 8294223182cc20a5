"""The tree of dictionaries and lists that a torch file holds."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ...models.errors import CheckpointError
from .pickle_scan import MAX_ENTRIES

MAX_DEPTH = 100


def check_tree(path: Path, tree: Any) -> None:
    """Raises CheckpointError for a tree that is deeper or larger than any checkpoint, or holds itself."""
    waiting, entries = [(tree, 0)], 0
    while waiting:
        node, depth = waiting.pop()
        entries += 1
        if depth > MAX_DEPTH or entries > MAX_ENTRIES:
            raise CheckpointError(
                f"{path} is damaged: it is nested more than {MAX_DEPTH} deep or has more than {MAX_ENTRIES:,} entries"
            )
        waiting += [(child, depth + 1) for child in children(node)]


def children(node: Any) -> list[Any]:
    """What a container holds; nothing for anything else."""
    if isinstance(node, dict):
        return list(node.values())
    if isinstance(node, argparse.Namespace):
        return list(vars(node).values())
    return list(node) if isinstance(node, (list, tuple)) else []


def tensors_of(tree: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a tree by their path, names joined by dots."""
    if isinstance(tree, Tensor):
        yield prefix, tree
        return
    named = tree.items() if isinstance(tree, dict) else enumerate(children(tree))
    for key, value in named:
        yield from tensors_of(value, f"{prefix}.{key}" if prefix else str(key))
