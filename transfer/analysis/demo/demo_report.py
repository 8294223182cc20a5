"""The demo's report: `report.html`, one file with all in it, and `report.md` with images beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ....checkpoints.atomic import write_bytes, write_text
from ..report import pages
from ..report.ink import to_png
from ..report.tables import markdown
from . import report_text as text
from .curve_figures import COLORS, Curve, Panel, draw_curves, draw_divergence
from .demo_cells import TEACHERS, TeacherName
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


def write_report(results: DemoResults, folder: Path) -> Path:
    """Write `report.md` with `images/`, and `report.html`, in `folder`; returns the path of the HTML file.

    The HTML file needs nothing beside it: its images are inside it, in a light and a dark form.
    """
    plots = report_plots(results)
    pages.write_pictures(plots, folder)
    write_bytes(folder / "images" / "summary.png", _summary(results))
    write_text(folder / "report.md", render_markdown(results, plots))
    write_text(folder / "report.html", render_html(results, plots))
    return folder / "report.html"


def report_plots(results: DemoResults) -> list[pages.Plot]:
    """Return learning curves, attention maps and divergence, each with what to see in it."""
    learning, far = (
        [Panel(TEACHER_TITLES[name], list(curves(results, name))) for name in TEACHERS]
        for curves in (_curves, _divergences)
    )
    gazes = partial(draw_gazes, results.gazes, GAZE_TITLES)
    return [
        pages.Plot(
            "curves", "Learning", text.CURVES, text.curves_alt(results), partial(draw_curves, learning)
        ),
        pages.Plot("maps", "Where they look", text.MAPS, text.maps_alt(results), gazes),
        pages.Plot(
            "divergence",
            "How far from the teacher",
            text.DIVERGENCE,
            text.divergence_alt(results),
            partial(draw_divergence, far),
        ),
    ]


def _curves(results: DemoResults, teacher: TeacherName) -> Iterator[Curve]:
    for method in (results.scratch, *results.of(teacher)):
        if len(method.curve) > 0:
            yield Curve(method.method, SHORT_TITLES[method.method], method.steps, np.asarray(method.curve))


def _divergences(results: DemoResults, teacher: TeacherName) -> Iterator[Curve]:
    for method, rows in results.divergences[teacher].items():
        yield Curve(method, SHORT_TITLES[method], range(1, len(rows[0]) + 1), np.asarray(rows))


def table_groups(results: DemoResults) -> list[tuple[str | None, list[MethodResult]]]:
    """Return the methods of the table with the heading of each teacher; training from scratch has none."""
    taught = [(text.teacher_title(results, teacher), results.of(teacher)) for teacher in TEACHERS]
    return [(None, [results.scratch]), *taught]


def table_row(results: DemoResults, method: MethodResult) -> list[str]:
    """Return the cells of a method below `TABLE_HEAD`."""
    return [method.title, text.percent(method), text.against_scratch(results, method)]


def render_markdown(results: DemoResults, plots: Sequence[pages.Plot]) -> str:
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
    parts = [f"# {text.TITLE}", text.question(results), text.answer(results), markdown(head, rows)]
    parts += [text.table_note(results), *map(pages.markdown_plot, plots)]
    parts += ["## The setting", text.setting(results), "## Go on with your own images", text.OWN_IMAGES]
    parts += [f"```bash\n{text.COMMANDS}\n```", text.footer(results)]
    return "\n\n".join(parts) + "\n"


def render_html(results: DemoResults, plots: Sequence[pages.Plot]) -> str:
    """Return the report as one HTML page."""
    return pages.render_page(
        "demo/demo.html",
        title=text.TITLE,
        text=text,
        results=results,
        plots=plots,
        head=TABLE_HEAD,
        groups=table_groups(results),
        colors=COLORS,
    )


def _summary(results: DemoResults) -> bytes:
    """Draw accuracies and the maps of the last layer in one small picture, for a README."""
    rows = [_summary_row(results.scratch)]
    for teacher in TEACHERS:
        rows += [SummaryRow(TEACHER_TITLES[teacher]), *map(_summary_row, results.of(teacher))]
    last = [gaze for gaze in results.gazes if gaze.layer == results.gazes[-1].layer]
    return to_png(draw_summary(rows, last, GAZE_TITLES, "light"), ground="white", dots_per_inch=130)


def _summary_row(method: MethodResult) -> SummaryRow:
    return SummaryRow(SHORT_TITLES[method.method], method.method, method.top1)
