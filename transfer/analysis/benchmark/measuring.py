"""The row of a case from its two steps: fused softmax attention, and what is measured beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn

from .cases import Case, Row, load_average
from .timing import Step, peak_bytes, time_steps


def compiled(module: nn.Module, case: Case) -> nn.Module:
    """Return the module, compiled where the case asks for it."""
    return cast(nn.Module, torch.compile(module)) if case.compiled else module


def measure_case(
    case: Case,
    steps: Sequence[Step],
    repeats: int,
    *,
    macs: int,
    counted: int,
    peers: Mapping[str, Step] | None = None,
    package: str = "",
) -> Row:
    """Time both `steps` in turn, softmax first, and measure the peak memory of the second.

    `peers` may have a step `straight` and a step `public`, which take their turns, too.
    """
    device, (softmax, own) = torch.device(case.device), steps
    timings = time_steps({"softmax": softmax, "own": own, **(peers or {})}, repeats, device)
    time = timings["own"]
    straight, public = (timings[name].median if name in timings else None for name in ("straight", "public"))
    return Row(
        case,
        time.median,
        time.low,
        time.high,
        timings["softmax"].median,
        peak_bytes(own, device),
        macs,
        counted,
        load_average(),
        straight,
        public,
        package,
        time.cpu,
        timings["softmax"].cpu,
    )
