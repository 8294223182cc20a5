"""How fast a student is, timed in turn with softmax attention, and what it costs.

Cells that ran at other times, or side by side, are timed again together, in the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ....models.cost import count_operations
from ....models.errors import JsonDict
from ....models.families import image_channels, sites
from ...cells.records import save_record
from ..benchmark.cases import load_average, machine
from ..benchmark.model_cases import attention_macs, macs_beside
from ..benchmark.timing import counted_macs, peak_bytes, step_of, time_steps
from .cell_record import Record, Speed
from .student_cell import speed_models

if TYPE_CHECKING:
    from .compare import Comparison

TWIN = "unconverted model"
"""The model that all are timed beside; no plan has a space in its name."""


def measure_speed(
    softmax: nn.Module, student: nn.Module, size: int, batch: int, repeats: int, device: torch.device
) -> Speed:
    """Return the speed of `student` at images of side `size`, timed in turn with its unconverted twin."""
    models = {TWIN: softmax, "own": student}
    images = _images(models, size, batch, device)
    times = _times(models, images, repeats, device)["own"]
    operations = count_operations(student).total
    counted, whole = (counted_macs(step_of(partial(model, images[:1]))) for model in (student, softmax))
    return Speed(
        size=size,
        batch=batch,
        tokens=sites(student)[0].shape.geometry.num_tokens,
        peak_bytes=peak_bytes(step_of(partial(student, images)), device),
        macs=macs_beside(student, softmax, whole) + attention_macs(student),
        counted_macs=counted,
        multiplications=operations.multiplications,
        additions=operations.additions,
        **times,
    )


def measure_again(comparison: Comparison, repeats: int, tell: Callable[[str], None]) -> None:
    """Time every cell that is done, at each of its sizes, in turn with all others and with softmax; rewrite them.

    Raises WriteFailedError as `write_file`.
    """
    records = [record for record in comparison.records() if record.error is None and record.speeds]
    for train_size in sorted({record.size for record in records}):
        group = [record for record in records if record.size == train_size]
        speeds: dict[str, list[Speed]] = {record.name: [] for record in group}
        for size in sorted({speed.size for record in group for speed in record.speeds}):
            tell(f"{len(group)} cells at {size} px")
            for name, speed in _together(comparison, group, size, repeats).items():
                speeds[name].append(speed)
        for record in group:
            again = replace(record, speeds=speeds[record.name], machine=machine(), load=load_average())
            save_record(again, comparison.folder / "cells" / record.folder)


def _together(comparison: Comparison, records: Sequence[Record], size: int, repeats: int) -> dict[str, Speed]:
    """Return the speeds, by name, of cells of one training size at images of side `size`."""
    before = {record.name: speed for record in records for speed in record.speeds if speed.size == size}
    plans = {record.name: record.plan for record in records}
    everyone = {name: speed_models(comparison.config, plans[name], size)[1] for name in before}
    everyone[TWIN] = speed_models(comparison.config, None, size)[0]
    batch = next(iter(before.values())).batch
    images = _images(everyone, size, batch, comparison.device)
    times = _times(everyone, images, repeats, comparison.device)
    return {name: replace(speed, **times[name]) for name, speed in before.items()}


def _images(models: Mapping[str, nn.Module], size: int, batch: int, device: torch.device) -> Tensor:
    """Put the models on the device, and return a batch of random images for them."""
    for model in models.values():
        model.to(device).eval().requires_grad_(False)
    channels = image_channels(next(iter(models.values())))
    return torch.randn(batch, channels, size, size, device=device)


def _times(
    models: Mapping[str, nn.Module], images: Tensor, repeats: int, device: torch.device
) -> dict[str, JsonDict]:
    """Return the times of each model, named as in `Speed`, beside those of the twin."""
    one, many = (
        time_steps({name: step_of(partial(model, some)) for name, model in models.items()}, repeats, device)
        for some in (images[:1], images)
    )
    return {
        name: {
            "latency": one[name].median,
            "latency_low": one[name].low,
            "latency_high": one[name].high,
            "softmax_latency": one[TWIN].median,
            "throughput": len(images) / many[name].median,
            "softmax_throughput": len(images) / many[TWIN].median,
        }
        for name in models
    }
