"""What a comparison leaves: tables as CSV, JSON and Markdown, plots, and one HTML page with all in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ....checkpoints.atomic import write_text
from ....checkpoints.publish.card import plain
from ..report import pages
from . import comparison_tables as tables
from .cell_maps import load_maps
from .cell_record import Record
from .comparison_plots import plots_of
from .comparison_seeds import mean_over_seeds
from .comparison_text import TITLE, answer, how_to_read, question
from .map_plot import map_plot

if TYPE_CHECKING:
    from .compare import Comparison

NAME = "compare"


def write_report(comparison: Comparison, *, figures: bool = True) -> Path:
    """Write `compare.csv`, `.json` and `.md`, and with `figures` also `images/` and `compare.html`.

    All numbers are those of the cells on the disk: of each cell in CSV and JSON, means over seeds elsewhere. Returns
    the path of the page, or of the table without figures.

    Raises WriteFailedError as `write_file`.
    """
    folder, records = comparison.folder, comparison.records()
    means = mean_over_seeds(records)
    plots = [*plots_of(means), *_attention(comparison)] if figures else []
    write_text(folder / f"{NAME}.csv", tables.records_csv(records))
    write_text(folder / f"{NAME}.json", tables.records_json(records))
    write_text(folder / f"{NAME}.md", render_markdown(means, plots))
    if not figures:
        return folder / f"{NAME}.md"
    pages.write_pictures(plots, folder)
    write_text(folder / f"{NAME}.html", render_html(means, plots))
    return folder / f"{NAME}.html"


def _attention(comparison: Comparison) -> list[pages.Plot]:
    """Return the plot of the attention of the finished cells at the largest image size, if one has kept its maps."""
    records = [record for record in comparison.records() if record.error is None]
    largest = max((record.size for record in records), default=0)
    folders: dict[str, Path] = {}
    for each in records:
        if each.size == largest:
            folders.setdefault(each.name, comparison.folder / "cells" / each.folder)  # of the first seed
    plot = map_plot({name: load_maps(folder) for name, folder in folders.items()})
    return [] if plot is None else [plot]


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
