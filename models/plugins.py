"""Packages of others, which register operators, transfer methods and families when they are imported."""

from __future__ import annotations

import functools
from importlib import import_module
from importlib.metadata import EntryPoints, entry_points

from .errors import ConfigError

GROUP = "graftvit.plugins"
"""The group of the entry points that name modules to import."""


def load_plugins() -> None:
    """Import the plugins of all installed packages, once: called where a name or a model is not one of ours.

    Raises ConfigError: one cannot be imported.
    """
    for entry in _entries():
        owner = "" if entry.dist is None else f" of {entry.dist.name}"
        _check(entry.module, f"the plugin {entry.name}{owner}")


def import_packages(names: object) -> None:
    """Import packages by name; nothing of another value. Raises ConfigError: one cannot be imported."""
    for name in names if isinstance(names, list | tuple) else ():
        if isinstance(name, str):
            _check(name, "imports")


def _check(module: str, origin: str) -> None:
    why = _import(module)
    if why:
        raise ConfigError(f"{origin}: {module!r} cannot be imported ({why}); install, fix or remove it")


@functools.cache
def _entries() -> EntryPoints:
    return entry_points(group=GROUP)


@functools.cache
def _import(module: str) -> str:
    """Import a module, and return why it cannot be: a second try would register its first names twice."""
    try:
        import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
