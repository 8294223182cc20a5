"""The cells of the demo: two teachers, and the `digits_*` recipes once a seed for each student of each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure

from ....checkpoints.json_lines import read_records
from ....models.errors import Json, JsonDict
from ....models.plain_yaml import parse_yaml
from ...cells.pool import Ending, State, cell_state, digest, save_record
from ...config import RunConfig
from ...engine.train import train
from ...setting import dump_decisive
from ..report.ink import (
    BLUE,
    GRAY,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    Array,
    Theme,
    draw_heat,
    new_figure,
    new_plots,
    spread,
    style_axes,
)

# The demo's line charts: learning curves, and divergence by layer, a panel for each teacher.
#
# Each is drawn on a transparent ground, once in ink for light pages and once for dark ones.

COLORS = {"scratch": GRAY, "finetune": BLUE, "copy": ORANGE, "distill": GREEN, "ensemble": PURPLE}


@dataclass(frozen=True)
class Curve:
    """A number of one method along an axis, one row a seed: `values` is (seeds, len(axis))."""

    method: str
    label: str
    axis: Sequence[float]
    values: Array


@dataclass(frozen=True)
class Panel:
    """The curves that belong together, with a line that says why."""

    title: str
    curves: Sequence[Curve]


def draw_curves(panels: Sequence[Panel], theme: Theme) -> Figure:
    """Draw test accuracy along training: the mean over seeds, a band of one deviation, the name at the end."""
    figure, grid = _grid(theme, panels, 3.9)
    for axes, panel in zip(grid, panels, strict=True):
        for curve in panel.curves:
            _line(axes, curve)
        axes.set_xlabel("training step")
    grid[0].set_ylabel("top-1 on the test images, %")
    lowest_end = min(float(curve.values[:, -1].min()) for panel in panels for curve in panel.curves)
    # the first steps are alike and say little
    grid[0].set_ylim(bottom=max(grid[0].get_ylim()[0], lowest_end - 30))
    _end_labels(grid, panels)
    return figure


def draw_divergence(panels: Sequence[Panel], theme: Theme) -> Figure:
    """Draw the Jensen-Shannon divergence from the teacher's maps, by layer; zero is the teacher itself."""
    figure, grid = _grid(theme, panels, 3.2)
    for axes, panel in zip(grid, panels, strict=True):
        for curve in panel.curves:
            _line(axes, curve, marker="o")
        axes.set_xlabel("layer")
        axes.set_xticks(list(panel.curves[0].axis))
    grid[0].set_ylabel("divergence, nats")
    grid[0].set_ylim(bottom=0.0)
    _end_labels(grid, panels)
    return figure


def _grid(theme: Theme, panels: Sequence[Panel], height: float) -> tuple[Figure, list[Any]]:
    """Return a plot for each panel, side by side on one scale."""
    figure, grid = new_plots(theme, (9.2, height), columns=len(panels), grid="y", sharey=True)
    for axes, panel in zip(grid, panels, strict=True):
        axes.set_title(panel.title, color=INK[theme], fontsize=10, loc="left")
    return figure, grid


def _line(axes: Any, curve: Curve, marker: str = "") -> None:
    mean, spread = curve.values.mean(axis=0), _deviation(curve.values)
    color = COLORS[curve.method]
    axes.fill_between(curve.axis, mean - spread, mean + spread, color=color, alpha=0.15, linewidth=0)
    axes.plot(curve.axis, mean, color=color, linewidth=2, marker=marker, markersize=5)


def _deviation(values: Array) -> Array:
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])


def _end_labels(grid: Sequence[Any], panels: Sequence[Panel]) -> None:
    """Put names at the right ends of the lines, as near as they can be without touching each other."""
    low, high = grid[0].get_ylim()
    gap = (high - low) * 0.075
    for axes, panel in zip(grid, panels, strict=True):
        ordered = sorted(panel.curves, key=lambda curve: float(curve.values[:, -1].mean()))
        places = spread([float(curve.values[:, -1].mean()) for curve in ordered], gap)
        for curve, place in zip(ordered, places, strict=True):
            axes.annotate(
                curve.label,
                (1.01, place),
                xycoords=("axes fraction", "data"),
                color=COLORS[curve.method],
                va="center",
                fontsize=10,
                fontweight="bold",
            )


TeacherName = Literal["supervised", "mae"]
TEACHERS: dict[TeacherName, str] = {"supervised": "digits_teacher", "mae": "digits_pretrain"}
"""Each teacher's recipe: all labels, or none and half of each image."""
POOLING: dict[TeacherName, JsonDict] = {"supervised": {"student": {"global_pool": "avg"}}, "mae": {}}
"""The recipe's class token reads the image; the students' patches do, so their teacher's must."""
STUDENTS: tuple[tuple[str, TeacherName | None], ...] = (
    ("scratch", None),
    ("copy", "supervised"),
    ("distill", "supervised"),
    ("finetune", "mae"),
    ("copy", "mae"),
    ("distill", "mae"),
)
SECONDS_AN_EPOCH: dict[TeacherName, float] = {"supervised": 2.0, "mae": 1.3}
SECONDS_A_STUDENT = {"scratch": 16.0, "copy": 18.0, "distill": 20.0, "finetune": 16.0}
"""On one core of the machine that the demo was made on; only the ratios matter."""
QUICK_TEACHER_EPOCHS: dict[TeacherName, int] = {"supervised": 25, "mae": 40}


@dataclass(frozen=True)
class Cell:
    """One run: how it learns, from which teacher, its seed (None for a teacher) and its settings."""

    method: str
    teacher: TeacherName | None
    seed: int | None
    config: RunConfig
    seconds: float
    """What the run takes, to tell how long the others will."""
    needs: Path | None = None
    """The folder of the teacher that must be there before."""
    threads: int = 1

    @property
    def folder(self) -> Path:
        return self.config.output_dir

    def __str__(self) -> str:
        if self.seed is None:
            return f"{self.teacher} teacher"
        teacher = "" if self.teacher is None else f" ({self.teacher} teacher)"
        return f"{self.method}{teacher} seed {self.seed}"

    def records(self) -> list[JsonDict]:
        """Return the epochs of the run's log so far."""
        return [record for record in read_records(self.folder / "log.jsonl") if "n_parameters" in record]

    def curve(self) -> list[tuple[int, float]]:
        """Return (step, accuracy on the test images in percent) at each evaluation so far."""
        return [(record["step"], record["test_top1"]) for record in self.records() if "test_top1" in record]

    def progress(self) -> float:
        """Return the share of the run that is done, by its log."""
        records, optim = self.records(), self.config.optim
        if not records:
            return 0.0
        if optim.max_steps is not None:
            return float(records[-1]["step"]) / optim.max_steps
        return (float(records[-1]["epoch"]) + 1) / optim.epochs

    @property
    def settings(self) -> str:
        """The digest of all that the cell's numbers depend on, but for its teacher's weights."""
        return digest([dump_decisive(self.config, {"teacher"}), self.threads])

    def state(self) -> State:
        """Return how far the cell is. Raises ConfigError: it was run with other settings."""
        return cell_state(self.folder, self.settings, "settings or another --threads")

    def run(self) -> int | None:
        """Run the cell to its end, and write its record; returns the signal that stopped it before."""
        torch.set_num_threads(self.threads)
        result = train(self.config)
        if result.signal is None:
            save_record(Ending(self.settings), self.folder)
        return result.signal


def demo_cells(output_dir: Path, seeds: Sequence[int], quick: bool, threads: int = 1) -> list[Cell]:
    """List the teachers, then the students seed by seed. A seed decides labels, weights and augmentation.

    The quick form trains the teachers for less time, and has run folders of its own.
    """
    runs = output_dir / ("quick" if quick else "runs")
    teachers = {name: _teacher(name, runs, quick) for name in TEACHERS}
    students = [
        _student(method, None if teacher is None else teachers[teacher], seed, runs)
        for seed in seeds
        for method, teacher in STUDENTS
    ]
    return [replace(cell, threads=threads) for cell in (*teachers.values(), *students)]


def _teacher(name: TeacherName, runs: Path, quick: bool) -> Cell:
    shorter = {"optim": {"epochs": QUICK_TEACHER_EPOCHS[name]}} if quick else {}
    config = recipe(TEACHERS[name], runs / f"teacher_{name}", {**POOLING[name], **shorter})
    return Cell("teacher", name, None, config, seconds=config.optim.epochs * SECONDS_AN_EPOCH[name])


def _student(method: str, teacher: Cell | None, seed: int, runs: Path) -> Cell:
    changes: JsonDict = {"seed": seed, "data": {"label_seed": seed}}
    if teacher is None:
        name = f"{method}_{seed}"
    else:
        name = f"{method}_{teacher.teacher}_{seed}"
        changes["teacher"] = {"source": f"local-dir:{teacher.folder / 'student'}"}
    config = recipe(f"digits_{method}", runs / name, changes)
    return Cell(
        method,
        None if teacher is None else teacher.teacher,
        seed,
        config,
        seconds=SECONDS_A_STUDENT[method],
        needs=None if teacher is None else teacher.folder,
    )


def recipe(name: str, folder: Path, changes: Json) -> RunConfig:
    """Return the packaged recipe `name` with the run folder `folder` and `changes`; no tracker."""
    text = resources.files("graftvit.cfgs").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    content = _merged(parse_yaml(text), {"engine": {"trackers": []}, **changes, "output_dir": folder})
    return RunConfig.model_validate(content)


def _merged(below: Json, above: Json) -> JsonDict:
    both = dict(below)
    for key, value in above.items():
        old = both.get(key)
        both[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return both


# Attention maps over their images, one model beside the other, and the picture that sums the demo up.


@dataclass(frozen=True)
class Gaze:
    """One image, the patch that asks, and where it looks in each model, as (rows, columns) maps."""

    image: Array
    query: tuple[int, int]
    layer: str
    maps: Mapping[str, Array]


def draw_gazes(gazes: Sequence[Gaze], titles: Mapping[str, str], theme: Theme) -> Figure:
    """Draw a row for each image and layer: the image with its asking patch, then each model's attention.

    Within a row all maps share one scale, so that the same shade is the same attention.
    """
    figure = new_figure(1.55 * (1 + len(titles)), 1.5 * len(gazes) + 0.45)
    _fill(figure.subplots(len(gazes), 1 + len(titles), squeeze=False), gazes, titles, theme)
    return figure


@dataclass(frozen=True)
class SummaryRow:
    """A method with one value a seed; a heading has neither."""

    label: str
    method: str | None = None
    values: Sequence[float] = ()

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def words(self) -> str:
        return self.label if self.method is None else f"{self.label}  {self.mean:.0f}"


def draw_summary(
    rows: Sequence[SummaryRow], gazes: Sequence[Gaze], titles: Mapping[str, str], theme: Theme
) -> Figure:
    """Draw accuracies on the left, attention maps on the right. A dot is a seed, an upright stroke the mean."""
    figure = new_figure(11.6, max(1.3 * len(gazes), 0.42 * len(rows)) + 0.4)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(4.2, 7.4), wspace=0.03)[0]
    axes = left.subplots()
    for place, row in enumerate(reversed(rows)):
        if row.method is not None:
            color = COLORS[row.method]
            dots = {"color": color, "markersize": 7, "alpha": 0.55, "markeredgewidth": 0}
            axes.plot(row.values, [place] * len(row.values), "o", **dots)
            axes.plot([row.mean], [place], "|", color=color, markersize=18, markeredgewidth=3)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_yticks(range(len(rows)), [row.words for row in reversed(rows)])
    for words, row in zip(axes.get_yticklabels(), reversed(rows), strict=True):
        words.set_fontweight("bold" if row.method is None else "normal")
    style_axes(axes, theme, "x")
    axes.set_title("top-1, %: a dot is a seed", color=INK[theme], fontsize=10)
    _fill(right.subplots(len(gazes), 1 + len(titles), squeeze=False), gazes, titles, theme)
    return figure


def _fill(grid: Any, gazes: Sequence[Gaze], titles: Mapping[str, str], theme: Theme) -> None:
    for row, gaze in zip(grid, gazes, strict=True):
        shape = next(iter(gaze.maps.values())).shape
        top = max(float(gaze.maps[name].max()) for name in titles)
        for axes, heat in zip(row, [None, *(gaze.maps[name] for name in titles)], strict=True):
            draw_heat(axes, gaze.image, (shape[0], shape[1]), gaze.query, heat, top)
        row[0].set_ylabel(gaze.layer, color=INK[theme], fontsize=9)
    for axes, title in zip(grid[0], ["image", *titles.values()], strict=True):
        axes.set_title(title, color=INK[theme], fontsize=10)


# What the demo found, in plain numbers.

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


@dataclass(frozen=True)
class MethodResult:
    """A method with a teacher, over the seeds. Accuracies are in percent; a curve has a row a seed."""

    method: str
    teacher: TeacherName | None
    top1: Sequence[float]
    steps: Sequence[int] = ()
    curve: Sequence[Sequence[float]] = ()

    @property
    def title(self) -> str:
        return TITLES[self.method]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.top1)

    @property
    def deviation(self) -> float | None:
        """The sample deviation over the seeds; None for a single seed."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else None


@dataclass(frozen=True)
class DemoResults:
    """The methods in the order of the table, and the setting that they were compared in."""

    methods: Sequence[MethodResult]
    divergences: Mapping[TeacherName, Mapping[str, Sequence[Sequence[float]]]]
    """From each teacher's maps, by method and layer, in nats: a row a seed."""
    gazes: Sequence[Gaze]
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


# The sentences of the demo's report. They follow the numbers, whichever way these fall.

TITLE = "Is knowing where to look enough?"
WHAT = {
    "scratch": "starts from nothing and sees only the labelled digits",
    "copy": "uses the teacher's attention maps at every layer; the teacher runs along, also at inference",
    "distill": "learns to make the teacher's maps itself; afterwards it stands alone",
    "finetune": "starts from all of the teacher's weights",
    "ensemble": "mean of the probabilities of the fine-tuned and the distilled model of the same seed",
}
CURVES = (
    "Accuracy on the test images while the students learn from their few labels. Lines are means over the "
    "seeds, bands one deviation."
)
MAPS = (
    "Which patches does the outlined patch look at? Brighter is more attention, mean over the heads; a "
    "row has one scale. The distilled students make their maps by themselves. A copying student has its "
    "teacher's by construction."
)
DIVERGENCE = (
    "Jensen-Shannon divergence between a student's attention maps and its teacher's, mean over test "
    "images, heads and queries, in nats: 0 is the same map, ln 2 = 0.693 no overlap at all. Copying is 0 "
    "by construction."
)
OWN_IMAGES = (
    "The demo is six recipes, run side by side; the same commands take a folder of images and a real "
    "teacher. Every setting is a key of the YAML file and a flag of the command line, and --dry_run "
    "prints the plan first."
)
COMMANDS = """\
# see what a teacher offers, then distil its attention into a fresh student
graftvit checkpoint info vit_small_patch16_224.dino
graftvit train attention_distill_vit_base --data_path my/images --num_classes 12 --dry_run

# no teacher for your domain? make one from unlabelled images, as this demo did
graftvit train digits_pretrain --output_dir runs/my_teacher
graftvit train digits_distill --teacher.source local-dir:runs/my_teacher/student"""


def question(results: DemoResults) -> str:
    """State the demo's question."""
    return (
        "A good teacher helps a vision transformer, but what of it is it that helps: the features, or only "
        f"knowing where to look? Students had {results.labels} labelled digits to learn from. One began with "
        "nothing. Others took nothing but the attention of a teacher: either of one that had learned to "
        f"name all {results.all_labels:,} training digits, or of one that had only learned to paint their "
        "hidden halves and never saw a label. For comparison, one began with all weights of the latter."
    )


def answer(results: DemoResults) -> str:
    """State the result for both teachers."""
    words = [
        f"From scratch the student names {results.scratch.mean:.1f} % of the {results.test_images} test digits.",
        f"The teacher that knows the labels names {results.teacher_top1:.1f} %. With its attention alone, "
        f"students reach {_attention(results, 'supervised')}",
        f"With the attention of the teacher that saw no label, they reach {_attention(results, 'mae')}",
    ]
    tuned, together = results.find("finetune", "mae"), results.find("ensemble", "mae")
    words.append(
        f"All of its weights, fine-tuned, give {tuned.mean:.1f} % ({against_scratch(results, tuned)}), and the "
        f"fine-tuned and the distilled model together {together.mean:.1f} %."
    )
    return " ".join(words)


def table_note(results: DemoResults) -> str:
    """Explain the table."""
    seeds = len(results.seeds)
    spread = (
        "one seed, so there is no deviation"
        if seeds == 1
        else f"mean ± sample deviation over {seeds} seeds; against scratch: within the seeds, ± standard error"
    )
    quick = " This was a quick run, with teachers that learned for a shorter time." if results.quick else ""
    return (
        f"Top-1 on {results.test_images} test images that no training saw; {spread}. A seed draws its own "
        f"{results.labels} labels, weights and augmentation; within a seed all methods share the labels. "
        "No seed and no checkpoint was picked: each number is the last step of "
        f"{results.student_steps}.{quick}"
    )


def setting(results: DemoResults) -> str:
    """Explain the choices."""
    supervised, mae = results.teacher_steps["supervised"], results.teacher_steps["mae"]
    return (
        "scikit-learn's digits, 8 by 8 pixels, are enlarged to 12 by 12 and cut into 36 patches. Teachers "
        "and students are the same ViT: width 64, 4 blocks, 4 heads. Training images are turned, scaled, "
        f"sheared and moved a little. One teacher learns from all labels, for {supervised:,} steps; the other "
        f"is a masked autoencoder, {mae:,} steps with 18 of 36 patches visible. The transfer weight is the "
        "published 3, on all layers. There are 36 patches because with 16 it is easy to learn where to look, "
        "and position embeddings start with a deviation of 0.2 because students from scratch would need "
        "more steps at the usual 0.02, which would flatter attention transfer."
    )


def footer(results: DemoResults) -> str:
    """State where the numbers come from."""
    command = "graftvit demo --quick" if results.quick else "graftvit demo"
    return (
        f"Written by `{command}`: {results.minutes:.1f} minutes of training, added up over its processes, "
        "without a network."
    )


def teacher_title(results: DemoResults, teacher: TeacherName) -> str:
    """Return the heading of a teacher's rows in the table."""
    if teacher == "supervised":
        return (
            f"The teacher knows all {results.all_labels:,} labels, "
            f"and names {results.teacher_top1:.1f} % of the test images"
        )
    return "The teacher saw no label: a masked autoencoder"


def curves_alt(results: DemoResults) -> str:
    """Describe the learning curves in words."""
    ends = ", ".join(f"{_named(m)} {m.mean:.1f} %" for m in results.methods if len(m.curve) > 0)
    return f"Test accuracy over {results.student_steps} training steps; at the end {ends}."


def maps_alt(results: DemoResults) -> str:
    """Describe the attention maps in words."""
    return (
        f"{len(results.gazes)} rows of attention maps over handwritten digits: the image, then the teacher "
        "that knows the labels and the student distilled from it, the one that saw no label and the student "
        "distilled from that, and the scratch-trained student."
    )


def divergence_alt(results: DemoResults) -> str:
    """Describe the divergences in words."""
    means = [
        f"{SHORT_TITLES[method]} {statistics.fmean(value for row in rows for value in row):.3f}"
        f" ({_TEACHERS[teacher]})"
        for teacher, methods in results.divergences.items()
        for method, rows in methods.items()
    ]
    return f"Divergence from the teacher's attention by layer; mean over layers, in nats: {', '.join(means)}."


def percent(method: MethodResult) -> str:
    """Return `82.8 % ± 4.1`, or `82.8 %` for one seed."""
    spread = "" if method.deviation is None else f" ± {method.deviation:.1f}"
    return f"{method.mean:.1f} %{spread}"


def against_scratch(results: DemoResults, method: MethodResult) -> str:
    """Return `+1.7 ± 0.8`: mean gain within the seeds, in points, and its standard error; empty for scratch."""
    if method.method == "scratch":
        return ""
    gains, error = results.gains(method), results.gain_error(method)
    mean = f"{statistics.fmean(gains):+.1f}".replace("-", "\N{MINUS SIGN}")
    return mean if error is None else f"{mean} ± {error:.1f}"


_TEACHERS: dict[TeacherName, str] = {"supervised": "labels", "mae": "no label"}


def _named(method: MethodResult) -> str:
    teacher = "" if method.teacher is None else f" ({_TEACHERS[method.teacher]})"
    return f"{SHORT_TITLES[method.method]}{teacher}"


def _attention(results: DemoResults, teacher: TeacherName) -> str:
    copied, distilled = (_gain(results, results.find(name, teacher)) for name in ("copy", "distill"))
    return f"{copied} when it is copied, and {distilled} when it is distilled."


def _gain(results: DemoResults, method: MethodResult) -> str:
    """State what one kind of transfer gives, and whether it takes more seeds to tell it from nothing."""
    seeds, error, gains = len(results.seeds), results.gain_error(method), results.gains(method)
    versus = f"{against_scratch(results, method)} points against scratch"
    if error is not None:
        versus += f", better with {sum(gain > 0 for gain in gains)} of {seeds} seeds"
        if abs(statistics.fmean(gains)) < 2 * error:
            versus += "; so few seeds cannot tell that from chance"
    return f"{method.mean:.1f} % ({versus})"
