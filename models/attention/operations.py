"""Multiplications and additions, counted apart: what they cost in energy differs by a factor of four."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Accounting = Literal["true", "published"]
"""How operations are counted: as they are, or as EcoFormer's tables count them (`operation_count.py`)."""


@dataclass(frozen=True)
class Operations:
    """Numbers of scalar multiplications and additions."""

    multiplications: int = 0
    additions: int = 0

    def __add__(self, other: Operations) -> Operations:
        return Operations(
            self.multiplications + other.multiplications, self.additions + other.additions
        )  # fmt: skip
