"""The demo's report: `report.html`, one file with all in it, and `report.md` with images beside it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

import numpy as np
from matplotlib.figure import Figure

from . import report_text as text
from .curve_figures import COLOURS, Curve, Panel, Theme, draw_curves, draw_divergence, to_png
from .demo_cells import TEACHERS
from .gaze_figures import SummaryRow, draw_gazes, draw_summary
from .results import SHORT_TITLES, TEACHER_TITLES, DemoResults, MethodResult

GAZE_TITLES = {
    "supervised": "teacher,\nlabels",
    "distill_supervised": "distilled\nfrom it",
    "mae": "teacher,\nno label",
    "distill_mae": "distilled\nfrom it",
    "scratch": "scratch",
}


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph and a picture; `alt` says in words what the picture shows."""

    name: str
    heading: str
    paragraph: str
    alt: str
    draw: Callable[[Theme], Figure]


def write_report(results: DemoResults, folder: Path) -> Path:
    """Writes `report.md` with `images/`, and `report.html`, in `folder`; returns the path of the HTML file.

    The HTML file needs nothing beside it: its images are inside it, in a light and a dark form.
    """
    sections = report_sections(results)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for section in sections:
        (images / f"{section.name}.png").write_bytes(to_png(section.draw("light"), ground="white"))
    (images / "summary.png").write_bytes(_summary(results))
    (folder / "report.md").write_text(render_markdown(results, sections), encoding="utf-8")
    report = folder / "report.html"
    report.write_text(render_html(results, sections), encoding="utf-8")
    return report


def report_sections(results: DemoResults) -> list[Section]:
    """Learning curves, attention maps and divergence, each with what to see in it."""
    curves, divergences = _curves(results), _divergences(results)
    return [
        Section(
            "curves",
            "Learning",
            text.CURVES,
            text.curves_alt(results),
            lambda theme: draw_curves(curves, theme),
        ),
        Section(
            "maps",
            "Where they look",
            text.MAPS,
            text.maps_alt(results),
            lambda theme: draw_gazes(results.gazes, GAZE_TITLES, theme),
        ),
        Section(
            "divergence",
            "How far from the teacher",
            text.DIVERGENCE,
            text.divergence_alt(results),
            lambda theme: draw_divergence(divergences, theme),
        ),
    ]


def _curves(results: DemoResults) -> list[Panel]:
    return [
        Panel(
            TEACHER_TITLES[teacher],
            [
                Curve(m.method, SHORT_TITLES[m.method], m.steps, np.asarray(m.curve))
                for m in (results.scratch, *results.of(teacher))
                if len(m.curve) > 0
            ],
        )
        for teacher in TEACHERS
    ]


def _divergences(results: DemoResults) -> list[Panel]:
    return [
        Panel(
            TEACHER_TITLES[teacher],
            [
                Curve(method, SHORT_TITLES[method], range(1, len(rows[0]) + 1), np.asarray(rows))
                for method, rows in results.divergences[teacher].items()
            ],
        )
        for teacher in TEACHERS
    ]


def render_markdown(results: DemoResults, sections: Sequence[Section]) -> str:
    """The report as Markdown; its images are in `images/`."""
    seeds = [f"seed {seed}" for seed in results.seeds] if len(results.seeds) > 1 else []
    rows = [["method", "top-1", "against scratch", *seeds]]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    rows.append(_markdown_row(results, results.scratch))
    for teacher in TEACHERS:
        rows.append([f"**{text.teacher_title(results, teacher)}**", *[""] * (len(rows[0]) - 1)])
        rows += [_markdown_row(results, method) for method in results.of(teacher)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    parts = [f"# {text.TITLE}", text.asked(results), text.found(results), table, text.table_note(results)]
    for section in sections:
        image = f"![{section.alt}](images/{section.name}.png)"
        parts += [f"## {section.heading}", section.paragraph, image]
    parts += ["## The setting", text.setting(results)]
    parts += [
        "## Go on with your own images",
        text.OWN_IMAGES,
        f"```bash\n{text.COMMANDS}\n```",
        text.footer(results),
    ]
    return "\n\n".join(parts) + "\n"


def _markdown_row(results: DemoResults, method: MethodResult) -> list[str]:
    each = [f"{value:.1f}" for value in method.top1] if len(results.seeds) > 1 else []
    return [method.title, text.percent(method), text.against_scratch(results, method), *each]


def render_html(results: DemoResults, sections: Sequence[Section]) -> str:
    """The report as one HTML page."""
    template = resources.files(__package__).joinpath("demo.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=_escape(text.TITLE),
        asked=_escape(text.asked(results)),
        found=_escape(text.found(results)),
        table=_html_table(results),
        table_note=_escape(text.table_note(results)),
        sections="\n".join(_html_section(section) for section in sections),
        setting=_escape(text.setting(results)),
        own_images=_escape(text.OWN_IMAGES),
        commands=_escape(text.COMMANDS),
        footer=_escape(text.footer(results)),
    )


def _summary(results: DemoResults) -> bytes:
    """Accuracies and the maps of the last layer in one small picture, for a README."""
    rows = [_summary_row(results.scratch)]
    for teacher in TEACHERS:
        rows += [SummaryRow(TEACHER_TITLES[teacher]), *map(_summary_row, results.of(teacher))]
    last = [gaze for gaze in results.gazes if gaze.layer == results.gazes[-1].layer]
    return to_png(draw_summary(rows, last, GAZE_TITLES, "light"), ground="white", dots_per_inch=130)


def _summary_row(method: MethodResult) -> SummaryRow:
    return SummaryRow(SHORT_TITLES[method.method], method.method, method.top1)


def _html_table(results: DemoResults) -> str:
    rows = [_html_row(results, results.scratch)]
    columns = 4 if len(results.seeds) > 1 else 3
    for teacher in TEACHERS:
        title = _escape(text.teacher_title(results, teacher))
        rows.append(f'<tr><th class="teacher" colspan="{columns}" scope="rowgroup">{title}</th></tr>')
        rows += [_html_row(results, method) for method in results.of(teacher)]
    body = "\n".join(rows)
    each = '<th class="number">each seed</th>' if len(results.seeds) > 1 else ""
    return (
        '<div class="scroll"><table>\n<thead><tr><th>method</th><th class="number">top-1</th>'
        f'<th class="number">against scratch</th>{each}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def _html_row(results: DemoResults, method: MethodResult) -> str:
    """Name and what it does, mean and deviation, the difference, the single seeds."""
    colour = COLOURS[method.method]
    name = f'<span class="dot" style="background:{colour}"></span>{_escape(method.title)}'
    each = " · ".join(f"{value:.1f}" for value in method.top1)
    cells = [
        f'<td>{name}<span class="what">{_escape(text.WHAT[method.method])}</span></td>',
        f'<td class="number"><strong>{_escape(text.percent(method))}</strong>'
        f'<span class="bar" style="background:{colour};width:{method.mean:.1f}%"></span></td>',
        f'<td class="number">{text.against_scratch(results, method)}</td>',
    ]
    if len(results.seeds) > 1:
        cells.append(f'<td class="number each">{each}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _html_section(section: Section) -> str:
    """The picture in two inks; the reader's light or dark setting chooses."""
    light, dark = (_data_url(to_png(section.draw(theme))) for theme in ("light", "dark"))
    return (
        f"<h2>{_escape(section.heading)}</h2>\n<p>{_escape(section.paragraph)}</p>\n<figure><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{escape(section.alt)}" src="{light}"></picture></figure>'
    )


def _escape(words: str) -> str:
    return escape(words, quote=False)


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
