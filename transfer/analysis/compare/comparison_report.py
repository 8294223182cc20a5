"""What a comparison leaves: tables as CSV, JSON and Markdown, plots, and one HTML page with all in it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from ....checkpoints.atomic import write_text
from ....checkpoints.publish.card import plain
from ....models.attention.base import Operations
from ...metrics.intervals import Interval, Z, accuracy_interval, standard_error
from ..benchmark.benchmark import Crossover, crossover
from ..benchmark.cases import Prices
from ..report import pages
from ..report.ink import (
    FAINT,
    GRAY,
    INK,
    Theme,
    color_of,
    dashes_of,
    draw_heat,
    draw_ring,
    legend_beside,
    log_log,
    new_figure,
    new_plots,
    spread,
)
from ..report.pages import Plot, markdown, milliseconds, to_csv, to_json
from ..visualize.map_figures import SIGNED_LABEL, color_bar, write_corner
from .comparison_cells import TEACHER, UNIFORM, Record, Score, Speed, mean_over_seeds
from .student_cell import CellMap, CellMaps, load_maps

if TYPE_CHECKING:
    from .compare import Comparison


# The plots of a comparison: accuracy against latency and memory, latency against tokens, error by layer.


def plots_of(records: Sequence[Record]) -> list[Plot]:
    """Return the plots that there are numbers for, at the largest image size."""
    size = max((record.size for record in records), default=0)
    here = [record for record in records if record.size == size and record.error is None]
    measured = [record for record in here if record.speed is not None and record.final is not None]
    plots = []
    if measured:
        plots += _accuracies(measured)
    changed = [record for record in here if record.plan is not None and not record.is_unconverted]
    swept = [record for record in changed if len(record.speeds) > 1]
    if swept:
        plots.append(_latency_tokens(swept))
    compared = [record for record in changed if record.layer_errors]
    if compared:
        plots.append(_errors_layers(compared))
    return plots


def crossover_of(record: Record) -> Crossover | None:
    """Return the number of tokens from which the model is faster than unconverted; None with one size."""
    if len(record.speeds) < 2:
        return None
    ratios = [speed.softmax_latency / speed.latency for speed in record.speeds]
    return crossover([speed.tokens for speed in record.speeds], ratios)


def _latency(speed: Speed) -> float:
    return 1e3 * speed.latency


def _memory(speed: Speed) -> float:
    return speed.peak_bytes / 2**20


def _accuracies(records: Sequence[Record]) -> list[Plot]:
    start = "Top-1 after the last stage, and"
    about = f"{start} milliseconds for one image of {records[0].size} px. Up and left is better."
    scatter = f"Scatter of {len(records)} models: top-1 against"
    return [
        Plot(
            "accuracy_latency",
            "Accuracy against latency",
            about,
            f"{scatter} milliseconds for one image.",
            partial(_scatter, records, _latency, "milliseconds for one image"),
        ),
        Plot(
            "accuracy_memory",
            "Accuracy against memory",
            f"{start} what a batch needs in memory above the weights. Up and left is better.",
            f"{scatter} the peak memory of a batch.",
            partial(_scatter, records, _memory, "peak memory of a batch, MiB"),
        ),
    ]


def _latency_tokens(students: Sequence[Record]) -> Plot:
    return Plot(
        "latency_tokens",
        "Latency against the number of tokens",
        "Milliseconds of the whole model for one image. A ring marks the number of tokens from which it is faster "
        "than the same model before its conversion; the legend has it behind the name.",
        f"Log-log lines of {len(students)} models: milliseconds for one image against tokens.",
        partial(_lines_over_tokens, students),
    )


def _errors_layers(records: Sequence[Record]) -> Plot:
    return Plot(
        "layer_errors",
        "Error by layer",
        "Relative error of each layer's output, per head, on the teacher's own inputs: 0 is the teacher's layer. The "
        "stages after alignment train the network for its task, and layers may move away from the teacher's again.",
        f"Lines of {len(records)} students: relative output error by layer, a panel a stage.",
        partial(_error_panels, records),
    )


def _scatter(records: Sequence[Record], value: Callable[[Speed], float], name: str, theme: Theme) -> Figure:
    """Draw points, each joined to its name at the right edge."""
    figure, (axes,) = new_plots(theme, (8.4, max(3.6, 0.27 * len(records) + 1.2)))
    points = []
    for record in records:
        if record.speed is not None and record.final is not None:
            points.append((value(record.speed), record.final.top1, record))
    for x, y, record in points:
        marker, color = "*" if record.plan is None else "o", color_for(record, records, theme)
        filled = color if record.linear or record.plan is None else "none"
        axes.plot([x], [y], marker, color=color, mfc=filled, markersize=13 if marker == "*" else 7, zorder=3)
    axes.set_xlabel(name)
    axes.set_ylabel("top-1, %")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    _names_at_the_edge(axes, points, records, theme)
    axes.set_title("filled: every layer of linear cost", fontsize=9, color=INK[theme], loc="left")
    return figure


def _names_at_the_edge(
    axes: Any, points: Sequence[tuple[float, float, Record]], records: Sequence[Record], theme: Theme
) -> None:
    low, high = axes.get_ylim()
    ordered = sorted(points, key=lambda point: point[1])
    gap = min(0.062, 0.75 / max(1, len(points) - 1))  # a line of text, as a share of the height
    places = spread([(y - low) / (high - low) for _, y, _ in ordered], gap, 0.0, 1.0)
    for (x, y, record), place in zip(ordered, places, strict=True):
        axes.annotate(
            f"{record.name} {y:.1f}",
            xy=(x, y),
            xytext=(1.03, place),
            textcoords="axes fraction",
            color=color_for(record, records, theme),
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": FAINT[theme], "linewidth": 0.7, "shrinkB": 5},
        )


def _lines_over_tokens(records: Sequence[Record], theme: Theme) -> Figure:
    figure, (axes,) = new_plots(theme, (8.4, 4.8))
    tokens = sorted({speed.tokens for record in records for speed in record.speeds})
    softmax = [
        float(np.median([s.softmax_latency for r in records for s in r.speeds if s.tokens == count]))
        for count in tokens
    ]
    axes.plot(tokens, [1e3 * x for x in softmax], "--", color=INK[theme], linewidth=2.2, label="unconverted")
    for record in records:
        at = crossover_of(record)
        x, y = [s.tokens for s in record.speeds], [1e3 * s.latency for s in record.speeds]
        color, style = color_for(record, records, theme), dashes_of(_place(record, records))
        axes.plot(
            x, y, style, color=color, linewidth=1.4, marker="o", markersize=3, label=f"{record.name} ({at})"
        )
        if at is not None and not at.where:
            draw_ring(axes, at.size, x, y, color)
    log_log(axes, tokens)
    axes.set(xlabel="tokens", ylabel="milliseconds for one image")
    legend_beside(axes, theme)
    return figure


def _error_panels(records: Sequence[Record], theme: Theme) -> Figure:
    stages = list(dict.fromkeys(stage for record in records for stage in record.layer_errors))
    figure, panels = new_plots(theme, (8.4, 4.2), columns=len(stages), sharey=True)
    for axes, stage in zip(panels, stages, strict=True):
        for record in records:
            errors = record.layer_errors.get(stage, {})
            color, style = color_for(record, records, theme), dashes_of(_place(record, records))
            axes.plot(list(errors), list(errors.values()), style, color=color, marker="o", markersize=3,
                      linewidth=1.4, label=record.name)  # fmt: skip
        axes.set_title(stage, fontsize=10, color=INK[theme])
        axes.set_xlabel("layer")
        axes.set_xticks(
            sorted({layer for record in records for by in record.layer_errors.values() for layer in by})
        )
    panels[0].set_ylabel("relative output error")
    panels[0].set_ylim(bottom=0.0, top=min(1.6, panels[0].get_ylim()[1]))
    legend_beside(panels[-1], theme)
    return figure


def color_for(record: Record, records: Sequence[Record], theme: Theme) -> str:
    """Return ink for the teacher, grey for uniform attention, a color of its own for each of ten others."""
    if record.name in (TEACHER, UNIFORM):
        return INK[theme] if record.name == TEACHER else GRAY
    return color_of(_place(record, records))


def _place(record: Record, records: Sequence[Record]) -> int:
    names = [each.name for each in records if each.name not in (TEACHER, UNIFORM)]
    return names.index(record.name) if record.name in names else 0


# The rows of the table: accuracy by stage, cost, and how much of the gap each student recovered.

Table = tuple[list[str], list[list[str]]]
COSTS = (
    "latency",
    "softmax_latency",
    "throughput",
    "softmax_throughput",
    "peak_bytes",
    "macs",
    "counted_macs",
)
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Line:
    """A cell with what it means beside the others of its image size."""

    record: Record
    gap_trained: float | None
    """(student − uniform) / (teacher − uniform), uniform attention trained with the same budget."""
    gap_zero_shot: float | None
    """The same against uniform attention as converted, untrained."""
    gap_error: float | None = None
    """Half of the 95 % interval of `gap_trained`, for the number of test images."""


def lines_of(records: Sequence[Record]) -> list[Line]:
    """Return a line for each record, with gaps where there are a reference and a uniform student of its size."""
    return [Line(record, *_gaps(record, records), _gap_error(record, records)) for record in records]


def reference(records: Sequence[Record], size: int) -> Record | None:
    """Return the reference of all students: the teacher, or without one the student whose plan keeps every layer."""
    here = [record for record in records if record.size == size and record.final is not None]
    named = [record for record in here if record.name == TEACHER]
    return next(iter(named + [record for record in here if record.is_unconverted]), None)


def best_linear(records: Sequence[Record], size: int) -> Record | None:
    """Return the most accurate student whose every layer costs linearly, uniform attention left out."""
    found = [
        record
        for record in records
        if record.size == size and record.linear and record.name != UNIFORM and record.final is not None
    ]
    return max(found, key=_final_top1, default=None)


def stage_names(records: Iterable[Record]) -> list[str]:
    """Return the stages of all records in their order, the zero-shot one first."""
    return list(dict.fromkeys(score.stage for record in records for score in record.scores))


def records_json(records: Sequence[Record]) -> str:
    """Return all that is known of the cells, with the gaps, as JSON."""
    return to_json(
        [
            {
                **dataclasses.asdict(line.record),
                "seconds": line.record.seconds,
                "top1_interval": interval_of(line.record),
                "gap_recovered_trained_uniform": line.gap_trained,
                "gap_recovered_trained_uniform_error": line.gap_error,
                "gap_recovered_zero_shot_uniform": line.gap_zero_shot,
            }
            for line in lines_of(records)
        ]
    )


def records_csv(records: Sequence[Record]) -> str:
    """Return a row a cell; empty where there is no number."""
    columns: dict[str, Callable[[Line], object]] = {
        "name": lambda line: line.record.name,
        "plan": lambda line: line.record.plan,
        "img_size": lambda line: line.record.size,
        "error": lambda line: line.record.error,
        "linear": lambda line: line.record.linear,
        **{
            f"{stage}_{key}": partial(_of_stage, stage, key)
            for stage in stage_names(records)
            for key in ("top1", "top5")
        },
        "test_images": lambda line: getattr(line.record.final, "samples", None),
        "top1_low": lambda line: (interval_of(line.record) or (None,))[0],
        "top1_high": lambda line: (interval_of(line.record) or (None,))[-1],
        "gap_recovered_trained_uniform": lambda line: line.gap_trained,
        "gap_recovered_trained_uniform_error": lambda line: line.gap_error,
        "gap_recovered_zero_shot_uniform": lambda line: line.gap_zero_shot,
        "seed": lambda line: line.record.seed,
        "parameters": lambda line: line.record.parameters,
        "new_parameters": lambda line: line.record.new_parameters,
        "training_seconds": lambda line: line.record.seconds,
        **{cost: partial(_of_speed, cost) for cost in COSTS},
        "energy_pj": lambda line: energy_of(line.record.speed),
    }
    return to_csv(list(columns), [[value(line) for value in columns.values()] for line in lines_of(records)])


def _of_stage(stage: str, key: str, line: Line) -> object:
    return getattr(line.record.score(stage), key, None)


def _of_speed(cost: str, line: Line) -> object:
    return getattr(line.record.speed, cost, None)


def accuracy_table(records: Sequence[Record]) -> Table:
    """Return head and rows: top-1 / top-5 of each stage, the interval of the last top-1, the gaps, the training
    time."""
    stages, sizes = stage_names(records), {record.size for record in records}
    rows = []
    for line in lines_of(records):
        record = line.record
        if record.error is not None:
            continue
        found = [record.score(stage) for stage in stages]
        shown = ["" if score is None else _accuracy(score) for score in found]
        seconds = f"{record.seconds:.0f}" if record.plan is not None else ""
        rows.append(
            [
                label(record, sizes),
                *shown,
                _interval(record),
                _share(line.gap_trained) + _error(line.gap_error),
                _share(line.gap_zero_shot),
                seconds,
            ]
        )
    return [
        "cell",
        *stages,
        "95 % interval",
        "gap recovered",
        "against zero-shot uniform",
        "training s",
    ], rows


def cost_table(records: Sequence[Record]) -> Table:
    """Return head and rows: what a student costs at the size of its training."""
    sizes = {record.size for record in records}
    measured = [(record, record.speed) for record in records if record.error is None and record.speed]
    columns: dict[str, Callable[[Record, Speed], str]] = {
        "cell": lambda record, _: label(record, sizes),
        "parameters": lambda record, _: f"{record.parameters:,}",
        "new": lambda record, _: f"{record.new_parameters:,}",
        "MMACs": lambda _, speed: f"{speed.macs / 1e6:.2f}",
        "counted": lambda _, speed: f"{speed.counted_macs / 1e6:.2f}",
        "µJ": lambda _, speed: _microjoules(energy_of(speed)),
        "ms, batch 1": lambda _, speed: milliseconds(speed.latency),
        "unconverted ms": lambda _, speed: milliseconds(speed.softmax_latency),
        "images/s": lambda _, speed: f"{speed.throughput:,.0f}",
        "peak MiB": lambda _, speed: f"{speed.peak_bytes / 2**20:.1f}",
        "linear": lambda record, _: "yes" if record.linear else "no",
    }
    return list(columns), [[text(*each) for text in columns.values()] for each in measured]


def to_markdown(records: Sequence[Record]) -> str:
    """Return both tables, and the cells that failed."""
    parts = [markdown(*accuracy_table(records)), markdown(*cost_table(records))]
    return "\n\n".join([*parts, *map(plain, failures(records))]) + "\n"


def failures(records: Sequence[Record]) -> list[str]:
    """Return a sentence for each cell that failed."""
    return [
        f"Failed: {record.name} at {record.size} px{_seed(record)}: {record.error}"
        for record in records
        if record.error
    ]


def _seed(record: Record) -> str:
    return "" if record.seed is None else f", seed {record.seed}"


def label(record: Record, sizes: Iterable[int]) -> str:
    """Return the name, with the image size where there are several."""
    return record.name if len(set(sizes)) == 1 else f"{record.name}, {record.size} px"


def energy_of(speed: Speed | None) -> float | None:
    """Return the energy in pJ of the multiplications and additions of one image, with 32-bit floats at 45 nm."""
    if speed is None or speed.multiplications is None or speed.additions is None:
        return None
    return Prices().energy(Operations(speed.multiplications, speed.additions))


def _microjoules(picojoules: float | None) -> str:
    return "" if picojoules is None else f"{picojoules / 1e6:,.1f}"


def _accuracy(score: Score) -> str:
    spread = "" if score.deviation is None else f" ± {score.deviation:.1f}"
    return f"{score.top1:.1f}{spread} / {score.top5:.1f}"


def _gaps(record: Record, records: Sequence[Record]) -> tuple[float | None, float | None]:
    beside = [each for each in records if each.seed in (None, record.seed)]
    top, floor = reference(beside, record.size), _uniform(beside, record.size)
    if top is None or floor is None or record.final is None:
        return None, None
    final, best = _final_top1(record), _final_top1(top)
    return _gap(final, floor.scores[-1].top1, best), _gap(final, floor.scores[0].top1, best)


def _gap_error(record: Record, records: Sequence[Record]) -> float | None:
    """Return half of the 95 % interval of a gap, by the errors of its three accuracies.

    They are taken as independent. All are of the same images, which as a rule makes their differences surer.
    """
    beside = [each for each in records if each.seed in (None, record.seed)]
    three = record, reference(beside, record.size), _uniform(beside, record.size)
    finals = [each.final for each in three if each is not None and each.final is not None]
    gap = _gaps(record, records)[0]
    if record in three[1:] or gap is None or len(finals) < 3 or any(not score.samples for score in finals):
        return None
    student, top, floor = (standard_error(score.top1, score.samples or 1) for score in finals)
    width = finals[1].top1 - finals[2].top1
    return Z * math.hypot(student, gap * top, (1 - gap) * floor) / width


def interval_of(record: Record) -> Interval | None:
    """Return the 95 % interval of the last top-1; None where the number of images is not known."""
    final = record.final
    return None if final is None or final.samples is None else accuracy_interval(final.top1, final.samples)


def _interval(record: Record) -> str:
    found = interval_of(record)
    return "" if found is None else f"{found[0]:.1f} to {found[1]:.1f}"


def _error(error: float | None) -> str:
    return "" if error is None else f" ± {100 * error:.0f}"


def _gap(value: float, low: float, high: float) -> float | None:
    return (value - low) / (high - low) if high > low else None


def _uniform(records: Sequence[Record], size: int) -> Record | None:
    return next((r for r in records if r.name == UNIFORM and r.size == size and r.scores), None)


def _final_top1(record: Record) -> float:
    return record.scores[-1].top1


def _share(gap: float | None) -> str:
    return "" if gap is None else f"{100 * gap:.0f} %".replace("-", MINUS)


# What the report says around its tables.

TITLE = "What does it cost to make this attention cheap?"
MEMORY = "Peak memory is what a batch needs above the weights."


def question(records: Sequence[Record]) -> str:
    """State the question, with the number of students."""
    students = [record for record in records if record.plan is not None and record.error is None]
    return (
        f"One teacher, {len(students)} students. Each is the teacher with other attention by a plan, trained "
        "with the same settings, the same data and as many steps a stage; alignment is left out where no layer has a "
        "new operator, or none can learn from its loss. A stage without a number is not one of the plan's. Uniform "
        "attention, which knows nothing of where to look, is the floor."
    )


def answer(records: Sequence[Record]) -> str:
    """Name the best student of linear cost at each image size, and the gap that it recovered."""
    return " ".join(filter(None, (_answer(records, size) for size in sorted({r.size for r in records}))))


def _answer(records: Sequence[Record], size: int) -> str:
    top, best = reference(records, size), best_linear(records, size)
    if top is None or best is None or top.final is None or best.final is None:
        return ""
    line = next(line for line in lines_of(records) if line.record is best)
    words = (
        f"At {size} px the {top.name} names {_named(top)} of the{_images([best])} test images, and the best student "
        f"of linear cost, {best.name}, {_named(best)}"
    )
    if line.gap_trained is None or line.gap_zero_shot is None:
        return f"{words}."
    return (
        f"{words}: {100 * line.gap_trained:.0f} %{_margin(line.gap_error)} of the gap between the {top.name} and "
        "uniform attention "
        f"trained with the same budget, {100 * line.gap_zero_shot:.0f} % of that to uniform attention without training."
    )


def _named(record: Record) -> str:
    """Return the last top-1, with its interval."""
    found = interval_of(record)
    words = "" if found is None else f" (95 % interval {found[0]:.1f} to {found[1]:.1f})"
    return f"{record.scores[-1].top1:.1f} %{words}"


def _margin(error: float | None) -> str:
    return "" if error is None else f" (± {100 * error:.0f})"


def _images(records: Sequence[Record]) -> str:
    counts = {score.samples for record in records for score in record.scores if score.samples is not None}
    return "".join(f" {count:,}" for count in sorted(counts))


def _spread(records: Sequence[Record]) -> str:
    seeds = max((record.seeds for record in records), default=1)
    if seeds == 1:
        return "one seed says nothing about the spread"
    return f"accuracies are means over {seeds} seeds, ± is their sample standard deviation"


def how_to_read(records: Sequence[Record]) -> str:
    """Explain the columns, and what the numbers cannot tell."""
    loads = [record.load for record in records]
    machines = sorted({record.machine for record in records})
    return (
        f"Accuracy is top-1 / top-5 in percent on the{_images(records)} test images, zero-shot "
        "(converted, untrained) and at the end of "
        "each stage; no checkpoint was picked. Gap recovered is (student − uniform) / (teacher − uniform), once "
        "against the uniform student of the same budget and once against the uniform student before any training. "
        "The interval (Wilson's, 95 %) is that of the last top-1 for this number of images; the ± behind a gap is half "
        "of its 95 % interval, by the three accuracies as if they were independent: the models see the same images, so "
        "it is as a rule too wide. "
        "Choosing the best of many students on the images that they are judged by flatters it; "
        f"{_spread(records)}. MMACs are millions of multiply-adds of the whole model for one image, by the operators' "
        "own account and by torch's counter; µJ is the energy of its multiplications and additions with 32-bit "
        "floats at 45 nm, 3.7 and 0.9 pJ each. Latency is of one image, timed in turn with the same model "
        f"before its conversion; images/s are in batches. {MEMORY} Training time is that of the steps, without "
        "evaluation. "
        f"Measured on {'; '.join(machines)}; load average {min(loads, default=0):.1f} to {max(loads, default=0):.1f}."
    )


# The attention of all cells side by side: a row a mechanism, on the same images and for the same query.

INCHES = 1.1
"""The longer side of a panel."""
SCALES = 0.7
"""The width of the color bars with their labels, in inches."""
NAMES = 1.4
"""The width of the names of the cells, in inches."""


def map_plot(cells: Mapping[str, CellMaps | None]) -> Plot | None:
    """Return the plot of the cells' maps by name; None where no cell has kept any."""
    known = [each for each in cells.values() if each is not None]
    if not known:
        return None
    images, layers = len(known[0].pictures), known[0].layers
    return Plot(
        "attention",
        "Attention",
        f"What {known[0].query} attends to in {images} test images: the mean of the heads, after the last stage. The "
        "number is the largest weight. The panels of a column share a scale; two colors are of maps with negative "
        "weights. Layers that were converted show the rows of the matrix that their operator applies to the values.",
        f"Attention maps of {len(cells)} models, a row each, in layers {', '.join(map(str, layers))}.",
        partial(draw_maps, cells, known[0]),
    )


def draw_maps(cells: Mapping[str, CellMaps | None], shown: CellMaps, theme: Theme) -> Figure:
    """Draw a row a cell and a column an image and layer; `shown` gives the images. The first row has the images."""
    columns = [(image, layer) for image in range(len(shown.pictures)) for layer in shown.layers]
    tops = {column: _top(cells, column) for column in columns}
    sides = shown.pictures[0].shape[:2]
    height, width = (INCHES * side / max(sides) for side in sides)
    tall, wide = height * (len(cells) + 1) + 0.5, width * len(columns) + NAMES + SCALES
    figure = new_figure(wide, tall)
    figure.set_layout_engine("none")  # arranging hundreds of panels takes minutes
    edges = {"left": NAMES / wide, "right": 1 - SCALES / wide, "top": 1 - 0.4 / tall, "bottom": 0.02 / tall}
    spacing = {**edges, "wspace": 0.06, "hspace": 0.06}
    grid = figure.subplots(len(cells) + 1, len(columns), squeeze=False, gridspec_kw=spacing)
    for axes, (image, layer) in zip(grid[0], columns, strict=True):
        own = shown.maps[image, layer]
        draw_heat(axes, shown.pictures[image], own.grid, own.asking)
        axes.set_title(f"image {image + 1}\nlayer {layer}", color=INK[theme], fontsize=7)
    for row, kept in zip(grid[1:], cells.values(), strict=True):
        for axes, column in zip(row, columns, strict=True):
            found = None if kept is None else kept.maps.get(column)
            _draw_cell(
                axes, shown, column, found, tops[column], "no map" if kept is None else "no attention", theme
            )
    _draw_scales(figure, [found for kept in cells.values() if kept for found in kept.maps.values()], wide)
    for row, name in zip(grid, ["", *cells], strict=True):
        box = row[0].get_position()
        middle = (box.y0 + box.y1) / 2
        figure.text(
            (NAMES - 0.08) / wide, middle, name, ha="right", va="center", color=INK[theme], fontsize=8
        )
    return figure


def _top(cells: Mapping[str, CellMaps | None], column: tuple[int, int]) -> float:
    """Return the largest weight of a column: the same layer of all cells, on the same image, is compared."""
    found = [kept.maps[column].heat for kept in cells.values() if kept is not None and column in kept.maps]
    return max((float(abs(heat).max()) for heat in found if heat.size), default=0) or 1


def _draw_scales(figure: Figure, found: Sequence[CellMap], wide: float) -> None:
    """Draw the color bars beside the panels."""
    signed = any(_is_signed(each) for each in found)
    label = "weight / the largest number of the column"
    for each, (bottom, tall) in zip((False, True), ((0.52, 0.4), (0.06, 0.4)), strict=True):
        if signed or not each:
            place = figure.add_axes((1 - (SCALES - 0.1) / wide, bottom, 0.1 / wide, tall))
            color_bar(figure, SIGNED_LABEL if each else label, signed=each, cax=place)


def _is_signed(found: CellMap) -> bool:
    return bool((found.heat < 0).any())


def _draw_cell(
    axes: Any,
    shown: CellMaps,
    column: tuple[int, int],
    found: CellMap | None,
    top: float,
    missing: str,
    theme: Theme,
) -> None:
    """Draw a map over its image, or say what is missing."""
    if found is None or not found.heat.size:
        axes.set_axis_off()
        axes.text(0.5, 0.5, missing, ha="center", va="center", color=INK[theme], fontsize=6.5)
        return
    picture, signed = shown.pictures[column[0]], _is_signed(found)
    draw_heat(axes, picture, found.grid, found.asking, found.heat, top, signed=signed, covers=found.extent)
    write_corner(axes, f"{float(abs(found.heat).max()):.2g}")


NAME = "compare"


def write_report(comparison: Comparison, *, figures: bool = True) -> Path:
    """Write `compare.csv`, `.json` and `.md`, and with `figures` also `images/` and `compare.html`.

    All numbers are those of the cells on the disk: of each cell in CSV and JSON, means over seeds elsewhere. Returns
    the path of the page, or of the table without figures.

    Raises WriteFailedError as `write_file`.
    """
    folder, records = comparison.folder, comparison.records()
    means = mean_over_seeds(records)
    plots = [*plots_of(means), *_attention(comparison)] if figures else []
    write_text(folder / f"{NAME}.csv", records_csv(records))
    write_text(folder / f"{NAME}.json", records_json(records))
    write_text(folder / f"{NAME}.md", render_markdown(means, plots))
    if not figures:
        return folder / f"{NAME}.md"
    pages.write_pictures(plots, folder)
    write_text(folder / f"{NAME}.html", render_html(means, plots))
    return folder / f"{NAME}.html"


def _attention(comparison: Comparison) -> list[pages.Plot]:
    """Return the plot of the attention of the finished cells at the largest image size, if one has kept its maps."""
    records = [record for record in comparison.records() if record.error is None]
    largest = max((record.size for record in records), default=0)
    folders: dict[str, Path] = {}
    for each in records:
        if each.size == largest:
            folders.setdefault(each.name, comparison.folder / "cells" / each.folder)  # of the first seed
    plot = map_plot({name: load_maps(folder) for name, folder in folders.items()})
    return [] if plot is None else [plot]


def render_markdown(records: Sequence[Record], plots: Sequence[pages.Plot]) -> str:
    """Return the report as Markdown; its images are in `images/`."""
    first, second, note = (plain(words(records)) for words in (question, answer, how_to_read))
    table = to_markdown(records).strip()
    return "\n\n".join(filter(None, [first, second, table, note, *map(pages.markdown_plot, plots)])) + "\n"


def render_html(records: Sequence[Record], plots: Sequence[pages.Plot]) -> str:
    """Return the page with both tables, the plots and the failures."""
    return pages.render_page(
        "compare/comparison.html",
        title=TITLE,
        question=question(records),
        answer=answer(records),
        accuracy=accuracy_table(records),
        cost=cost_table(records),
        failures=failures(records),
        note=how_to_read(records),
        plots=plots,
    )
