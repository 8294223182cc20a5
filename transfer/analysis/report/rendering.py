"""A report: text, tables and figures that a template puts in order, written as a page and as Markdown.

The template is text for jinja2 in a small part of Markdown: blocks between blank lines, `#` and `##` before a heading,
`>` before a note, and fences around code. A table, a figure or a formula among its values becomes a block of its own.
What a value says is text in one line, which each renderer escapes; a template begins no block with one.

A page asks nothing of the network. Its pictures are inside it, for light and for dark; those of Markdown lie beside it.
"""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, TypeAlias

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure as Drawing

from ....checkpoints.atomic import write_bytes, write_text
from ....checkpoints.markdown import LONGEST, fenced, plain
from ....models.errors import one_sentence
from .ink import Theme, to_png
from .tables import Table

ANALYSIS = str(__package__).rpartition(".")[0]
MARK = re.compile("\0(\\d+)")
STARTS: dict[str, Kind] = {"# ": "title", "## ": "heading", "> ": "note"}


@dataclass(frozen=True)
class Figure:
    """A picture below its heading and caption; `alt` says in words what it shows."""

    name: str
    heading: str
    caption: str
    alt: str
    draw: Callable[[Theme], Drawing]


@dataclass(frozen=True)
class Text:
    """Words of one kind; code keeps its lines."""

    kind: Kind
    words: str


Kind: TypeAlias = Literal["title", "heading", "note", "paragraph", "code"]
Block: TypeAlias = Text | Table | Figure | Markup
"""Markup is a formula, which a page shows and Markdown leaves out."""


@dataclass(frozen=True)
class Report:
    """The blocks in order, the first of which is the title."""

    blocks: Sequence[Block]

    @property
    def title(self) -> str:
        return next(block.words for block in self.blocks if isinstance(block, Text))

    @property
    def figures(self) -> list[Figure]:
        return [block for block in self.blocks if isinstance(block, Figure)]

    @property
    def tables(self) -> list[Table]:
        return [block for block in self.blocks if isinstance(block, Table)]

    def to_page(self) -> str:
        """Return one HTML page with all in it."""
        return render_page("report/page.html", title=self.title, blocks=self.blocks[1:])

    def to_markdown(self) -> str:
        """Return Markdown; its pictures are in `images/`."""
        return "\n\n".join(filter(None, map(_to_markdown, self.blocks))) + "\n"

    def write_images(self, folder: Path) -> None:
        """Write the pictures of the Markdown to `folder/images`. Raises WriteFailedError as `write_file`."""
        for figure in self.figures:
            write_png(figure, folder / "images" / f"{figure.name}.png")

    def write(self, folder: Path, name: str) -> Path:
        """Write the page, and Markdown with its pictures; return the path of the page.

        Raises WriteFailedError as `write_file`.
        """
        self.write_images(folder)
        write_text(folder / f"{name}.md", self.to_markdown())
        write_text(folder / f"{name}.html", self.to_page())
        return folder / f"{name}.html"


def compose(template: str, **values: object) -> Report:
    """Return the report of a template, by its path in `transfer/analysis`, such as `demo.txt`."""
    put: list[Block] = []

    def show(value: object) -> str:
        if isinstance(value, (Table, Figure, Markup)):
            put.append(value)
            return f"\n\n\0{len(put) - 1}\n\n"
        return "" if value is None else one_sentence(str(value), LONGEST)

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=show)
    return Report(_parse(environment.from_string(_read(template)).render(values), put))


def _parse(text: str, put: Sequence[Block]) -> list[Block]:
    blocks: list[Block] = []
    for number, part in enumerate(re.split(r"^```\w*\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)):
        if number % 2:
            blocks.append(Text("code", part.rstrip("\n")))
            continue
        for lines in filter(None, (each.strip() for each in re.split(r"\n\s*\n", part))):
            mark = MARK.fullmatch(lines)
            blocks.append(put[int(mark[1])] if mark else _read_text(" ".join(lines.split())))
    return blocks


def _read_text(words: str) -> Text:
    for start, kind in STARTS.items():
        if words.startswith(start):
            return Text(kind, words.removeprefix(start))
    return Text("paragraph", words)


def _to_markdown(block: Block) -> str:
    if isinstance(block, Table):
        return block.to_markdown()
    if isinstance(block, Figure):
        image = f"![{plain(block.alt)}](images/{block.name}.png)"
        return f"## {plain(block.heading)}\n\n{plain(block.caption)}\n\n{image}"
    if isinstance(block, Text):
        start = {"title": "# ", "heading": "## "}.get(block.kind, "")
        return fenced(block.words, "bash") if block.kind == "code" else start + plain(block.words)
    return ""


def render_page(template: str, **values: object) -> str:
    """Return the page of an HTML template, by its path in `transfer/analysis`; it extends `report/page.html`.

    What a template shows is escaped.
    """
    return _pages().get_template(template).render(values)


@functools.cache
def _pages() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_read), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.globals |= {
        "file": lambda path: Markup(_read(path)),
        "image": lambda figure, theme: data_url(to_png(figure.draw(theme))),
    }
    environment.tests |= {
        "table": lambda block: isinstance(block, Table),
        "figure": lambda block: isinstance(block, Figure),
        "text": lambda block: isinstance(block, Text),
    }
    return environment


def _read(path: str) -> str:
    return resources.files(ANALYSIS).joinpath(path).read_text(encoding="utf-8")


def write_png(figure: Figure, path: Path) -> None:
    """Write a figure for light pages. Raises WriteFailedError as `write_file`."""
    write_bytes(path, to_png(figure.draw("light"), ground="white"))


def data_url(png: bytes) -> str:
    """Return a PNG file as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
