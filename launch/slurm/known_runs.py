"""The runs that this user has submitted, one absolute folder a line, for `graftvit jobs`.

Lines are only added, so that two shells need no lock: a line with `-` in front removes a folder from the list. The
folder itself stays as it is.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ...checkpoints.files import UnreadableError, read_regular
from ...checkpoints.json_lines import append_line, open_lines

logger = logging.getLogger(__name__)


def registry_file() -> Path:
    """`$XDG_STATE_HOME/graftvit/runs.txt`."""
    root = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(root) / "graftvit" / "runs.txt"


def remember(folder: Path) -> None:
    """Add a run. A home that cannot be written keeps no run from being submitted: then there is a warning."""
    try:
        _add(f"{plain(folder)}")
    except OSError as error:
        logger.warning(
            "%s cannot be written (%s): name the run to `graftvit jobs`", registry_file(), error.strerror
        )


def forget(folder: Path) -> None:
    """Take a run out of the list; nothing of the run itself is touched. Raises OSError."""
    _add(f"-{plain(folder)}")


def listed() -> list[Path]:
    """Return all listed runs, existing or not; the last submitted one at the end."""
    try:
        lines = read_regular(registry_file(), errors="replace", refusal=UnreadableError).split("\n")
    except OSError:
        return []
    found: dict[Path, None] = {}
    for line in filter(None, lines):
        folder = plain(Path(line.removeprefix("-")))
        found.pop(folder, None)
        if not line.startswith("-"):
            found[folder] = None
    return list(found)


def known() -> list[Path]:
    """Return the runs that still exist, the last submitted one at the end."""
    return [folder for folder in listed() if folder.is_dir()]


def plain(folder: Path) -> Path:
    """Return the absolute folder without `..`, which behind a link leads elsewhere than the text says."""
    folder = folder.absolute()
    return folder.resolve() if ".." in folder.parts else folder


def _add(line: str) -> None:
    path = registry_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_lines(path) as file:
        append_line(file, line)
