"""What a comparison leaves: tables as CSV, JSON and Markdown, plots, and one HTML page with all in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ....checkpoints.atomic import write_text
from ....checkpoints.markdown import plain
from ..report import pages
from . import comparison_tables as tables
from .cell_record import Record
from .comparison_plots import plots_of
from .comparison_text import TITLE, answer, how_to_read, question

if TYPE_CHECKING:
    from .compare import Comparison

NAME = "compare"


def write_report(comparison: Comparison, *, figures: bool = True) -> Path:
    """Write `compare.csv`, `.json` and `.md`, and with `figures` also `images/` and `compare.html`.

    All numbers are those of the cells on the disk. Returns the path of the page, or of the table without figures.
    Raises WriteFailedError as `write_file`.
    """
    folder, records = comparison.folder, comparison.records()
    plots = plots_of(records) if figures else []
    write_text(folder / f"{NAME}.csv", tables.records_csv(records))
    write_text(folder / f"{NAME}.json", tables.records_json(records))
    write_text(folder / f"{NAME}.md", render_markdown(records, plots))
    if not figures:
        return folder / f"{NAME}.md"
    pages.write_pictures(plots, folder)
    write_text(folder / f"{NAME}.html", render_html(records, plots))
    return folder / f"{NAME}.html"


def render_markdown(records: Sequence[Record], plots: Sequence[pages.Plot]) -> str:
    """Return the report as Markdown; its images are in `images/`."""
    first, second, note = (plain(words(records)) for words in (question, answer, how_to_read))
    table = tables.to_markdown(records).strip()
    return "\n\n".join(filter(None, [first, second, table, note, *map(pages.markdown_plot, plots)])) + "\n"


def render_html(records: Sequence[Record], plots: Sequence[pages.Plot]) -> str:
    """Return the page with both tables, the plots and the failures."""
    return pages.render_page(
        "compare/comparison.html",
        title=TITLE,
        question=question(records),
        answer=answer(records),
        accuracy=tables.accuracy_table(records),
        cost=tables.cost_table(records),
        failures=tables.failures(records),
        note=how_to_read(records),
        plots=plots,
    )
