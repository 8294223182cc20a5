"""Turn a model into a graph of `torch.export`, and tell torch which sizes stay free."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from unittest import mock

import torch
from timm.layers import RotaryEmbeddingDinoV3
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ...models.conversion import converted_layers
from ...models.copied import copying_of
from ...models.errors import UnsupportedModelError
from ...models.families import has_relative_bias
from ..timm_models import one_line

Dynamic = Literal["batch", "resolution"]


class Normalized(nn.Module):
    """A model that takes images in 0..1 and normalizes them for the model inside."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return the model's output for `images` (B, 3, H, W) of values 0..1."""
        output: Tensor = self.model((images - self.mean) / self.std)
        return output


def check_dynamic(model: nn.Module, dynamic: Collection[str]) -> None:
    """Raise UnsupportedModelError where the model has no place for another resolution than its own."""
    if "resolution" not in dynamic:
        return
    name, way_out = type(model).__name__, "export it at a fixed size (img_size) with dynamic batch alone"
    if copying_of(model) is not None:
        raise UnsupportedModelError(
            f"dynamic resolution: this {name} runs with a part of its teacher, whose grid is fixed; {way_out}"
        )
    for index, layer in converted_layers(model).items():
        if not layer.operator.traits.graph_any_grid:
            raise UnsupportedModelError(
                f"dynamic resolution: the graph of {layer.choice.operator!r} in layer {index} holds for one grid "
                f"alone; {way_out}"
            )
    if getattr(model, "dynamic_img_size", False):
        return
    if has_relative_bias(model):
        raise UnsupportedModelError(
            f"dynamic resolution: {name} has a relative position bias, a table for one grid alone; {way_out}"
        )
    if hasattr(model, "dynamic_img_size"):
        raise UnsupportedModelError(
            f"dynamic resolution: this {name} was built for one size; build it with dynamic_img_size=True, "
            f"or {way_out}"
        )
    raise UnsupportedModelError(f"dynamic resolution: {name} takes images of one size; {way_out}")


def trace(
    model: nn.Module, example: Tensor, dynamic: Collection[str], patch_size: tuple[int, int]
) -> ExportedProgram:
    """Return the graph of `model` for images like `example` (B, 3, H, W), with the sizes of `dynamic` left free.

    `example` must not be of the model's own resolution where that is left free: torch would take it for given.

    Raises UnsupportedModelError in torch's words where it cannot.
    """
    sizes: dict[int, Any] = {}
    if "batch" in dynamic:
        sizes[0] = Dim("batch")
    if "resolution" in dynamic:
        for axis, (name, patch) in enumerate(zip(("height", "width"), patch_size, strict=True), start=2):
            sizes[axis] = patch * Dim(f"grid_{name}")
    with (
        explained(f"{_name(model)} with dynamic {' and '.join(dynamic) or 'nothing'}"),
        _traceable(model),
    ):
        return torch.export.export(model, (example,), dynamic_shapes=(sizes,), strict=False)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Quiet, without gradients; what torch raises becomes one sentence of an UnsupportedModelError."""
    try:
        with quiet(), torch.no_grad():
            yield
    except OSError:  # a full disk is not the model's fault
        raise
    except Exception as error:  # the exporters' errors have no common kind
        raise UnsupportedModelError(f"{what} cannot be exported; torch says: {one_line(error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing on stdout, on stderr or in the log below an error: the exporters tell each of their steps."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _traceable(model: nn.Module) -> Iterator[None]:
    """Trace without branches on the size of the example, which would hold for every image."""
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, RotaryEmbeddingDinoV3) and module.normalize_coords == "separate":
                stack.enter_context(mock.patch.object(module, "get_embed", _free_rope(module)))
        yield


def _free_rope(rope: RotaryEmbeddingDinoV3) -> Callable[..., Tensor]:
    """`rope.get_embed` for a grid whose size is free: timm turns the size into a Python float, a constant."""
    periods: Any = rope.periods
    cached = rope.get_embed

    def get_embed(shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        if shape is None:
            return cached(dtype=dtype)
        sizes = shape[::-1] if rope.grid_indexing == "xy" else shape
        axes = [
            (torch.arange(size, device=periods.device) + (0.5 + rope.grid_offset)) / size for size in sizes
        ]
        grid = torch.stack(torch.meshgrid(axes, indexing=rope.grid_indexing), dim=-1)
        sin_cos = torch.cat(rope._get_pos_embed_from_coords(2.0 * grid.flatten(0, -2) - 1.0), dim=-1)
        return sin_cos if dtype is None else sin_cos.to(dtype)

    return get_embed


def _name(model: nn.Module) -> str:
    return type(model.model if isinstance(model, Normalized) else model).__name__
