"""Which runs this user has submitted: one absolute folder a line, so that `graftvit jobs` finds them."""

from __future__ import annotations

import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)


def registry_file() -> Path:
    """`$XDG_STATE_HOME/graftvit/runs.txt`."""
    root = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(root) / "graftvit" / "runs.txt"


def remember(folder: Path) -> None:
    """Adds a run. A home that cannot be written keeps no run from being submitted: then there is a warning."""
    path = registry_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{folder.absolute()}\n")
    except OSError as error:
        logger.warning("%s cannot be written (%s): name the run to `graftvit jobs`", path, error.strerror)


def known() -> list[Path]:
    """The runs that still exist, the one submitted last at the end."""
    try:
        lines = registry_file().read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    newest_first = dict.fromkeys(line for line in reversed(lines) if line)
    return [Path(line) for line in reversed(newest_first) if Path(line).is_dir()]
