"""What the report says around its tables."""

from __future__ import annotations

from collections.abc import Sequence

from .cell_record import Record
from .comparison_tables import best_linear, interval_of, lines_of, reference

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
