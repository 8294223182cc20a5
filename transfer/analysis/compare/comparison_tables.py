"""The rows of the table: accuracy by stage, cost, and how much of the gap each student recovered."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ....checkpoints.markdown import plain
from ..benchmark.benchmark_tables import markdown, milliseconds
from .cell_record import Record
from .comparison_cells import TEACHER, UNIFORM

MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Line:
    """A cell with what it means beside the others of its image size."""

    record: Record
    gap_trained: float | None
    """(student − uniform) / (teacher − uniform), uniform attention trained with the same budget."""
    gap_zero_shot: float | None
    """The same against uniform attention as converted, untrained."""


def lines_of(records: Sequence[Record]) -> list[Line]:
    """A line for each record; the gaps where there are a reference and a uniform student of its size."""
    return [Line(record, *_gaps(record, records)) for record in records]


def reference(records: Sequence[Record], size: int) -> Record | None:
    """What students are measured against: the teacher, or without one the student that keeps softmax everywhere."""
    here = [record for record in records if record.size == size and record.final is not None]
    named = [record for record in here if record.name == TEACHER]
    softmax = [record for record in here if record.plan is not None and is_softmax(record.plan)]
    return next(iter(named + softmax), None)


def best_linear(records: Sequence[Record], size: int) -> Record | None:
    """The student of the highest accuracy among those whose every layer costs linearly, uniform left out."""
    found = [
        record
        for record in records
        if record.size == size and record.linear and record.name != UNIFORM and record.final is not None
    ]
    return max(found, key=_final_top1, default=None)


def stage_names(records: Iterable[Record]) -> list[str]:
    """The stages of all records in their order, the zero-shot one first."""
    return list(dict.fromkeys(score.stage for record in records for score in record.scores))


def to_json(records: Sequence[Record]) -> str:
    """All that is known of the cells, with the gaps."""
    rows = [
        {**dataclasses.asdict(line.record), "seconds": line.record.seconds,
         "gap_recovered_trained_uniform": line.gap_trained, "gap_recovered_zero_shot_uniform": line.gap_zero_shot}
        for line in lines_of(records)
    ]  # fmt: skip
    return json.dumps(rows, indent=1) + "\n"


def to_csv(records: Sequence[Record]) -> str:
    """A row a cell; empty where there is no number."""
    stages = stage_names(records)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    accuracies = [f"{stage}_{key}" for stage in stages for key in ("top1", "top5")]
    costs = [
        "latency",
        "softmax_latency",
        "throughput",
        "softmax_throughput",
        "peak_bytes",
        "macs",
        "counted_macs",
    ]
    writer.writerow(
        ["name", "plan", "img_size", "error", "linear", *accuracies, "gap_recovered_trained_uniform",
         "gap_recovered_zero_shot_uniform", "parameters", "new_parameters", "training_seconds", *costs]
    )  # fmt: skip
    for line in lines_of(records):
        record, by_stage = line.record, {score.stage: score for score in line.record.scores}
        scores = [
            getattr(by_stage[stage], key) if stage in by_stage else ""
            for stage in stages
            for key in ("top1", "top5")
        ]
        speed = [getattr(record.speed, cost) if record.speed else "" for cost in costs]
        gaps = ["" if gap is None else gap for gap in (line.gap_trained, line.gap_zero_shot)]
        writer.writerow(
            [record.name, record.plan or "", record.size, record.error or "", record.linear, *scores, *gaps,
             record.parameters, record.new_parameters, record.seconds, *speed]
        )  # fmt: skip
    return text.getvalue()


def accuracy_table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: top-1 / top-5 of each stage, the gaps, the training time."""
    stages, sizes = stage_names(records), {record.size for record in records}
    head = ["cell", *stages, "gap recovered", "against zero-shot uniform", "training s"]
    rows = []
    for line in lines_of(records):
        record, by_stage = line.record, {score.stage: score for score in line.record.scores}
        if record.error is not None:
            continue
        shown = [
            f"{by_stage[stage].top1:.1f} / {by_stage[stage].top5:.1f}" if stage in by_stage else ""
            for stage in stages
        ]
        seconds = f"{record.seconds:.0f}" if record.plan is not None else ""
        rows.append(
            [label(record, sizes), *shown, _share(line.gap_trained), _share(line.gap_zero_shot), seconds]
        )
    return head, rows


def cost_table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: what a student costs at the size of its training."""
    sizes = {record.size for record in records}
    head = [
        "cell",
        "parameters",
        "new",
        "MMACs",
        "counted",
        "ms, batch 1",
        "softmax ms",
        "images/s",
        "peak MiB",
        "linear",
    ]
    rows = []
    for record in records:
        speed = record.speed
        if record.error is not None or speed is None:
            continue
        rows.append(
            [
                label(record, sizes),
                f"{record.parameters:,}",
                f"{record.new_parameters:,}",
                f"{speed.macs / 1e6:.2f}",
                f"{speed.counted_macs / 1e6:.2f}",
                milliseconds(speed.latency),
                milliseconds(speed.softmax_latency),
                f"{speed.throughput:,.0f}",
                f"{speed.peak_bytes / 2**20:.1f}",
                "yes" if record.linear else "no",
            ]
        )
    return head, rows


def to_markdown(records: Sequence[Record]) -> str:
    """Both tables, and the cells that failed."""
    parts = [markdown(*accuracy_table(records)), markdown(*cost_table(records))]
    return "\n\n".join([*parts, *map(plain, failures(records))]) + "\n"


def failures(records: Sequence[Record]) -> list[str]:
    """A sentence for each cell that failed."""
    return [
        f"Failed: {record.name} at {record.size} px: {record.error}" for record in records if record.error
    ]


def label(record: Record, sizes: Iterable[int]) -> str:
    """The name, with the image size where there are several."""
    return record.name if len(set(sizes)) == 1 else f"{record.name}, {record.size} px"


def _gaps(record: Record, records: Sequence[Record]) -> tuple[float | None, float | None]:
    top, floor = reference(records, record.size), _uniform(records, record.size)
    if top is None or floor is None or record.final is None:
        return None, None
    return tuple(
        _gap(_final_top1(record), score.top1, _final_top1(top))
        for score in (floor.scores[-1], floor.scores[0])
    )  # type: ignore[return-value]


def _gap(value: float, low: float, high: float) -> float | None:
    return (value - low) / (high - low) if high > low else None


def _uniform(records: Sequence[Record], size: int) -> Record | None:
    return next((r for r in records if r.name == UNIFORM and r.size == size and r.scores), None)


def is_softmax(plan: str) -> bool:
    """Whether it keeps every layer."""
    return plan.replace(" ", "") in ("*:softmax", "*:keep")


def _final_top1(record: Record) -> float:
    return record.scores[-1].top1


def _share(gap: float | None) -> str:
    return "" if gap is None else f"{100 * gap:.0f} %".replace("-", MINUS)
