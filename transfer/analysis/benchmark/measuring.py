"""The row of a case from its two steps: fused softmax attention, and what is measured beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from .cases import Case, Row, load_average
from .timing import Step, peak_bytes, time_steps


def compiled(module: nn.Module, case: Case) -> nn.Module:
    """Return the module, compiled where the case asks for it."""
    return cast(nn.Module, torch.compile(module)) if case.compiled else module


def measure_case(case: Case, steps: Sequence[Step], repeats: int, *, macs: int, counted: int) -> Row:
    """Time both `steps` in turn, softmax first, and measure the peak memory of the second."""
    device, (softmax, own) = torch.device(case.device), steps
    timings = time_steps({"softmax": softmax, "own": own}, repeats, device)
    time = timings["own"]
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
    )
