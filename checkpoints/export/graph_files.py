"""Write the file of an exported graph, ONNX or torch's own, and run it as its users would."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ...models.errors import CheckpointError, UnsupportedModelError, did_you_mean
from .graph import explained, quiet

Format = Literal["onnx", "torch"]
SUFFIXES: dict[str, Format] = {".onnx": "onnx", ".pt2": "torch"}
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
OLDEST_OPSET = 18
"""The first opset that resamples as torch does, with antialiasing."""
ONE_FILE_BYTES = 2**31 - 2**27
"""Above this size the weights are beside the .onnx file: protobuf ends at 2 GiB."""
METADATA_FILE = "graftvit.json"
Run = Callable[[Tensor], Tensor]


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
            f"exporting to ONNX needs {' and '.join(missing)}, not installed: pip install 'graftvit[export]'"
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
            graph, (example,), dynamo=True, input_names=["images"], output_names=[metadata["output"]],
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
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def run_torch(path: Path) -> Run:
    """Return the function in a file of torch.export."""
    with quiet():
        module = torch.export.load(path).module()
    return lambda images: module(images)


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
