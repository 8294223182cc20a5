"""The words of every command of `graftvit`, with its actions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

from graftvit.launch.cli import COMMANDS


def command_words() -> list[list[str]]:
    """Return the words that choose each command, and each action of one: `[["jobs"], ["jobs", "logs"], ...]`."""
    modules = {name: import_module(f"graftvit.launch.commands.{name}") for name in COMMANDS}
    return [words for name, module in modules.items() for words in _with_actions(module, [name])]


def _with_actions(module: ModuleType, above: list[str]) -> Iterator[list[str]]:
    yield above
    for name, action in getattr(module, "ACTIONS", {}).items():
        inner = sys.modules[action.run.__module__]
        yield from [[*above, name]] if inner is module else _with_actions(inner, [*above, name])
