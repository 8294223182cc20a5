"""A table as Markdown, as CSV, and as columns for a terminal; plain data as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ....checkpoints.markdown import plain

T = TypeVar("T")


@dataclass(frozen=True)
class Table:
    """Rows below a head; a row of a single cell is the heading of the rows below it."""

    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    words: Sequence[str] = ()
    """Columns of words beside the first one; the others are numbers, set to the right."""

    @property
    def right(self) -> list[int]:
        """Return the columns of numbers."""
        return [place for place, name in enumerate(self.head) if place and name not in self.words]

    def to_markdown(self) -> str:
        """Return the table in Markdown."""
        rule = " | ".join("---:" if place in self.right else "---" for place in range(len(self.head)))
        lines = [" | ".join(map(plain, self._filled(row, "**{}**"))) for row in (self.head, *self.rows)]
        return "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:]))

    def to_csv(self) -> str:
        """Return the table as CSV; None is an empty cell."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.head, *self.rows])
        return text.getvalue()

    def to_text(self) -> str:
        """Return the table as columns for a terminal."""
        rows = [[str(cell) for cell in self._filled(row, "{}")] for row in (self.head, *self.rows)]
        return aligned(rows, self.right)

    def _filled(self, row: Sequence[object], heading: str) -> Sequence[object]:
        empty = [""] * (len(self.head) - 1)
        return row if len(row) > 1 or not empty else [heading.format(row[0]), *empty]


def tabulate(
    items: Iterable[T], columns: Mapping[str, Callable[[T], object]], words: Sequence[str] = ()
) -> Table:
    """Return a row for each item, with a column for each function."""
    return Table(list(columns), [[value(item) for value in columns.values()] for item in items], words)


def to_json(content: object) -> str:
    """Return plain data as JSON, one value a line."""
    return json.dumps(content, indent=1) + "\n"


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Return rows as columns for a terminal; those in `right` are set to the right.

    The last column may be as long as it likes.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, ""])


def milliseconds(seconds: float) -> str:
    """Return three digits, in milliseconds."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
