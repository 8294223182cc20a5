"""The report as one HTML page that needs nothing beside it: its pictures are inside, for light and dark."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template

from . import comparison_tables as table
from . import comparison_text as words
from .cell_record import Record
from .comparison_plots import Plot, to_png


def render_html(records: Sequence[Record], plots: Sequence[Plot]) -> str:
    """The page with both tables, the plots and the failures."""
    template = resources.files(__package__).joinpath("comparison.html").read_text(encoding="utf-8")
    failures = "".join(f"<p><strong>{_escape(line)}</strong></p>" for line in table.failures(records))
    return Template(template).substitute(
        title=_escape(words.TITLE),
        asked=_escape(words.asked(records)),
        found=_escape(words.found(records)),
        accuracy=_table(*table.accuracy_table(records)),
        cost=_table(*table.cost_table(records)),
        failures=failures,
        note=_escape(words.how_to_read(records)),
        sections="\n".join(_section(plot) for plot in plots),
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        first, *others = (_escape(cell) for cell in cells)
        numbers = "".join(f'<{tag} class="number">{cell}</{tag}>' for cell in others)
        return f"<tr><{tag}>{first}</{tag}>{numbers}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>\n<thead>{line(head, "th")}</thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _section(plot: Plot) -> str:
    """The picture in two inks; the reader's light or dark setting chooses."""
    light, dark = (_data_url(to_png(plot.draw(theme))) for theme in ("light", "dark"))
    return (
        f"<h2>{_escape(plot.heading)}</h2>\n<p>{_escape(plot.paragraph)}</p>\n<figure><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{escape(plot.alt)}" src="{light}"></picture></figure>'
    )


def _escape(text: str) -> str:
    return escape(text, quote=False)


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
