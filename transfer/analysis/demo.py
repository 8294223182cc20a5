"""The demo: a teacher with labels and one without, students with few, and a report of what attention was worth."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure as Drawing
from rich.console import Console
from torch import Tensor, nn

from ...checkpoints.atomic import write_bytes
from ...checkpoints.preprocessing import Preprocessing
from ...checkpoints.pretrained import load_pretrained
from ...models.errors import ConfigError
from ...models.families import token_layout
from ...models.parts import unfold_patches
from ..cells import refuse_links, run_in_processes, torch_threads, usable_cores
from ..data.loaders import EvalLoader, create_eval_loader, create_train_loader
from ..metrics.measure import score_models
from .compare.comparison_plots import draw_maps, fill_maps
from .compare.student_cell import CellMaps
from .demo_cells import STUDENTS, TEACHERS, Cell, DemoData, TeacherName, demo_cells, find_data
from .layer_maps import attention_maps, divergence_by_layer
from .report.ink import (
    BLUE,
    GRAY,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    Array,
    Line,
    Panel,
    Theme,
    draw_lines,
    new_figure,
    style_axes,
    to_png,
)
from .report.rendering import Figure, Report, compose
from .report.tables import Table

COLORS = {"scratch": GRAY, "finetune": BLUE, "copy": ORANGE, "distill": GREEN, "ensemble": PURPLE}
TITLES = {
    "scratch": "Scratch",
    "copy": "Attention copy",
    "distill": "Attention distillation",
    "finetune": "Fine-tune",
    "ensemble": "Ensemble",
}
SHORT_TITLES = {
    "scratch": "scratch",
    "copy": "copied",
    "distill": "distilled",
    "finetune": "fine-tuned",
    "ensemble": "ensemble",
}
TEACHER_TITLES: dict[TeacherName, str] = {
    "supervised": "the teacher knows the labels",
    "mae": "the teacher saw no label",
}
MODELS = {
    "supervised": "teacher, labels",
    "distill_supervised": "distilled, labels",
    "mae": "teacher, no label",
    "distill_mae": "distilled, no label",
    "scratch": "scratch",
}
"""The models whose maps are shown."""


# What the demo found, in plain numbers.


@dataclass(frozen=True)
class MethodResult:
    """A method with a teacher, over the seeds. Accuracies are in percent; a curve has a row a seed."""

    method: str
    teacher: TeacherName | None
    top1: Sequence[float]
    steps: Sequence[int] = ()
    curve: Sequence[Sequence[float]] = ()

    @property
    def mean(self) -> float:
        return statistics.fmean(self.top1)

    def __str__(self) -> str:
        """Return `82.8 % ± 4.1`, the mean and the sample deviation over the seeds, or `82.8 %` for one seed."""
        spread = f" ± {statistics.stdev(self.top1):.1f}" if len(self.top1) > 1 else ""
        return f"{self.mean:.1f} %{spread}"


@dataclass(frozen=True)
class DemoResults:
    """The methods in the order of the table, and the setting that they were compared in."""

    methods: Sequence[MethodResult]
    divergences: Mapping[TeacherName, Mapping[str, Sequence[Sequence[float]]]]
    """From each teacher's maps, by method and layer, in nats: a row a seed."""
    maps: Mapping[str, CellMaps]
    """By the names of `MODELS`."""
    data: DemoData
    seeds: Sequence[int]
    labels: int
    all_labels: int
    test_images: int
    teacher_top1: float
    """Of the supervised teacher; the other one names nothing."""
    teacher_steps: Mapping[TeacherName, int]
    student_steps: int
    minutes: float
    quick: bool

    @property
    def scratch(self) -> MethodResult:
        return self.find("scratch", None)

    def find(self, method: str, teacher: TeacherName | None) -> MethodResult:
        return next(found for found in self.methods if (found.method, found.teacher) == (method, teacher))

    def of(self, teacher: TeacherName) -> list[MethodResult]:
        """Return the methods that take something from this teacher."""
        return [method for method in self.methods if method.teacher == teacher]

    def gains(self, method: MethodResult) -> list[float]:
        """Return a method's gain over training from scratch, in points, seed by seed."""
        return [ours - theirs for ours, theirs in zip(method.top1, self.scratch.top1, strict=True)]

    def gain_error(self, method: MethodResult) -> float | None:
        """Return the standard error of the mean of `gains`; None for a single seed."""
        gains = self.gains(method)
        return statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else None

    def against_scratch(self, method: MethodResult) -> str:
        """Return `+1.7 ± 0.8`: mean gain within the seeds, in points, and its standard error; empty for scratch."""
        if method.method == "scratch":
            return ""
        error = self.gain_error(method)
        mean = f"{statistics.fmean(self.gains(method)):+.1f}".replace("-", "\N{MINUS SIGN}")
        return mean if error is None else f"{mean} ± {error:.1f}"


# What the report says.


def write_report(results: DemoResults, folder: Path) -> Path:
    """Write `report.html`, and `report.md` with `images/`, in `folder`; return the path of the page."""
    summary = to_png(draw_summary(results, "light"), ground="white", dots_per_inch=130)
    write_bytes(folder / "images" / "summary.png", summary)
    return make_report(results).write(folder, "report")


def make_report(results: DemoResults) -> Report:
    """Return the finding, the table, learning curves, attention maps and divergences, and the setting."""
    return compose(
        "demo.txt",
        results=results,
        data=results.data,
        table=accuracy_table(results),
        figures=list_figures(results),
    )


def accuracy_table(results: DemoResults) -> Table:
    """Return a line a method below the heading of its teacher, with a column a seed where there are several."""
    seeds = [f"seed {seed}" for seed in results.seeds] if len(results.seeds) > 1 else []
    titles: dict[TeacherName, str] = {
        "supervised": f"The teacher knows all {results.all_labels:,} labels, "
        f"and names {results.teacher_top1:.1f} % of the test images",
        "mae": "The teacher saw no label: a masked autoencoder",
    }
    rows: list[list[str]] = [_row(results, results.scratch, seeds)]
    for teacher, title in titles.items():
        rows += [[title], *(_row(results, method, seeds) for method in results.of(teacher))]
    return Table(["method", "top-1", "against scratch", *seeds], rows)


def _row(results: DemoResults, method: MethodResult, seeds: Sequence[str]) -> list[str]:
    own = [f"{value:.1f}" for value in method.top1 if seeds]
    return [TITLES[method.method], str(method), results.against_scratch(method), *own]


def list_figures(results: DemoResults) -> list[Figure]:
    """Return learning curves, attention maps and divergence."""
    ends = ", ".join(f"{_named(m.method, m.teacher)} {m.mean:.1f} %" for m in results.methods if m.curve)
    far = ", ".join(
        f"{_named(method, teacher)} {np.mean(rows):.3f}"
        for teacher, methods in results.divergences.items()
        for method, rows in methods.items()
    )
    return [
        Figure(
            "curves",
            "Learning",
            "Accuracy on the test images while the students learn from their few labels. Lines are means over the "
            "seeds, bands one deviation.",
            f"Test accuracy over {results.student_steps} training steps; at the end {ends}.",
            partial(draw_curves, results),
        ),
        Figure(
            "maps",
            "Where they look",
            "Which patches does the outlined patch look at? Brighter is more attention, mean over the heads; a column "
            "has one scale, and the number is the largest weight. Layers are numbered from 0. The distilled students "
            "make their maps by themselves. A copying student has its teacher's by construction.",
            f"Attention maps over {results.data.things}: the image, then the teacher that knows the labels and the "
            "student distilled from it, the one that saw no label and the student distilled from that, and the "
            "scratch-trained student.",
            partial(draw_maps, results.maps, next(iter(results.maps.values()))),
        ),
        Figure(
            "divergence",
            "How far from the teacher",
            "Jensen-Shannon divergence between a student's attention maps and its teacher's, mean over "
            f"{min(results.test_images, COMPARED)} test images, heads and queries, in nats: 0 is the same map, "
            "ln 2 = 0.693 no overlap at all. Copying is 0 by construction.",
            f"Divergence from the teacher's attention by layer; mean over layers, in nats: {far}.",
            partial(draw_divergence, results),
        ),
    ]


def _named(method: str, teacher: TeacherName | None) -> str:
    of = {"supervised": " (labels)", "mae": " (no label)", None: ""}[teacher]
    return f"{SHORT_TITLES[method]}{of}"


def draw_curves(results: DemoResults, theme: Theme) -> Drawing:
    """Draw test accuracy along training, a panel a teacher: the mean over seeds, and a band of one deviation."""
    panels = {
        TEACHER_TITLES[teacher]: [
            _line(method.method, method.steps, method.curve)
            for method in (results.scratch, *results.of(teacher))
            if method.curve
        ]
        for teacher in TEACHERS
    }
    values = np.concatenate([np.asarray(method.curve) for method in results.methods if method.curve])
    low = max(values.min() - 2, values[:, -1].min() - 30)  # the first steps are alike and say little
    names = ("training step", "top-1 on the test images, %")
    limits = (float(low), float(values.max()) + 2)
    return draw_lines(panels, theme, names, size=(9.2, 3.9), ticks=False, limits=limits)


def draw_divergence(results: DemoResults, theme: Theme) -> Drawing:
    """Draw the Jensen-Shannon divergence from the teacher's maps, by layer; zero is the teacher itself."""
    panels = {
        TEACHER_TITLES[teacher]: [
            _line(method, range(len(rows[0])), rows) for method, rows in results.divergences[teacher].items()
        ]
        for teacher in TEACHERS
    }
    most = max(y for lines in panels.values() for line in lines for y in line.y)
    limits = (0.0, 1.2 * most)
    return draw_lines(panels, theme, ("layer", "divergence, nats"), size=(9.2, 3.2), limits=limits)


def _line(method: str, x: Sequence[int], rows: Sequence[Sequence[float]]) -> Line:
    values = np.asarray(rows)
    mean = values.mean(axis=0)
    deviation = values.std(axis=0, ddof=1) if len(values) > 1 else 0 * mean
    band = (mean - deviation, mean + deviation)
    return Line(SHORT_TITLES[method], x, mean, COLORS[method], band=band)


def draw_summary(results: DemoResults, theme: Theme) -> Drawing:
    """Draw accuracies on the left, a dot a seed and a stroke the mean, and the maps of the last layer on the right."""
    rows: list[tuple[str, MethodResult | None]] = [(f"scratch  {results.scratch.mean:.0f}", results.scratch)]
    for teacher in TEACHERS:
        rows.append((TEACHER_TITLES[teacher], None))
        rows += [(f"{SHORT_TITLES[each.method]}  {each.mean:.0f}", each) for each in results.of(teacher)]
    rows.reverse()
    figure = new_figure(9.2, 5.0)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(5, 4), wspace=0.03)[0]
    axes = left.subplots()
    for place, (_, method) in enumerate(rows):
        if method is not None:
            dots = {"markersize": 7, "alpha": 0.55, "markeredgewidth": 0}
            color = COLORS[method.method]
            axes.plot(method.top1, [place] * len(method.top1), "o", color=color, **dots)
            axes.plot([method.mean], [place], "|", color=color, markersize=18, markeredgewidth=3)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_yticks(range(len(rows)), [words for words, _ in rows])
    for words, (_, method) in zip(axes.get_yticklabels(), rows, strict=True):
        words.set_fontweight("bold" if method is None else "normal")
    style_axes(axes, theme, "x")
    axes.set_title("top-1, %: a dot is a seed", color=INK[theme], fontsize=10)
    shown = next(iter(results.maps.values()))
    columns = [(image, shown.layers[-1]) for image in range(len(shown.pictures))]
    grid = right.subplots(len(results.maps) + 1, len(columns), squeeze=False)
    fill_maps(grid, results.maps, shown, columns, theme)
    return figure


# From the demo's finished cells to its results: accuracies, curves, the ensemble, maps and divergences.

SHOWN_CLASSES = (0, 3, 8)
SHOWN_LAYERS = (1, 3)
COMPARED = 500
"""The test images, the first ones, on which attention maps are compared: those of thousands take gigabytes."""
ENSEMBLE = ("finetune", "distill")
"""The methods of the masked autoencoder's students whose probabilities are averaged."""
TOGETHER: tuple[str, TeacherName] = ("ensemble", "mae")
"""Their mean, as a student."""


@dataclass(frozen=True)
class TestSet:
    """The number of test images, and the first `COMPARED` as the models want them, (T, C, H, W), with their classes."""

    loader: EvalLoader
    count: int
    images: Tensor
    targets: Tensor


def measure(cells: Sequence[Cell], data: DemoData, quick: bool) -> DemoResults:
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
    methods.append(MethodResult(*TOGETHER, top1))
    models: dict[str, nn.Module] = {
        **{str(name): model for name, model in teachers.items()},
        **{f"distill_{name}": load_student(runs["distill", name][0])[0] for name in TEACHERS},
        "scratch": load_student(scratch[0])[0],
    }
    return DemoResults(
        methods=methods,
        divergences=divergences,
        data=data,
        maps=find_maps({title: models[name] for name, title in MODELS.items()}, test),
        seeds=[cell.seed for cell in scratch if cell.seed is not None],
        labels=scratch[0].config.data.train_samples or 0,
        all_labels=create_train_loader(made["supervised"].config.data, spec, seed=0).num_samples,
        test_images=test.count,
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
    return TestSet(loader, len(images), images[:COMPARED], targets[:COMPARED])


def ensemble_top1(cells: Sequence[Cell], loader: EvalLoader) -> float:
    """Return the accuracy, in percent, of the mean of the models' probabilities."""
    models = {cell.method: load_student(cell)[0] for cell in cells}
    return score_models(models, loader)["ensemble"].top1


def find_maps(models: Mapping[str, nn.Module], test: TestSet) -> dict[str, CellMaps]:
    """Find where the brightest patch of the first test image of three classes looks, mean over heads."""
    layout = token_layout(next(iter(models.values())))
    chosen = [int((test.targets == target).nonzero()[0]) for target in SHOWN_CLASSES]
    images = test.images[chosen]
    patch = (images.shape[2] // layout.grid[0], images.shape[3] // layout.grid[1])
    queries = unfold_patches(images, patch).mean(dim=-1).argmax(dim=1).tolist()
    pictures: list[Array] = [image.mean(dim=0).numpy() for image in images]
    shown = {}
    for name, model in models.items():
        maps = {}
        for layer, found in attention_maps(model, images, SHOWN_LAYERS).items():
            for place, query in enumerate(queries):
                row = found[place].mean(dim=0)[layout.num_prefix + query, layout.num_prefix :]
                heat, at = row.reshape(layout.grid).numpy(), divmod(query, layout.grid[1])
                maps[place, layer] = Panel(heat, (1.0, 1.0), layout.grid, at)
        shown[name] = CellMaps("the brightest patch", pictures, maps)
    return shown


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


LINE_EVERY = 15.0
"""Seconds of silence after which a line says what runs."""
PRIOR = 30.0
"""Seconds of work that count as if they had been done at the speed the cells' `seconds` were measured at."""


class Board:
    """Follows the cells by their logs; what is left takes as long as the work of this session so far did.

    No estimate is below what the processes have left together, nor below a student and the teacher that it waits for.
    """

    def __init__(self, cells: Sequence[Cell], processes: int, tell: Callable[[str], object]) -> None:
        self._processes, self._tell = processes, tell
        self._needs = {cell.folder: cell.needs for cell in cells}
        self._left: dict[Path | None, float] = {
            cell.folder: (1.0 - cell.progress()) * cell.seconds for cell in cells
        }
        self._finished = sum(cell.state() == "done" for cell in cells)
        self._worked = self._busy = 0.0
        self._looked = self._said = time.monotonic()
        there = f", {self._finished} of them finished before" if self._finished else ""
        self._say(f"{len(cells)} cells{there}; {processes} at a time{self._time_left()}")

    def finish(self, cell: Cell) -> None:
        """Say the result of a cell."""
        self._work(cell, 1.0)
        self._finished += 1
        curve = cell.curve()
        outcome = f"{curve[-1][1]:.1f} %" if curve else "finished"
        self._say(f"cell {self._finished} of {len(self._left)}, {cell}: {outcome}{self._time_left()}")

    def look(self, running: Collection[Cell]) -> None:
        """See how far the running cells are; say so now and then."""
        now = time.monotonic()
        self._busy += (now - self._looked) * len(running)
        self._looked = now
        if not running or now - self._said < LINE_EVERY:
            return
        for cell in running:
            self._work(cell, cell.progress())
        names = ", ".join(f"{cell} ({100 * cell.progress():.0f} %)" for cell in running)
        done = f"{self._finished} of {len(self._left)} cells finished"
        self._say(f"{done}; running: {names}{self._time_left()}")

    def _work(self, cell: Cell, share: float) -> None:
        """Note that `share` of the cell's work is done."""
        left = (1.0 - share) * cell.seconds
        self._worked += self._left[cell.folder] - left
        self._left[cell.folder] = left

    def _time_left(self) -> str:
        """Return `, about 4 min left`; empty at the end."""
        chains = [self._left[folder] + self._left.get(needed, 0.0) for folder, needed in self._needs.items()]
        left = max(sum(self._left.values()) / self._processes, *chains)
        if left <= 0.0:
            return ""
        minutes = round(left * (PRIOR + self._busy) / (PRIOR + self._worked) / 60)
        return f", about {minutes} min left" if minutes else ", less than a minute left"

    def _say(self, line: str) -> None:
        self._tell(line)
        self._said = time.monotonic()


SEEDS = (0, 1, 2, 3, 4)


def run_demo(
    output_dir: Path,
    quick: bool = False,
    *,
    dataset: str = "digits",
    data_path: Path | None = None,
    download: bool = False,
    seeds: Sequence[int] | None = None,
    processes: int | None = None,
    threads: int = 1,
    progress: bool = True,
) -> Path:
    """Train teachers and students, compare them, and write the report; returns the path of `report.html`.

    Finished runs are not run again, and an interrupted one resumes from its last save.

    Args:
        output_dir: Gets `report.html`, `report.md`, `images/` and the run folders.
        quick: One seed, and 40 % of the teachers' training.
        dataset: `digits`, which needs no files, or `fashion_mnist`.
        data_path: The folder of the images, as `data.data_path` of a run; by default `data` in `output_dir`, where
            the images of the Debian package dataset-fashion-mnist are unpacked if it is installed.
        download: Download the images to that folder.
        seeds: 0 to 4 by default, and 0 alone for a quick demo.
        processes: Cells that run at a time; one a core by default. The numbers do not depend on it.
        threads: Threads of a cell. The last digits depend on it, and so do the numbers.
        progress: Show the cells, the time left and the table on standard output.

    Raises:
        ConfigError: an argument is not possible, or the folder has cells of another setting.
        DataError: the images cannot be read.
        StoppedError: on SIGINT, SIGTERM or SIGUSR2, after saving.
        RunFailedError: a cell failed; its log is named.
    """
    seeds = seeds or (SEEDS[:1] if quick else SEEDS)
    processes = usable_cores() if processes is None else processes
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {' '.join(map(str, seeds))} must be whole numbers from 0 on, each once")
    if min(processes, threads) < 1:
        raise ConfigError(f"--processes {processes} and --threads {threads} must be at least 1")
    # Absolute, so that a run resumes from any working directory.
    data, data_path = find_data(dataset, output_dir.resolve(), data_path, download)
    cells = demo_cells(output_dir.resolve(), seeds, quick, threads, data, data_path)
    console = Console(quiet=not progress)
    tell = partial(console.print, soft_wrap=True, highlight=False, markup=False)
    for cell in cells:
        if cell.state() != "done":
            refuse_links(cell.folder, output_dir.resolve())
    board = Board(cells, processes, tell)
    run_in_processes(cells, processes, look=board.look, finish=board.finish)
    tell("comparing the students and writing the report")
    with torch_threads(threads):
        results = measure(cells, data, quick)
    report = write_report(results, output_dir)
    tell(accuracy_table(results).to_text())
    return report
