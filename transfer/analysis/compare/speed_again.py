"""Timings of all cells in the same rounds: what cells that ran at other times, or side by side, cannot have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..benchmark.cases import load_average, machine
from ..benchmark.timing import Timing, time_steps
from .cell_record import Record, Speed, save_record
from .compare import Comparison, device_of
from .speed import forward_step
from .student_cell import speed_models

SOFTMAX = "softmax attention"
Times = dict[str, Timing]


def measure_again(comparison: Comparison, repeats: int, tell: Callable[[str], None]) -> None:
    """Times every cell that is done, at each of its sizes, in turn with all others and with softmax; rewrites them.

    Raises WriteFailedError as `write_file`.
    """
    cells = {cell.folder: cell for cell in comparison.cells()}
    records = {
        f"{record.name}-{record.size}": record for record in comparison.records() if record.error is None
    }
    for train_size in sorted({record.size for record in records.values()}):
        group = {name: record for name, record in records.items() if record.size == train_size}
        speeds: dict[str, list[Speed]] = {name: [] for name in group}
        for size in sorted({speed.size for record in group.values() for speed in record.speeds}):
            tell(f"{len(group)} cells at {size} px")
            for name, speed in _at(comparison, list(group.values()), size, repeats).items():
                speeds[name].append(speed)
        for name, record in group.items():
            again = replace(record, speeds=speeds[name], machine=machine(), load=load_average())
            save_record(again, comparison.cell_folder(cells[name]))


def _at(comparison: Comparison, records: Sequence[Record], size: int, repeats: int) -> dict[str, Speed]:
    """The speeds of cells of one training size at images of side `size`."""
    device = device_of(comparison)
    before = {
        f"{record.name}-{record.size}": speed
        for record in records
        for speed in record.speeds
        if speed.size == size
    }
    plans = {f"{record.name}-{record.size}": record.plan for record in records} | {SOFTMAX: None}
    batch = next(iter(before.values())).batch
    models = {
        name: speed_models(comparison.config, plans[name], size)[1].to(device).eval()
        for name in [*before, SOFTMAX]
    }
    channels = int(models[SOFTMAX].patch_embed.proj.in_channels)  # type: ignore[union-attr, arg-type]
    images = torch.randn(batch, channels, size, size, device=device)
    one = time_steps({n: forward_step(m, images[:1]) for n, m in models.items()}, repeats, device)
    many = time_steps({n: forward_step(m, images) for n, m in models.items()}, repeats, device)
    return {name: _timed(speed, name, one, many) for name, speed in before.items()}


def _timed(speed: Speed, name: str, one: Times, many: Times) -> Speed:
    return replace(
        speed,
        latency=one[name].median,
        latency_low=one[name].low,
        latency_high=one[name].high,
        softmax_latency=one[SOFTMAX].median,
        throughput=speed.batch / many[name].median,
        softmax_throughput=speed.batch / many[SOFTMAX].median,
    )
