"""One pass of a frozen teacher in a step, or its results from an earlier one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...models.copying.tape import Tape
from .loss_terms import TeacherSide


def fill_tape(
    side: TeacherSide,
    view: nn.Module,
    tape: Tape,
    images: Tensor,
    taught: Mapping[str, Tensor] | None,
    *,
    convert: bool,
) -> None:
    """Put on the tape what a teacher gives for the student's images: it runs, unless it was `taught` before.

    `convert`: give results of half precision the type of the student's.
    """
    if taught is None:
        _run(side, view, images)
    else:
        _recall(side, tape, taught)
    if convert:
        _convert(side, tape, images)


def _run(side: TeacherSide, view: nn.Module, images: Tensor) -> None:
    """Run a teacher on the student's images. A teacher of half precision computes in it, whatever autocast says."""
    if side.model.training:
        side.model.eval()
    with torch.no_grad():
        if side.input.dtype is None:
            view(side.input(images))
            return
        with torch.autocast(images.device.type, enabled=False):
            view(side.input(images))


def _recall(side: TeacherSide, tape: Tape, taught: Mapping[str, Tensor]) -> None:
    """Put on the tape what the teacher said of these images before."""
    prefix = f"{side.name}."
    for name, result in taught.items():
        if name.startswith(prefix):
            tape.whole[name.removeprefix(prefix)] = result


def collect(tapes: Mapping[str, Tape]) -> dict[str, Tensor]:
    """Return the results of whole teachers that are on their tapes, for `fill_tape`."""
    return {f"{name}.{result}": found for name, tape in tapes.items() for result, found in tape.whole.items()}


def _convert(side: TeacherSide, tape: Tape, images: Tensor) -> None:
    """Give the results of a teacher of half precision the type of the student's."""
    if side.input.dtype is not None:
        device = images.device.type
        tape.convert(torch.get_autocast_dtype(device) if _autocast(images) else images.dtype)


def _autocast(images: Tensor) -> bool:
    return torch.is_autocast_enabled(images.device.type)
