"""A whole model converted by a plan, timed in turn with the model as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from ....checkpoints.build import build, check_name
from ....checkpoints.sources import TimmSource, parse_source
from ....checkpoints.teacher import load_teacher
from ....models.conversion import convert, layer_macs
from ....models.errors import ConfigError
from ....models.families import attention_blocks
from .cases import DTYPES, Case, Row, load_average
from .timing import Step, counted_macs, peak_bytes, time_steps


def model_cases(
    sources: Sequence[str],
    plans: Sequence[str],
    sizes: Sequence[int],
    batches: Sequence[int],
    dtypes: Sequence[str],
    device: str,
    *,
    backward: bool,
    compiled: bool,
) -> list[Case]:
    """Every combination, small images first.

    Raises GraftError: a source is not there, an image size does not fit it, or a plan is none.
    """
    for source in sources:
        model = load_model(source, min(sizes))
        for plan in plans:
            convert(model, plan)
        for size in sizes:
            load_model(source, size)
    return [
        Case("models", plan, source, size, batch, dtype, device, back, fast)
        for size in sorted(sizes)
        for source in sources
        for batch in batches
        for dtype in dtypes
        for back in ([False, True] if backward else [False])
        for fast in ([False, True] if compiled else [False])
        for plan in plans
    ]


def load_model(source: str, img_size: int) -> nn.Module:
    """The model of a source for images of so many pixels.

    A timm name is built with random weights, which are as fast as any: nothing is downloaded for it.

    Raises CheckpointError: there is no such source, or it takes no such images.
    """
    found = parse_source(source)
    if isinstance(found, TimmSource):
        check_name(found.name)
        model = build(found.name.partition(".")[0], {"img_size": img_size}).eval()
    else:
        model = load_teacher(source, img_size=img_size).model
    _check_size(model, img_size)
    return model


def _check_size(model: nn.Module, img_size: int) -> None:
    """ConfigError where patches do not fill the image: timm leaves the rest out without a word."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is not None and img_size % patch[0]:
        nearest = patch[0] * max(1, round(img_size / patch[0]))
        raise ConfigError(
            f"--img_size {img_size}: patches of {patch[0]} pixels do not fill it; take {nearest}"
        )


def measure_model(case: Case, repeats: int) -> Row:
    """Times, memory and multiply-adds of one case."""
    device, dtype = torch.device(case.device), DTYPES[case.dtype]
    softmax = load_model(case.source, case.size)
    student = convert(softmax, case.name)
    softmax, student = (model.to(device, dtype).requires_grad_(case.backward) for model in (softmax, student))
    torch.manual_seed(0)
    images = torch.randn(case.batch, 3, case.size, case.size, device=device, dtype=dtype)
    ran = cast(nn.Module, torch.compile(student)) if case.compiled else student
    own = _step(ran, images, case.backward)
    steps = {"softmax": _step(softmax, images, case.backward), "own": own}
    timings = time_steps(steps, repeats, device)
    rest = counted_macs(_step(softmax, images[:1], False)) - attention_macs(softmax)
    return Row(
        case,
        timings["own"].median,
        timings["own"].low,
        timings["own"].high,
        timings["softmax"].median,
        peak_bytes(own, device),
        attention_macs(student),
        counted_macs(_step(student, images[:1], False)) - rest,
        load_average(),
    )


def attention_macs(model: nn.Module) -> int:
    """Multiply-adds of all attention operators for one image; projections are not among them."""
    softmax, own = layer_macs(model)
    return sum(own.values()) + (len(attention_blocks(model)) - len(own)) * softmax


def _step(model: nn.Module, images: torch.Tensor, backward: bool) -> Step:
    if not backward:

        def forward() -> None:
            with torch.no_grad():
                model(images)

        return forward

    def learn() -> None:
        model(images).float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    return learn
