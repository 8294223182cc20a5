"""The demo's report: `report.html`, one file with all in it, and `report.md` with images beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ....checkpoints.atomic import write_bytes, write_text
from ..report import pages
from ..report.ink import to_png
from ..report.tables import markdown
from . import report_text as text
from .curve_figures import COLORS, Curve, Panel, draw_curves, draw_divergence
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
TABLE_HEAD = ("method", "top-1", "against scratch")
STYLE = """\
main { max-width: 860px; }
th.teacher { color: var(--ink); font-size: .95rem; padding-top: 1.6rem; }
td:first-child { min-width: 11em; font-weight: 400; }
td.number strong { font-size: 1.05rem; }
td.number:nth-child(4), td .what { color: var(--soft); font-size: .87rem; }
td .what { display: block; line-height: 1.4; }
.dot { display: inline-block; width: .62em; height: .62em; border-radius: 50%; margin-right: .5em; }
.bar { display: block; height: 5px; border-radius: 3px; margin-top: .3rem; }"""


def write_report(results: DemoResults, folder: Path) -> Path:
    """Write `report.md` with `images/`, and `report.html`, in `folder`; returns the path of the HTML file.

    The HTML file needs nothing beside it: its images are inside it, in a light and a dark form.
    """
    sections = report_sections(results)
    pages.write_pictures(sections, folder)
    write_bytes(folder / "images" / "summary.png", _summary(results))
    write_text(folder / "report.md", render_markdown(results, sections))
    write_text(folder / "report.html", render_html(results, sections))
    return folder / "report.html"


def report_sections(results: DemoResults) -> list[pages.Section]:
    """Learning curves, attention maps and divergence, each with what to see in it."""
    curves, divergences = _curves(results), _divergences(results)
    return [
        pages.Section(
            "curves",
            "Learning",
            text.CURVES,
            text.curves_alt(results),
            lambda theme: draw_curves(curves, theme),
        ),
        pages.Section(
            "maps",
            "Where they look",
            text.MAPS,
            text.maps_alt(results),
            lambda theme: draw_gazes(results.gazes, GAZE_TITLES, theme),
        ),
        pages.Section(
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


def table_groups(results: DemoResults) -> list[tuple[str | None, list[MethodResult]]]:
    """Return the methods of the table with the heading of each teacher; training from scratch has none."""
    taught = [(text.teacher_title(results, teacher), results.of(teacher)) for teacher in TEACHERS]
    return [(None, [results.scratch]), *taught]


def table_row(results: DemoResults, method: MethodResult) -> list[str]:
    """Return the cells of a method below `TABLE_HEAD`."""
    return [method.title, text.percent(method), text.against_scratch(results, method)]


def render_markdown(results: DemoResults, sections: Sequence[pages.Section]) -> str:
    """Return the report as Markdown; its images are in `images/`."""
    several = len(results.seeds) > 1
    head = [*TABLE_HEAD, *(f"seed {seed}" for seed in results.seeds if several)]
    rows = []
    for title, methods in table_groups(results):
        if title is not None:
            rows.append([f"**{title}**", *[""] * (len(head) - 1)])
        rows += [
            [*table_row(results, method), *(f"{value:.1f}" for value in method.top1 if several)]
            for method in methods
        ]
    parts = [f"# {text.TITLE}", text.asked(results), text.found(results), markdown(head, rows)]
    parts += [text.table_note(results), *map(pages.markdown_section, sections)]
    parts += ["## The setting", text.setting(results), "## Go on with your own images", text.OWN_IMAGES]
    parts += [f"```bash\n{text.COMMANDS}\n```", text.footer(results)]
    return "\n\n".join(parts) + "\n"


def render_html(results: DemoResults, sections: Sequence[pages.Section]) -> str:
    """Return the report as one HTML page."""
    return pages.render_page(
        text.TITLE,
        [
            pages.paragraph(text.asked(results), "lead"),
            pages.paragraph(text.found(results), "lead"),
            _html_table(results),
            pages.paragraph(text.table_note(results), "note"),
            *map(pages.html_section, sections),
            pages.heading("The setting"),
            pages.paragraph(text.setting(results)),
            pages.heading("Go on with your own images"),
            pages.paragraph(text.OWN_IMAGES),
            f"<pre><code>{pages.html_text(text.COMMANDS)}</code></pre>",
            f"<footer>{pages.html_text(text.footer(results))}</footer>",
        ],
        style=STYLE,
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
    head = [*TABLE_HEAD, *["each seed"] * (len(results.seeds) > 1)]
    rows = []
    for title, methods in table_groups(results):
        if title is not None:
            words = pages.html_text(title)
            rows.append(f'<tr><th class="teacher" colspan="{len(head)}" scope="rowgroup">{words}</th></tr>')
        rows += [pages.table_row(_html_cells(results, method)[: len(head)]) for method in methods]
    return pages.table_of(head, rows)


def _html_cells(results: DemoResults, method: MethodResult) -> list[str]:
    """Return name and what it does, mean and deviation, the difference, the single seeds."""
    color = COLORS[method.method]
    title, percent, versus = map(pages.html_text, table_row(results, method))
    return [
        f'<span class="dot" style="background:{color}"></span>{title}'
        f'<span class="what">{pages.html_text(text.WHAT[method.method])}</span>',
        f"<strong>{percent}</strong>"
        f'<span class="bar" style="background:{color};width:{method.mean:.1f}%"></span>',
        versus,
        " · ".join(f"{value:.1f}" for value in method.top1),
    ]
