"""Remove from a student's config.json what others must not see: paths of this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..models.errors import Json, JsonDict

PATH_KEYS = ("source", "init", "data_path", "stage", "output_dir", "cache")
"""Settings that may hold a path, relative ones included."""
_HUB = ("hf-hub:", "hf_hub:")
_BEGIN = r"(?:~[\w-]*/|\.{1,2}/|/|[A-Za-z]:[\\/]|\\\\)"
_ABSOLUTE = re.compile(r"(?:file:/*|local-dir:)?" + _BEGIN)
_INSIDE = re.compile(r"(?<![\w.:/\\-])(?:~[\w-]*/|/|[A-Za-z]:[\\/])[^\s\"'<>|:,;]+")


def public(config: Json) -> JsonDict:
    """Return a copy of a config in which each path is its last component."""
    return {key: _public(value, key) for key, value in config.items()}


def public_text(text: str, key: str = "") -> str:
    """Return the text without folders: `local-dir:/home/me/runs/a` as `local-dir:a`; a hub name as it is.

    `key` is the setting that the text stands in.
    """
    if text.startswith(_HUB):
        return text
    if _ABSOLUTE.match(text) or (key in PATH_KEYS and re.search(r"[/\\]", text)):
        prefix = "local-dir:" if text.startswith("local-dir:") else ""
        return prefix + _last(text.removeprefix(prefix))
    return _INSIDE.sub(lambda found: _last(found[0]), text)


def _public(value: Any, key: str) -> Any:
    if isinstance(value, str):
        return public_text(value, key)
    if isinstance(value, Mapping):
        return {name: _public(part, name) for name, part in value.items()}
    return [_public(part, key) for part in value] if isinstance(value, (list, tuple)) else value


def _last(path: str) -> str:
    """Return the last component; for an address, without its query, which may hold a key."""
    path = path.partition("?")[0] if "://" in path else path
    return re.split(r"[/\\]+", path.rstrip("/\\"))[-1]
