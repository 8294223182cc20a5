"""What the hub has instead of what was asked for: hints for its errors, silent where it does not say."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from huggingface_hub import constants, get_session
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

TIMEOUT = 3.0
"""Seconds; the error that the hint is for must not wait."""


def nearest_repository(repository: str) -> str | None:
    """The name on the hub that `repository` may have meant: of the same owner, else of a like one."""
    owner, _, name = repository.rpartition("/")
    siblings = {found.rpartition("/")[2] for found in _models(author=owner, limit=500)} - {name}
    near = nearest(name, sorted(siblings))
    if near is not None:
        return f"{owner}/{near}"
    return nearest(repository, [found for found in _models(search=name, limit=100) if found != repository])


def revisions(repository: str) -> list[str]:
    """The branches and tags of a repository."""
    refs = _ask(f"models/{repository}/refs")
    known = refs if isinstance(refs, dict) else {}
    return [_text(ref, "name") for kind in ("branches", "tags") for ref in known.get(kind) or []]


def file_names(repository: str, revision: str | None) -> list[str]:
    """The files of a repository."""
    info = _ask(f"models/{repository}/revision/{revision or constants.DEFAULT_REVISION}")
    files = info.get("siblings") if isinstance(info, dict) else None
    return [_text(file, "rfilename") for file in files or []]


def nearest(name: str, valid: Sequence[str]) -> str | None:
    """The one of `valid` that reads most like `name`, if any does."""
    by_lower = {one.lower(): one for one in valid}
    found = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def _models(**query: Any) -> list[str]:
    listed = _ask("models", **query)
    return [_text(model, "id") for model in listed] if isinstance(listed, list) else []


def _text(entry: Any, key: str) -> str:
    return str(entry.get(key, "")) if isinstance(entry, dict) else ""


def _ask(path: str, **query: Any) -> Any:
    """The JSON answer of one request, None for whatever goes wrong."""
    url = f"{constants.ENDPOINT}/api/{path}"
    try:
        response = get_session().get(url, params=query, headers=build_hf_headers(), timeout=TIMEOUT)
        return response.json() if response.status_code == 200 else None
    except Exception:  # a hint that fails must not hide the error that it belongs to
        return None
