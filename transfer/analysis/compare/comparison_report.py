"""What a comparison leaves: tables as CSV, JSON and Markdown, plots, and one HTML page with all in it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ....checkpoints.atomic import write_text
from ....checkpoints.markdown import plain
from ....models.attention.base import Operations
from ...metrics.intervals import Interval, Z, accuracy_interval, standard_error
from ..benchmark.cases import Prices
from ..report import pages
from ..report.tables import markdown, milliseconds, to_csv, to_json
from .comparison_cells import TEACHER, UNIFORM, Record, Score, Speed, mean_over_seeds
from .comparison_plots import map_plot, plots_of
from .student_cell import load_maps

if TYPE_CHECKING:
    from .compare import Comparison


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
    gap_zero_shot_error: float | None = None
    """The same of `gap_zero_shot`."""
    tied: tuple[bool, bool] = (False, False)
    """Whether there is no gap to recover, from each floor: the reference is not above it."""


def lines_of(records: Sequence[Record]) -> list[Line]:
    """Return a line for each record, with gaps where there are a reference and a uniform student of its size."""
    return [_line(record, records) for record in records]


def _line(record: Record, records: Sequence[Record]) -> Line:
    beside = [each for each in records if each.seed in (None, record.seed)]
    top, floor = reference(beside, record.size), _uniform(beside, record.size)
    if top is None or floor is None or record.final is None:
        return Line(record, None, None)
    scores = record.scores[-1], top.scores[-1]
    floors = floor.scores[-1], floor.scores[0]
    trained, zero_shot = (_gap(*scores, each) for each in floors)
    return Line(
        record,
        trained,
        zero_shot,
        _gap_error(*scores, floors[0], trained),
        _gap_error(*scores, floors[1], zero_shot),
        (trained is None, zero_shot is None),
    )


def reference(records: Sequence[Record], size: int) -> Record | None:
    """Return the reference of all students: the teacher, or without one the student whose plan keeps every layer."""
    here = [record for record in records if record.size == size and record.final is not None]
    named = [record for record in here if record.name == TEACHER]
    return next(iter(named + [record for record in here if record.is_unconverted]), None)


def best_linear(records: Sequence[Record], size: int) -> list[Record]:
    """Return the most accurate student whose every layer costs linearly, uniform attention left out; all that tie."""
    found = [
        record
        for record in records
        if record.size == size and record.linear and record.name != UNIFORM and record.final is not None
    ]
    best = max(map(_final_top1, found), default=0.0)
    return [record for record in found if math.isclose(_final_top1(record), best)]


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
                "gap_recovered_zero_shot_uniform_error": line.gap_zero_shot_error,
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
        "gap_recovered_zero_shot_uniform_error": lambda line: line.gap_zero_shot_error,
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
                _share(line.gap_trained, line.gap_error, tied=line.tied[0]),
                _share(line.gap_zero_shot, line.gap_zero_shot_error, tied=line.tied[1]),
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
    if speed is None:
        return None
    return Prices().energy(Operations(speed.multiplications, speed.additions))


def _microjoules(picojoules: float | None) -> str:
    return "" if picojoules is None else f"{picojoules / 1e6:,.1f}"


def _accuracy(score: Score) -> str:
    spread = "" if score.deviation is None else f" ± {score.deviation:.1f}"
    return f"{score.top1:.1f}{spread} / {score.top5:.1f}"


def _gap(student: Score, top: Score, floor: Score) -> float | None:
    width = top.top1 - floor.top1
    return (student.top1 - floor.top1) / width if width > 0 else None


def _gap_error(student: Score, top: Score, floor: Score, gap: float | None) -> float | None:
    """Return half of the 95 % interval of a gap, by the errors of its three accuracies.

    They are taken as independent. All are of the same images, which as a rule makes their differences surer.
    """
    three = student, top, floor
    if student is top or student is floor or gap is None or any(not score.samples for score in three):
        return None
    errors = [standard_error(score.top1, score.samples or 1) for score in three]
    return Z * math.hypot(errors[0], gap * errors[1], (1 - gap) * errors[2]) / (top.top1 - floor.top1)


def interval_of(record: Record) -> Interval | None:
    """Return the 95 % interval of the last top-1; None where the number of images is not known."""
    final = record.final
    return None if final is None or final.samples is None else accuracy_interval(final.top1, final.samples)


def _interval(record: Record) -> str:
    found = interval_of(record)
    return "" if found is None else f"{found[0]:.1f} to {found[1]:.1f}"


def _uniform(records: Sequence[Record], size: int) -> Record | None:
    return next((r for r in records if r.name == UNIFORM and r.size == size and r.scores), None)


def _final_top1(record: Record) -> float:
    return record.scores[-1].top1


def _share(gap: float | None, error: float | None, *, tied: bool) -> str:
    if gap is None:
        return "no gap" if tied else ""
    return f"{100 * gap:.0f} %".replace("-", MINUS) + ("" if error is None else f" ± {100 * error:.0f}")


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
    """Name the best student of linear cost at each image size, those that tie, and the gap that they recovered."""
    return " ".join(filter(None, (_answer(records, size) for size in sorted({r.size for r in records}))))


def _answer(records: Sequence[Record], size: int) -> str:
    top, best = reference(records, size), best_linear(records, size)
    if top is None or top.final is None or not best:
        return ""
    line = next(line for line in lines_of(records) if line.record is best[0])
    names = " and ".join(record.name for record in best)
    words = (
        f"At {size} px the {top.name} names {_named(top)} of the{_images(best)} test images, and the best "
        f"{'student' if len(best) == 1 else 'students'} of linear cost, {names}, {_named(best[0])}"
    )
    trained = "uniform attention trained with the same budget"
    if line.tied[0]:
        return f"{words}. The {top.name} is no better than {trained}: there is no gap to recover."
    if line.gap_trained is None or line.gap_zero_shot is None:
        return f"{words}."
    return (
        f"{words}: {100 * line.gap_trained:.0f} %{_margin(line.gap_error)} of the gap between the {top.name} and "
        f"{trained}, {100 * line.gap_zero_shot:.0f} %{_margin(line.gap_zero_shot_error)} of that to uniform attention "
        "without training."
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
        "against the uniform student of the same budget and once against the uniform student before any training; "
        "“no gap” where the teacher is no better than that student. "
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
