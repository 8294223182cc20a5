"""Check that an exported file computes what the model computes, for several shapes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from ...models.errors import CheckpointError, RunFailedError
from ..timm_models import one_line
from .graph import quiet
from .graph_files import Format, run_onnx, run_torch

BATCHES = (1, 2, 3)
Shape = tuple[int, int, int, int]
"""Batch, channels, height, width."""


class ExportFailedError(CheckpointError, RunFailedError):
    """An exported file that does not compute what the model computes; exit code 1."""


def shapes_to_check(
    channels: int, size: tuple[int, int], patch: tuple[int, int], dynamic: Collection[str]
) -> list[Shape]:
    """Return the shapes to compare; the last one, for tracing, differs from the model's resolution if that is free.

    A free resolution is checked on the model's own grid, on one with fewer rows, and on a larger one.
    """
    sizes = [size]
    if "resolution" in dynamic:
        rows, columns = size[0] // patch[0], size[1] // patch[1]
        grids = [(max(rows // 2, 2), columns + 1), (rows + 1, columns + 2)]
        sizes += [(height * patch[0], width * patch[1]) for height, width in grids]
    batches = BATCHES if "batch" in dynamic else (1,)
    return [(batch, channels, *pixels) for pixels, batch in product(sizes, batches)]


def example_images(shape: Sequence[int]) -> Tensor:
    """Return pixels in 0..1, the same ones for the same shape."""
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(sum(shape)))


def compare(model: nn.Module, path: Path, kind: Format, shapes: Sequence[Shape], tolerance: float) -> float:
    """Return the largest relative error of the file against the model, over all images of all `shapes`.

    Raises ExportFailedError: it is above `tolerance`, the model gives numbers that are not finite, or the file
    does not run.
    """
    label = f"{path.name} is not written: {'onnxruntime' if kind == 'onnx' else 'torch'}"
    with _explained(label):
        run = run_onnx(path) if kind == "onnx" else run_torch(path)
    worst = 0.0
    for shape in shapes:
        images = example_images(shape)
        with torch.no_grad():
            reference = model(images)
        if not reference.isfinite().all():
            raise ExportFailedError(
                f"{path.name} is not written: the model itself gives numbers that are not finite"
            )
        with _explained(label), torch.no_grad(), quiet():
            output = run(images)
        worst = max(worst, relative_error(output, reference))
    if not worst <= tolerance:
        raise ExportFailedError(
            f"{label} computes with it something else than the model: the relative error is {worst:.1e}, more than "
            f"{tolerance:g}"
        )
    return worst


def relative_error(output: Tensor, reference: Tensor) -> float:
    """Return the largest ‖output − reference‖ / ‖reference‖ of an image; infinite if it is not a number."""
    if output.shape != reference.shape or not output.isfinite().all():
        return float("inf")
    difference = (output - reference).double().flatten(1).norm(dim=1)
    return float((difference / reference.double().flatten(1).norm(dim=1).clamp_min(1e-12)).max())


@contextmanager
def _explained(label: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # what onnxruntime raises has no common kind
        raise ExportFailedError(f"{label} cannot run it: {one_line(error)}") from error
