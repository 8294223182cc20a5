"""One HTML page with all in it, and the same pictures beside a Markdown file.

A page asks nothing of the network. Its pictures are inside it, for light and for dark.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from matplotlib.figure import Figure

from ....checkpoints.atomic import write_bytes
from ....checkpoints.markdown import plain
from .ink import Theme, to_png


@dataclass(frozen=True)
class Section:
    """A heading, what to see, and a picture; `alt` says in words what the picture shows."""

    name: str
    heading: str
    paragraph: str
    alt: str
    draw: Callable[[Theme], Figure]


def render_page(title: str, body: Iterable[str], *, style: str = "", script: str = "") -> str:
    """Return a page of HTML blocks, with rules of its own after those of every page."""
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=html_text(title), body="\n".join(filter(None, body)), style=style, script=script
    )


def html_text(text: str) -> str:
    """Return text with nothing in it that HTML reads."""
    return escape(text, quote=False)


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph; its `kind` is "lead", "note" or none."""
    return f'<p class="{kind}">{html_text(text)}</p>' if kind else f"<p>{html_text(text)}</p>"


def heading(text: str) -> str:
    """Return the heading of a part of the page."""
    return f"<h2>{html_text(text)}</h2>"


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; all columns but the first are numbers."""
    body = [table_row([html_text(cell) for cell in row]) for row in rows]
    return table_of([html_text(cell) for cell in head], body)


def table_of(head: Sequence[str], rows: Iterable[str]) -> str:
    """Return a table of rows that are HTML already."""
    body = "\n".join(rows)
    return (
        f'<div class="scroll"><table>\n<thead>{table_row(head, "th")}</thead>\n<tbody>\n{body}\n'
        "</tbody></table></div>"
    )


def table_row(cells: Sequence[str], tag: str = "td") -> str:
    """Return a row of cells that are HTML already."""
    first, *others = cells
    numbers = "".join(f'<{tag} class="number">{cell}</{tag}>' for cell in others)
    return f"<tr><{tag}>{first}</{tag}>{numbers}</tr>"


def html_section(section: Section) -> str:
    """Return heading, paragraph and picture."""
    return f"{heading(section.heading)}\n{paragraph(section.paragraph)}\n{html_picture(section)}"


def html_picture(section: Section) -> str:
    """Return the picture in two inks; the reader's light or dark setting chooses."""
    light, dark = (data_url(to_png(section.draw(theme))) for theme in ("light", "dark"))
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{escape(section.alt)}" src="{light}"></picture></figure>'
    )


def markdown_section(section: Section) -> str:
    """Return heading, paragraph and picture; the picture lies in `images/`."""
    image = f"![{plain(section.alt)}](images/{section.name}.png)"
    return f"## {plain(section.heading)}\n\n{plain(section.paragraph)}\n\n{image}"


def write_pictures(sections: Iterable[Section], folder: Path) -> None:
    """Write the sections' pictures to `folder/images`. Raises WriteFailedError as `write_file`."""
    for section in sections:
        write_bytes(folder / "images" / f"{section.name}.png", to_png(section.draw("light"), ground="white"))


def data_url(png: bytes) -> str:
    """Return a PNG file as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
