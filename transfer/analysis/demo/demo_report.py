"""The demo's report: `report.html`, one file with all in it, and `report.md` with images beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ....checkpoints.atomic import write_bytes, write_text
from ....checkpoints.preprocessing import Preprocessing
from ....checkpoints.pretrained import load_pretrained
from ....models.families import token_layout
from ....models.parts import unfold_patches
from ...data.loaders import EvalLoader, create_eval_loader, create_train_loader
from ...metrics.measure import evaluate
from ..layer_maps import attention_maps, divergence_by_layer
from ..report import pages
from ..report.ink import to_png
from ..report.tables import markdown
from . import demo_cells as text
from .demo_cells import (
    COLORS,
    SHORT_TITLES,
    STUDENTS,
    TEACHER_TITLES,
    TEACHERS,
    Cell,
    Curve,
    DemoResults,
    Gaze,
    MethodResult,
    Panel,
    SummaryRow,
    TeacherName,
    draw_curves,
    draw_divergence,
    draw_gazes,
    draw_summary,
)

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


# From the demo's finished cells to its results: accuracies, curves, the ensemble, maps and divergences.

SHOWN_CLASSES = (0, 3, 8)
SHOWN_LAYERS = (1, 3)
ENSEMBLE = ("finetune", "distill")
"""The methods of the masked autoencoder's students whose probabilities are averaged."""


@dataclass(frozen=True)
class TestSet:
    """All test images as the models want them, (T, C, H, W), with their classes (T,)."""

    loader: EvalLoader
    images: Tensor
    targets: Tensor


def measure(cells: Sequence[Cell], quick: bool) -> DemoResults:
    """Read the finished `demo_cells`, and compute the ensemble and the attention maps."""
    made = {cell.teacher: cell for cell in cells if cell.method == "teacher" and cell.teacher is not None}
    runs = {
        (method, teacher): [cell for cell in cells if (cell.method, cell.teacher) == (method, teacher)]
        for method, teacher in STUDENTS
    }
    loaded = {name: load_student(made[name]) for name in TEACHERS}
    teachers = {name: model for name, (model, _) in loaded.items()}
    spec = loaded["supervised"][1]
    scratch = runs["scratch", None]
    test = load_test_set(scratch[0], spec)
    methods = [_method(found) for found in runs.values()]
    divergences = {}
    for name, teacher in teachers.items():
        shown = {method: found for (method, of), found in runs.items() if of in (name, None)}
        divergences[name] = _measure_divergences(teacher, shown, test.images)
    together = zip(*(runs[method, "mae"] for method in ENSEMBLE), strict=True)
    top1 = [ensemble_top1(pair, test.loader) for pair in together]
    methods.append(MethodResult("ensemble", "mae", top1))
    distilled = {name: load_student(runs["distill", name][0])[0] for name in TEACHERS}
    return DemoResults(
        methods=methods,
        divergences=divergences,
        gazes=find_gazes(
            {
                "supervised": teachers["supervised"],
                "distill_supervised": distilled["supervised"],
                "mae": teachers["mae"],
                "distill_mae": distilled["mae"],
                "scratch": load_student(scratch[0])[0],
            },
            test,
        ),
        seeds=[cell.seed for cell in scratch if cell.seed is not None],
        labels=scratch[0].config.data.train_samples or 0,
        all_labels=create_train_loader(made["supervised"].config.data, spec, seed=0).num_samples,
        test_images=len(test.images),
        teacher_top1=made["supervised"].curve()[-1][1],
        teacher_steps={name: int(made[name].records()[-1]["step"]) for name in TEACHERS},
        student_steps=int(scratch[0].records()[-1]["step"]),
        minutes=sum(record["seconds"] for cell in cells for record in cell.records()) / 60,
        quick=quick,
    )


def load_student(cell: Cell) -> tuple[nn.Module, Preprocessing]:
    """Load the student of a run, frozen, and the preprocessing of its images."""
    loaded = load_pretrained(f"local-dir:{cell.folder / 'student'}")
    return loaded.model, loaded.preprocessing


def load_test_set(cell: Cell, spec: Preprocessing) -> TestSet:
    """Load the images that a run was evaluated on, without padding."""
    loader = create_eval_loader(cell.config.data, spec)
    batches = [(images[valid], targets[valid]) for images, targets, valid in loader]
    images, targets = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    return TestSet(loader, images, targets)


def ensemble_top1(cells: Sequence[Cell], loader: EvalLoader) -> float:
    """Return the accuracy, in percent, of the mean of the models' probabilities."""
    models = {cell.method: load_student(cell)[0] for cell in cells}
    return evaluate(models, loader)["ensemble"].top1


def find_gazes(models: Mapping[str, nn.Module], test: TestSet) -> list[Gaze]:
    """Find where the brightest patch of the first test image of three classes looks, mean over heads."""
    layout = token_layout(next(iter(models.values())))
    chosen = [int((test.targets == target).nonzero()[0]) for target in SHOWN_CLASSES]
    images = test.images[chosen]
    patch = (images.shape[2] // layout.grid[0], images.shape[3] // layout.grid[1])
    queries = unfold_patches(images, patch).mean(dim=-1).argmax(dim=1).tolist()
    maps = {name: attention_maps(model, images, SHOWN_LAYERS) for name, model in models.items()}
    gazes = []
    for place, query in enumerate(queries):
        for layer in SHOWN_LAYERS:
            rows = {
                name: by_layer[layer][place].mean(dim=0)[layout.num_prefix + query, layout.num_prefix :]
                for name, by_layer in maps.items()
            }
            gazes.append(
                Gaze(
                    image=images[place].mean(dim=0).numpy(),
                    query=divmod(query, layout.grid[1]),
                    layer=f"layer {layer + 1}",
                    maps={name: row.reshape(layout.grid).numpy() for name, row in rows.items()},
                )
            )
    return gazes


def _method(cells: Sequence[Cell]) -> MethodResult:
    curves = [cell.curve() for cell in cells]
    return MethodResult(
        cells[0].method,
        cells[0].teacher,
        top1=[curve[-1][1] for curve in curves],
        steps=[step for step, _ in curves[0]],
        curve=[[top1 for _, top1 in curve] for curve in curves],
    )


def _measure_divergences(
    teacher: nn.Module, runs: Mapping[str, Sequence[Cell]], images: Tensor
) -> dict[str, list[list[float]]]:
    """Return divergences by method, seed and layer. A copying student attends by the teacher's maps."""
    return {
        method: [
            divergence_by_layer(teacher, teacher if method == "copy" else load_student(cell)[0], images)
            for cell in cells
        ]
        for method, cells in runs.items()
    }
