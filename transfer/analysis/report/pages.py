"""One HTML page with all in it, and the same pictures beside a Markdown file.

A page asks nothing of the network. Its pictures are inside it, for light and for dark.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from ....checkpoints.atomic import write_bytes
from ....checkpoints.markdown import plain
from .ink import Theme, to_png

ANALYSIS = str(__package__).rpartition(".")[0]


@dataclass(frozen=True)
class Plot:
    """A heading, what to see, and a picture; `alt` says in words what the picture shows."""

    name: str
    heading: str
    paragraph: str
    alt: str
    draw: Callable[[Theme], Figure]


def render_page(template: str, **values: object) -> str:
    """Return the page of a template, by its path in `transfer/analysis`, such as `demo/demo.html`.

    What a template shows is escaped; it extends `report/page.html`.
    """
    return _environment().get_template(template).render(values)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_read), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.globals |= {"file": lambda path: Markup(_read(path)), "image": _image}
    return environment


def _read(path: str) -> str:
    return resources.files(ANALYSIS).joinpath(path).read_text(encoding="utf-8")


def _image(plot: Plot, theme: Theme) -> str:
    return data_url(to_png(plot.draw(theme)))


def markdown_plot(plot: Plot) -> str:
    """Return heading, paragraph and picture; the picture lies in `images/`."""
    image = f"![{plain(plot.alt)}](images/{plot.name}.png)"
    return f"## {plain(plot.heading)}\n\n{plain(plot.paragraph)}\n\n{image}"


def write_pictures(plots: Iterable[Plot], folder: Path) -> None:
    """Write the plots' pictures to `folder/images`. Raises WriteFailedError as `write_file`."""
    for plot in plots:
        write_bytes(folder / "images" / f"{plot.name}.png", to_png(plot.draw("light"), ground="white"))


def data_url(png: bytes) -> str:
    """Return a PNG file as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
