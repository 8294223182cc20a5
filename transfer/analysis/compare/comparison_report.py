"""What a comparison leaves: tables as CSV, JSON and Markdown, plots, and one HTML page with all in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ....checkpoints.atomic import write_file
from ....checkpoints.markdown import plain
from ..benchmark.cases import write_text
from . import comparison_tables as table
from .cell_record import Record
from .comparison_page import render_html
from .comparison_plots import Plot, plots_of, to_png
from .comparison_text import asked, found, how_to_read

if TYPE_CHECKING:
    from .compare import Comparison

NAME = "compare"


def write_report(comparison: Comparison, *, figures: bool = True) -> Path:
    """Writes `compare.csv`, `.json` and `.md`, and with `figures` also `images/` and `compare.html`.

    All numbers are those of the cells on the disk. Returns the path of the page, or of the table without figures.
    Raises WriteFailedError as `write_file`.
    """
    folder, records = comparison.folder, comparison.records()
    write_text(folder / f"{NAME}.csv", table.to_csv(records))
    write_text(folder / f"{NAME}.json", table.to_json(records))
    plots = plots_of(records) if figures else []
    write_text(folder / f"{NAME}.md", render_markdown(records, plots))
    if not figures:
        return folder / f"{NAME}.md"
    for plot in plots:
        _write_bytes(folder / "images" / f"{plot.name}.png", to_png(plot.draw("light"), ground="white"))
    page = folder / f"{NAME}.html"
    write_text(page, render_html(records, plots))
    return page


def render_markdown(records: Sequence[Record], plots: Sequence[Plot]) -> str:
    """The report as Markdown; its images are in `images/`."""
    said = [plain(words(records)) for words in (asked, found, how_to_read)]
    parts = [*said[:2], table.to_markdown(records).strip(), said[2]]
    for plot in plots:
        parts += [
            f"## {plain(plot.heading)}",
            plain(plot.paragraph),
            f"![{plain(plot.alt)}](images/{plot.name}.png)",
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _write_bytes(path: Path, data: bytes) -> None:
    write_file(path, lambda temporary: _put(temporary, data), size=len(data))


def _put(path: Path, data: bytes) -> None:
    path.write_bytes(data)
