"""How fast a student is, timed in turn with its teacher's attention, and what it costs."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from ....models.attention.base import Geometry
from ....models.families import token_layout
from ..benchmark.model_cases import attention_macs
from ..benchmark.timing import Step, counted_macs, peak_bytes, time_steps
from .cell_record import Speed


def measure_speed(
    softmax: nn.Module, student: nn.Module, size: int, batch: int, repeats: int, device: torch.device
) -> Speed:
    """The speed of `student` at images of side `size`, timed in turn with `softmax`, its twin of softmax attention."""
    for model in (softmax, student):
        model.to(device).eval().requires_grad_(False)
    channels = int(cast(Any, student).patch_embed.proj.in_channels)
    images = torch.randn(batch, channels, size, size, device=device)
    own, theirs = forward_step(student, images), forward_step(softmax, images)
    own_one, theirs_one = forward_step(student, images[:1]), forward_step(softmax, images[:1])
    one = time_steps({"softmax": theirs_one, "own": own_one}, repeats, device)
    many = time_steps({"softmax": theirs, "own": own}, repeats, device)
    layout = token_layout(student)
    return Speed(
        size=size,
        batch=batch,
        tokens=Geometry(layout.num_prefix, layout.grid).num_tokens,
        latency=one["own"].median,
        latency_low=one["own"].low,
        latency_high=one["own"].high,
        softmax_latency=one["softmax"].median,
        throughput=batch / many["own"].median,
        softmax_throughput=batch / many["softmax"].median,
        peak_bytes=peak_bytes(own, device),
        macs=counted_macs(theirs_one) - attention_macs(softmax) + attention_macs(student),
        counted_macs=counted_macs(own_one),
    )


def forward_step(model: nn.Module, images: torch.Tensor) -> Step:
    """One forward pass of a batch, without gradients."""

    def forward() -> None:
        with torch.no_grad():
            model(images)

    return forward
