"""Tables and numbers as text: Markdown, CSV, JSON, and columns for a terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence

from ....checkpoints.markdown import plain


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown; all columns but the first are set to the right."""
    rule = "| --- |" + " ---: |" * (len(head) - 1)
    first, *others = (f"| {' | '.join(map(plain, row))} |" for row in (head, *rows))
    return "\n".join([first, rule, *others])


def to_csv(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return text.getvalue()


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
