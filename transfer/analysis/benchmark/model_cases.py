"""A whole model converted by a plan, timed in turn with the model as it is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from ....checkpoints.architecture import build, check_name
from ....checkpoints.pretrained import load_pretrained
from ....checkpoints.sources import TimmSource, parse_source
from ....models.calibration import fit_at_random
from ....models.conversion import convert, converted_layers, layer_macs, resize
from ....models.cost import attention_macs as pyramid_attention
from ....models.cost import other_macs
from ....models.errors import ConfigError
from ....models.families import attention_blocks, is_pyramid, patch_size
from .cases import DTYPES, Case, Row, Ways
from .measuring import compiled, measure_case
from .timing import Step, counted_macs, step_of


def model_cases(sources: Sequence[str], plans: Sequence[str], sizes: Sequence[int], ways: Ways) -> list[Case]:
    """Return every combination, small images first.

    Raises GraftError: a source is not there, an image size does not fit it, or a plan is not valid.
    """
    for source in sources:
        model = load_model(source, min(sizes))
        for plan in plans:
            convert(model, plan, without=ways.without)
        for size in sizes:
            load_model(source, size)
    return ways.cases("models", plans, sources, sizes)


def load_model(source: str, img_size: int) -> nn.Module:
    """Return the model of a source for images of `img_size` pixels.

    A timm name is built with random weights, which are as fast as any: nothing is downloaded for it.

    Raises CheckpointError: there is no such source, or it takes no such images.
    """
    found = parse_source(source)
    if isinstance(found, TimmSource):
        check_name(found.name)
        model = build(found.name.partition(".")[0], {"img_size": img_size}).eval()
    else:
        model = load_pretrained(source, img_size=img_size).model
    if is_pyramid(model):  # one that takes images of any size does not know this one
        resize(model, img_size)
    _check_size(model, img_size)
    return model


def _check_size(model: nn.Module, img_size: int) -> None:
    """Raise ConfigError where patches do not fill the image: timm ignores the rest silently."""
    patch = patch_size(model)
    if img_size % patch[0]:
        nearest = patch[0] * max(1, round(img_size / patch[0]))
        raise ConfigError(
            f"--img_size {img_size}: patches of {patch[0]} pixels do not fill it; take {nearest}"
        )


def measure_model(case: Case, repeats: int) -> Row:
    """Measure times, memory and multiply-adds of one case."""
    device, dtype = torch.device(case.device), DTYPES[case.dtype]
    softmax = load_model(case.source, case.size)
    student = convert(softmax, case.name, without=case.without)
    fit_at_random(converted_layers(student))
    softmax, student = (model.to(device, dtype).requires_grad_(case.backward) for model in (softmax, student))
    torch.manual_seed(0)
    images = torch.randn(case.batch, 3, case.size, case.size, device=device, dtype=dtype)
    compared = (softmax, compiled(student, case))
    steps = [
        _learning(model, images) if case.backward else step_of(partial(model, images)) for model in compared
    ]
    counted, whole = (counted_macs(step_of(partial(model, images[:1]))) for model in (student, softmax))
    return measure_case(
        case,
        steps,
        repeats,
        macs=attention_macs(student),
        counted=counted - macs_beside(student, softmax, whole),
    )


def attention_macs(model: nn.Module) -> int:
    """Return the multiply-adds of all attention operators for one image, without projections."""
    if is_pyramid(model):
        return sum(pyramid_attention(model))
    softmax, own = layer_macs(model)
    return sum(own.values()) + (len(attention_blocks(model)) - len(own)) * softmax


def macs_beside(student: nn.Module, unconverted: nn.Module, whole: int) -> int:
    """Return the multiply-adds for one image of all but the attention operators of a converted model.

    `whole` is what torch's counter gives for the unconverted model, which has as much beside its attention; but a
    conversion drops parts of a pyramid.
    """
    return other_macs(student) if is_pyramid(student) else whole - attention_macs(unconverted)


def _learning(model: nn.Module, images: torch.Tensor) -> Step:
    return step_of(lambda: model(images).float().square().mean(), list(model.parameters()))
