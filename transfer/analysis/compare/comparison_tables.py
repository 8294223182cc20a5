"""The rows of the table: accuracy by stage, cost, and how much of the gap each student recovered."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from ....checkpoints.publish.card import plain
from ....models.attention.base import Operations
from ...metrics.intervals import Interval, Z, accuracy_interval, standard_error
from ..benchmark.energy import Prices
from ..report.tables import markdown, milliseconds, to_csv, to_json
from .cell_record import Record, Score, Speed
from .comparison_cells import TEACHER, UNIFORM

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
