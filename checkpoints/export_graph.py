"""Turn a model into a graph of `torch.export`, and tell torch which sizes stay free."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from timm.layers import RotaryEmbeddingDinoV3
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..models.conversion import converted_layers
from ..models.copied import copying_of
from ..models.errors import (
    CheckpointError,
    RunFailedError,
    UnsupportedModelError,
    did_you_mean,
    install_command,
)
from ..models.families import has_relative_bias
from .architecture import one_line

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
        return self.model((images - self.mean) / self.std)


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
    raise UnsupportedModelError(
        f"dynamic resolution: the graph of {name} holds for images of one size; {way_out}"
    )


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
        graph = torch.export.export(model, (example,), dynamic_shapes=(sizes,), strict=False)
    for module in graph.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine, which would be in the file
    return graph


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
    rotary = (each for each in model.modules() if isinstance(each, RotaryEmbeddingDinoV3))
    ropes = [each for each in rotary if each.normalize_coords == "separate"]
    for rope in ropes:
        vars(rope)["get_embed"] = _free_rope(rope)  # hides the method of the class
    try:
        yield
    finally:
        for rope in ropes:
            del vars(rope)["get_embed"]


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


# Write the file of an exported graph, ONNX or torch's own, and run it as its users would.

Format = Literal["onnx", "torch"]
SUFFIXES: dict[str, Format] = {".onnx": "onnx", ".pt2": "torch"}
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
OLDEST_OPSET = 18
"""The first opset that resamples as torch does, with antialiasing."""
ONE_FILE_BYTES = 2**31 - 2**27
"""Above this size the weights are beside the .onnx file: protobuf ends at 2 GiB."""
METADATA_FILE = "graftvit.json"
Run = Callable[[Tensor], Any]


def format_of(path: Path, wanted: str | None) -> Format:
    """Return the format of the suffix of `path`. Raises CheckpointError: it has none, or not the requested one."""
    if wanted is not None and wanted not in get_args(Format):
        raise CheckpointError(f"format={wanted!r} is unknown; {did_you_mean(str(wanted), get_args(Format))}")
    found = SUFFIXES.get(path.suffix)
    if found is None:
        raise CheckpointError(f"{path} must end in .onnx (ONNX) or .pt2 (torch.export)")
    if wanted is not None and wanted != found:
        suffixes = [suffix for suffix, kind in SUFFIXES.items() if kind == wanted]
        raise CheckpointError(f"{path} contradicts format {wanted!r}, whose files end in {suffixes[0]}")
    return found


def check_onnx(opset: int | None) -> None:
    """Raise CheckpointError: a package is missing, or there is no such opset."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(
            f"exporting to ONNX needs {' and '.join(missing)}, not installed: {install_command('export')}"
        )
    onnx: Any = importlib.import_module("onnx")
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not OLDEST_OPSET <= opset <= newest:
        raise CheckpointError(f"opset {opset} cannot be written; valid are {OLDEST_OPSET} to {newest}")


def data_file(path: Path) -> Path:
    """Return the file of the weights of the ONNX file `path`, if they are not in it."""
    return path.with_name(f"{path.name}.data")


def write_onnx(
    graph: ExportedProgram, path: Path, example: Tensor, metadata: Mapping[str, str], opset: int | None
) -> int:
    """Write the graph to `path` (large weights beside it, at `data_file`) and return its opset.

    Raises UnsupportedModelError: torch has no ONNX for one of its operators, or none of this opset.
    """
    with explained("to ONNX: the model"):
        program: Any = torch.onnx.export(
            graph, (example,), dynamo=True, input_names=["images"], output_names=metadata["output"].split(","),
            opset_version=opset, verbose=False,
        )  # fmt: skip
        _name_sizes(program.model.graph)
        program.model.metadata_props.update(metadata)
        program.save(str(path), external_data=_weight_bytes(graph) > ONE_FILE_BYTES)
    written = int(program.model.opset_imports[""])
    if opset not in (None, written):
        raise UnsupportedModelError(
            f"opset {opset} cannot be written for this model by this torch; {written} can"
        )
    return written


def write_torch(graph: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    """Write the graph to `path`, the metadata as a JSON file in it."""
    text = json.dumps(dict(metadata), indent=2)
    with explained("to torch.export: the model"):
        torch.export.save(graph, path, extra_files={METADATA_FILE: text})


def run_onnx(path: Path) -> Run:
    """Return the function in an ONNX file, run by onnxruntime on the CPU."""
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Any:
        found = [torch.from_numpy(each) for each in session.run(None, {"images": images.numpy()})]
        return found[0] if len(found) == 1 else found

    return run


def run_torch(path: Path) -> Run:
    """Return the function in a file of torch.export."""
    with quiet():
        module = torch.export.load(path).module()
    return lambda images: module(images)


def outputs_of(output: Any) -> list[Tensor]:
    """Return what a model gave as a list: one tensor, or the maps of several strides."""
    return list(output) if isinstance(output, tuple | list) else [output]


def _weight_bytes(graph: ExportedProgram) -> int:
    tensors = [*graph.state_dict.values(), *graph.constants.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))


def _name_sizes(graph: Any) -> None:
    """Give free sizes names that explain them, because torch calls them s0 or s77."""
    [images] = graph.inputs
    names: dict[str, str] = {}
    for size, name in zip(images.shape, ("batch", "", "grid_height", "grid_width"), strict=True):
        names |= dict.fromkeys(re.findall(r"[A-Za-z_]\w*", _symbol(size)), name)
    values = [images, *(value for node in graph for value in node.outputs)]
    for value in values if names else ():
        for axis, size in enumerate(value.shape or ()):
            if _symbol(size):
                value.shape[axis] = re.sub(
                    r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), _symbol(size)
                )
    if _symbol(images.shape[0]):
        images.shape[0] = "batch"


def _symbol(size: Any) -> str:
    """Return the expression of a free size, empty for a number."""
    return "" if isinstance(size, int) else str(getattr(size, "value", None) or "")


# Check that an exported file computes what the model computes, for several shapes.

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
            references = outputs_of(model(images))
        if not all(each.isfinite().all() for each in references):
            raise ExportFailedError(
                f"{path.name} is not written: the model itself gives numbers that are not finite"
            )
        with _explained(label), torch.no_grad(), quiet():
            outputs = outputs_of(run(images))
        worst = max(worst, *map(relative_error, outputs, references))
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
