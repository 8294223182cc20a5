"""What a job was submitted for that is no run: a command, and what it writes."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

ORDER_FILE = "command.json"
"""In `jobs/`: what the job was submitted for."""


@dataclass(frozen=True)
class Order:
    """A command as it was submitted."""

    words: list[str]
    output: str | None
    """The file or folder that it writes, from `/`; None where it only prints."""

    @property
    def line(self) -> str:
        """As a user would type it."""
        return shlex.join(["graftvit", *self.words])


def read_order(folder: Path) -> Order | None:
    """What was submitted to a folder that is no run's; None for a run."""
    try:
        return Order(**json.loads((folder / "jobs" / ORDER_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
