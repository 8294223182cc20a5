"""Write a classifier as a file of another runtime, with a script that runs it and uses nothing of this package."""

from __future__ import annotations

import importlib
import importlib.util
import json
import runpy
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from jinja2 import Environment, StrictUndefined
from torch import Tensor

from ..models.conversion import plan_of
from ..models.errors import CheckpointError, install_command
from .atomic import write_text
from .export import export
from .export_graph import Dynamic, check_onnx, data_file, explained
from .provenance import Pretrained

Target = Literal["onnx", "onnx-int8", "aoti", "executorch"]
FILES: dict[Target, str] = {
    "onnx": "model.onnx",
    "onnx-int8": "model.onnx",
    "aoti": "model.pt2",
    "executorch": "model.pte",
}
RUNTIMES = {"aoti": "torch", "executorch": "executorch"}
"""The package that runs a file; onnxruntime for the others."""
LOADER = "load.py"
PRODUCTS = ["MatMul", "Gemm", "Conv"]


def check_target(target: Target) -> None:
    """Raise CheckpointError: a package that writes and runs such files is missing, or a compiler."""
    if target == "aoti":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, RuntimeError) as error:
            raise CheckpointError(
                "--to aoti needs a C++ compiler, and none was found: install g++ or clang++, or name one by the "
                "variable CXX"
            ) from error
    elif target == "executorch":
        if importlib.util.find_spec("executorch") is None:
            raise CheckpointError(
                f"--to executorch needs the package executorch, not installed: {install_command('executorch')}"
            )
    else:
        check_onnx(None)


def write_target(known: Pretrained, folder: Path, target: Target, images: Callable[[], Tensor]) -> Path:
    """Write the file of `target` and its loader to `folder`; return the file.

    Args:
        known: the classifier; its preprocessing is written to the file.
        folder: exists.
        target: the kind of file.
        images: gives the images (N, C, H, W) that int8 is calibrated on.

    Raises:
        CheckpointError, UnsupportedModelError: as `export`, and where the runtime cannot take the graph.
    """
    path, plan = folder / FILES[target], plan_of(known.model)
    write_text(folder / LOADER, script_of(target))
    if target == "onnx":
        export(known, path)
        return path
    free: tuple[Dynamic, ...] = () if target == "executorch" else ("batch",)
    what = f"{known.architecture}{'' if plan is None else f' with {plan}'} as {target}"
    with TemporaryDirectory(dir=folder) as between:
        graph = Path(between) / ("model.onnx" if target == "onnx-int8" else "model.pt2")
        said = dict(export(known, graph, dynamic=free).metadata)
        with explained(what):
            if target == "onnx-int8":
                _quantize(graph, path, images())
            elif target == "aoti":
                _compile(graph, path, said)
            else:
                _lower(graph, path, said)
            empty = torch.zeros(1, *known.preprocessing.input_size)
            runpy.run_path(str(folder / LOADER))["Model"](path)(empty.numpy())
    return path


def script_of(target: Target) -> str:
    """Return the script that runs a file of `target`, in numpy, pillow and the package of its runtime alone."""
    text = resources.files(__package__).joinpath("standalone.txt").read_text(encoding="utf-8")
    words = {"target": target, "file": FILES[target], "package": RUNTIMES.get(target, "onnxruntime")}
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False
    )  # fmt: skip
    return environment.from_string(text).render(words)


class _Images:
    """Calibration images one by one, as onnxruntime asks for them."""

    def __init__(self, images: Tensor) -> None:
        self._rest: Iterator[Tensor] = iter(images.split(1))

    def get_next(self) -> dict[str, Any] | None:
        image = next(self._rest, None)
        return None if image is None else {"images": image.numpy()}


def _quantize(graph: Path, path: Path, images: Tensor) -> None:
    """Write products with weights as int8, weights by channel; what attention computes of activations stays float32."""
    onnx: Any = importlib.import_module("onnx")
    quantization: Any = importlib.import_module("onnxruntime.quantization")
    whole = onnx.load(graph, load_external_data=False).graph
    ranks = {each.name: len(each.dims) for each in whole.initializer}
    others = [
        node.name
        for node in whole.node
        if node.op_type in PRODUCTS and not _has_weight(node.op_type, ranks.get(node.input[1]))
    ]
    quantization.quantize_static(
        str(graph),
        str(path),
        _Images(images),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        op_types_to_quantize=PRODUCTS,
        nodes_to_exclude=others,
        use_external_data_format=data_file(graph).exists(),
        extra_options={"OpTypesToExcludeOutputQuantization": PRODUCTS},
    )


def _has_weight(product: str, rank: int | None) -> bool:
    """Return whether the second factor, of a rank if it is no activation, is a weight that int8 takes by channel.

    onnxruntime cannot run weights by head, which are of rank 3, with a scale for each channel.
    """
    return rank is not None and (product != "MatMul" or rank == 2)


def _compile(graph: Path, path: Path, said: dict[str, str]) -> None:
    """Compile the graph for the processor of this machine."""
    inductor: Any = importlib.import_module("torch._inductor")
    inductor.aoti_compile_and_package(
        torch.export.load(graph),
        package_path=str(path),
        inductor_configs={
            "aot_inductor.metadata": said,
            "aot_inductor.compile_wrapper_opt_level": "O0",  # it only calls kernels, and takes most of the time
        },
    )


def _lower(graph: Path, path: Path, said: dict[str, str]) -> None:
    """Lower the graph to ExecuTorch's XNNPACK, for images one by one."""
    exir: Any = importlib.import_module("executorch.exir")
    xnnpack: Any = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    program = exir.to_edge_transform_and_lower(
        torch.export.load(graph),
        partitioner=[xnnpack.XnnpackPartitioner()],
        constant_methods={"graftvit": json.dumps(said)},
    ).to_executorch()
    path.write_bytes(program.buffer)
