"""What a comparison says: how much of the gap each student recovered, what it costs, and the finding."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ....checkpoints.atomic import write_text
from ....models.attention.base import Operations
from ...metrics.intervals import Interval, Z, accuracy_interval, standard_error
from ..benchmark_cases import Prices
from ..report.rendering import Figure, Report, compose
from ..report.tables import Table, milliseconds, tabulate, to_json
from .comparison_cells import TEACHER, UNIFORM, Comparison, Record, Score, Speed, mean_over_seeds
from .comparison_plots import figures_of, map_figure
from .student_cell import load_maps

# The rows of the table: accuracy by stage, cost, and how much of the gap each student recovered.

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


GAPS: Mapping[str, Callable[[Line], float | None]] = {
    "gap_recovered_trained_uniform": lambda line: line.gap_trained,
    "gap_recovered_trained_uniform_error": lambda line: line.gap_error,
    "gap_recovered_zero_shot_uniform": lambda line: line.gap_zero_shot,
    "gap_recovered_zero_shot_uniform_error": lambda line: line.gap_zero_shot_error,
}
"""The columns of a line's gaps in CSV and JSON."""


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
                **{name: value(line) for name, value in GAPS.items()},
            }
            for line in lines_of(records)
        ]
    )


def records_table(records: Sequence[Record]) -> Table:
    """Return a row of numbers for each cell; None stands for a missing number."""
    scores = {
        f"{stage}_{key}": partial(_of_stage, stage, key)
        for stage in stage_names(records)
        for key in ("top1", "top5")
    }
    columns: dict[str, Callable[[Line], object]] = {
        "name": lambda line: line.record.name,
        "plan": lambda line: line.record.plan,
        "img_size": lambda line: line.record.size,
        "error": lambda line: line.record.error,
        "linear": lambda line: line.record.linear,
        **scores,
        "test_images": lambda line: getattr(line.record.final, "samples", None),
        "top1_low": lambda line: (interval_of(line.record) or (None,))[0],
        "top1_high": lambda line: (interval_of(line.record) or (None,))[-1],
        **GAPS,
        "seed": lambda line: line.record.seed,
        "parameters": lambda line: line.record.parameters,
        "new_parameters": lambda line: line.record.new_parameters,
        "training_seconds": lambda line: line.record.seconds,
        **{cost: partial(_of_speed, cost) for cost in COSTS},
        "energy_pj": lambda line: energy_of(line.record.speed),
    }
    return tabulate(lines_of(records), columns)


def _of_stage(stage: str, key: str, line: Line) -> object:
    return getattr(line.record.score(stage), key, None)


def _of_speed(cost: str, line: Line) -> object:
    return getattr(line.record.speed, cost, None)


def accuracy_table(records: Sequence[Record]) -> Table:
    """Return top-1 / top-5 of each stage, the interval of the last top-1, the gaps and the training time."""
    sizes = {record.size for record in records}
    columns: dict[str, Callable[[Line], str]] = {
        "cell": lambda line: label(line.record, sizes),
        **{stage: partial(_accuracy, stage) for stage in stage_names(records)},
        "95 % interval": lambda line: _interval(line.record),
        "gap recovered": lambda line: _share(line.gap_trained, line.gap_error, tied=line.tied[0]),
        "against zero-shot uniform": lambda line: _share(
            line.gap_zero_shot, line.gap_zero_shot_error, tied=line.tied[1]
        ),
        "training s": lambda line: f"{line.record.seconds:.0f}" if line.record.plan is not None else "",
    }
    return tabulate([line for line in lines_of(records) if line.record.error is None], columns)


def cost_table(records: Sequence[Record]) -> Table:
    """Return what a student costs at the size of its training."""
    sizes = {record.size for record in records}
    measured = [(record, record.speed) for record in records if record.error is None and record.speed]
    columns: dict[str, Callable[[tuple[Record, Speed]], str]] = {
        "cell": lambda each: label(each[0], sizes),
        "parameters": lambda each: f"{each[0].parameters:,}",
        "new": lambda each: f"{each[0].new_parameters:,}",
        "MMACs": lambda each: f"{each[1].macs / 1e6:.2f}",
        "counted": lambda each: f"{each[1].counted_macs / 1e6:.2f}",
        "µJ": lambda each: f"{(energy_of(each[1]) or 0) / 1e6:,.1f}",
        "ms, batch 1": lambda each: milliseconds(each[1].latency),
        "unconverted ms": lambda each: milliseconds(each[1].softmax_latency),
        "images/s": lambda each: f"{each[1].throughput:,.0f}",
        "peak MiB": lambda each: f"{each[1].peak_bytes / 2**20:.1f}",
        "linear": lambda each: "yes" if each[0].linear else "no",
    }
    return tabulate(measured, columns)


def label(record: Record, sizes: Iterable[int]) -> str:
    """Return the name, with the image size where there are several."""
    return record.name if len(set(sizes)) == 1 else f"{record.name}, {record.size} px"


def energy_of(speed: Speed | None) -> float | None:
    """Return the energy in pJ of the multiplications and additions of one image, with 32-bit floats at 45 nm."""
    if speed is None:
        return None
    return Prices().energy(Operations(speed.multiplications, speed.additions))


def _accuracy(stage: str, line: Line) -> str:
    score = line.record.score(stage)
    if score is None:
        return ""
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


NAME = "compare"


def write_report(comparison: Comparison, *, figures: bool = True) -> Path:
    """Write `compare.csv`, `.json` and `.md`, and with `figures` also `images/` and `compare.html`.

    All numbers are those of the cells on the disk: of each cell in CSV and JSON, means over seeds elsewhere. Returns
    the path of the page, or of the table without figures.

    Raises WriteFailedError as `write_file`.
    """
    folder, records = comparison.folder, comparison.records()
    means = mean_over_seeds(records)
    report = make_report(means, [*figures_of(means), *_attention(comparison)] if figures else [])
    write_text(folder / f"{NAME}.csv", records_table(records).to_csv())
    write_text(folder / f"{NAME}.json", records_json(records))
    if figures:
        return report.write(folder, NAME)
    write_text(folder / f"{NAME}.md", report.to_markdown())
    return folder / f"{NAME}.md"


def _attention(comparison: Comparison) -> list[Figure]:
    """Return the figure of the attention of the finished cells at the largest image size, if one has kept its maps."""
    records = [record for record in comparison.records() if record.error is None]
    largest = max((record.size for record in records), default=0)
    folders: dict[str, Path] = {}
    for each in records:
        if each.size == largest:
            folders.setdefault(each.name, comparison.folder / "cells" / each.folder)  # of the first seed
    figure = map_figure({name: load_maps(folder) for name, folder in folders.items()})
    return [] if figure is None else [figure]


def make_report(records: Sequence[Record], figures: Sequence[Figure]) -> Report:
    """Return both tables with the finding, what failed, how to read them, and the figures."""
    samples = {score.samples for record in records for score in record.scores if score.samples is not None}
    return compose(
        "compare/comparison.txt",
        students=sum(record.plan is not None and record.error is None for record in records),
        findings=[
            each for size in sorted({record.size for record in records}) for each in _finding(records, size)
        ],
        images=" ".join(f"{count:,}" for count in sorted(samples)),
        accuracy=accuracy_table(records),
        cost=cost_table(records),
        failed=[record for record in records if record.error],
        seeds=max((record.seeds for record in records), default=1),
        machines=sorted({record.machine for record in records}),
        loads=[record.load for record in records] or [0.0],
        figures=figures,
        interval=_interval,
    )


def _finding(records: Sequence[Record], size: int) -> list[tuple[Record, list[Record], Line]]:
    """Return the reference, the best students of linear cost, and the line of the first; empty without both."""
    top, best = reference(records, size), best_linear(records, size)
    if top is None or not best:
        return []
    return [(top, best, next(line for line in lines_of(records) if line.record is best[0]))]
