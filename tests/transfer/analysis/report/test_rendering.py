"""A report is the same in each form, needs nothing beside it, and shows what a value says as text."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from graftvit.transfer.analysis.report import rendering as module
from graftvit.transfer.analysis.report.ink import INK, Line, Theme, draw_lines, new_plots, spread, to_png
from graftvit.transfer.analysis.report.rendering import Figure, Report, Text, compose
from graftvit.transfer.analysis.report.tables import Table, tabulate, to_json
from markupsafe import Markup
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure as Drawing
from PIL import Image

TEMPLATE = """\
# Of {{ name }}

The first paragraph says
{{ name }}.

{{ table }}
> A note on {{ name }}.

{{ figures[0] }}
{{ formula }}

## How to go on

```bash
# a comment

a command
```
"""
HOSTILE = "<b>|`x`</b>\n\n# not a title"
TABLE = Table(
    ["who", "points", "why"], [["all"], ["one | two", 3, "<i>"], ["three", None, "so"]], words=["why"]
)


def draw(theme: Theme) -> Drawing:
    figure, (axes,) = new_plots(theme, (2.0, 1.0))
    axes.plot([0, 1])
    return figure


FIGURE = Figure("curve", "A curve", "It rises.", 'A line "up".', draw)


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Report:
    read = module._read
    monkeypatch.setattr(module, "_read", lambda path: TEMPLATE if path == "given" else read(path))
    formula = Markup("<math><mi>x</mi></math>")
    return compose("given", name=HOSTILE, table=TABLE, figures=[FIGURE], formula=formula)


class Page(HTMLParser):
    """The tags, addresses, alternative texts and words of a page; complains about tags that are not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.alts: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "srcset", "href")]
        self.alts += [value or "" for name, value in attributes if name == "alt"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_a_template_gives_blocks_in_order_and_values_open_none(report: Report) -> None:
    shown = "<b>|`x`</b> # not a title"
    assert report.blocks == [
        Text("title", f"Of {shown}"),
        Text("paragraph", f"The first paragraph says {shown}."),
        TABLE,
        Text("note", f"A note on {shown}."),
        FIGURE,
        Markup("<math><mi>x</mi></math>"),
        Text("heading", "How to go on"),
        Text("code", "# a comment\n\na command"),
    ]
    assert (report.tables, report.figures) == ([TABLE], [FIGURE])


def test_the_page_needs_nothing_beside_it_and_escapes_its_values(report: Report) -> None:
    html = report.to_page()
    page = Page(html)
    assert page.open == []
    assert len(page.addresses) == 2  # one picture, in two inks
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert page.alts == ['A line "up".']
    assert "http" not in re.sub(r"base64,[\w+/=]+|http-equiv", "", html)
    assert "prefers-color-scheme: dark" in html
    assert not {"b", "i", "script"} & {*page.tags}
    assert page.tags.count("h1") == 1
    assert page.tags.count("h2") == 2
    assert "math" in page.tags
    assert "# a comment\n\na command" in page.words
    assert '<tr><th class="group" colspan="3" scope="rowgroup">all</th></tr>' in html
    assert '<td>one | two</td><td class="number">3</td><td>&lt;i&gt;</td>' in html
    assert '<td class="number"></td>' in html, "there is no number"


def test_the_markdown_has_the_same_words_and_its_pictures_beside_it(report: Report, tmp_path: Path) -> None:
    assert report.write(tmp_path, "all") == tmp_path / "all.html"
    text = (tmp_path / "all.md").read_text()
    assert text.splitlines()[0] == r"# Of &lt;b&gt;\|\`x\`&lt;/b&gt; # not a title"
    assert (
        "| who | points | why |\n| --- | ---: | --- |\n| **all** |  |  |\n| one \\| two | 3 | &lt;i&gt; |"
        in text
    )
    assert '## A curve\n\nIt rises.\n\n![A line "up".](images/curve.png)' in text
    assert "```bash\n# a comment\n\na command\n```" in text
    assert (tmp_path / "images" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "all.html").read_text() == report.to_page()


def test_a_table_is_csv_and_columns_of_a_terminal_and_data_is_json() -> None:
    table = tabulate([1, 20], {"n": str, "square": lambda n: n * n, "of": lambda n: None})
    assert table.to_csv() == "n,square,of\n1,1,\n20,400,\n"
    text = Table(["n", "square"], [["all"], ["1", 1], ["20", 400]]).to_text()
    assert text == "n    square\nall\n1         1\n20      400\n"
    assert json.loads(to_json({"a": [1, None]})) == {"a": [1, None]}


def test_lines_are_drawn_with_band_and_ring_on_one_scale() -> None:
    line = Line(
        "up", [1, 10, 100], [1.0, 10.0, 100.0], "#123456", band=([0.5, 5, 50], [2, 20, 200]), ring=31.6
    )
    figure = draw_lines({"left": [line], "right": [line, line]}, "light", ("x", "y"), log=True)
    left, right = figure.axes
    assert (left.get_title(), right.get_title()) == ("left", "right")
    assert left.get_xscale() == left.get_yscale() == "log"
    assert left.lines[0].get_color() == "#123456"
    assert [label.get_text() for label in left.get_xticklabels()] == ["1", "10", "100"]
    (ring,) = (each for each in left.lines if len(each.get_xdata()) == 1)
    assert ring.get_ydata()[0] == pytest.approx(31.6)
    (band,) = (each for each in left.collections if isinstance(each, PolyCollection))
    assert (band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()) == (0.5, 200)
    assert left.get_ylim() == right.get_ylim()
    assert (left.get_legend() is None, right.get_legend() is None) == (True, False)
    stacked = draw_lines({"a": [line], "b": [line]}, "dark", ("x", "y"), stacked=True, limits=(0, 7))
    assert all(axes.get_legend() for axes in stacked.axes)
    assert stacked.axes[0].get_ylim() == (0, 7)


def test_a_line_without_dashes_has_only_its_points() -> None:
    lines = [Line("up", [0, 1], [0, 1], "red", dashes) for dashes in ("", "--")]
    (axes,) = draw_lines({"": lines}, "light", ("x", "y")).axes
    assert [(line.get_linestyle(), line.get_marker()) for line in axes.lines] == [("None", "o"), ("--", "o")]


@pytest.mark.parametrize("most", [1.3, 9.0, 50.0, 3e5])
def test_a_logarithmic_axis_has_named_ticks(most: float) -> None:
    line = Line("up", [1, 2], [0.55, 0.55 * most], "red")
    (axes,) = draw_lines({"": [line]}, "light", ("x", "y"), log=True).axes
    low, high = axes.get_ylim()
    shown = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert 2 <= len(shown) <= 20
    assert all(f"{tick:g}" == axes.yaxis.get_major_formatter()(tick) for tick in shown)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_ground_is_transparent_and_the_ink_is_that_of_the_theme(theme: Theme) -> None:
    figure = draw_lines({"": [Line("up", [0, 1], [0, 1], "red")]}, theme, ("x", "y"))
    assert figure.axes[0].xaxis.label.get_color() == INK[theme]
    assert np.asarray(Image.open(io.BytesIO(to_png(figure))))[0, 0, 3] == 0
    solid = Image.open(io.BytesIO(to_png(figure, ground="white")))
    assert solid.getpixel((0, 0)) == (255, 255, 255, 255)


def test_names_beside_a_plot_are_moved_apart_as_little_as_possible() -> None:
    np.testing.assert_allclose(spread([0.2, 0.5, 0.5, 0.9], 0.2), [0.2, 0.4, 0.6, 0.9])
    np.testing.assert_allclose(spread([0.0, 0.0, 1.0, 1.0], 0.1, 0.0, 1.0), [0.0, 0.1, 0.9, 1.0])
