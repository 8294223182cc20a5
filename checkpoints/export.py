"""Export a model to ONNX or torch.export: compare the graph with the model before the file is put in place."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..models import families
from ..models.conversion import copy_model, plan_of, sharing_copy
from ..models.copied import copying_of
from ..models.errors import CheckpointError, JsonDict, check_types, did_you_mean
from ..models.given import Model
from ..models.hosting import host_attention
from .architecture import build
from .atomic import sync, write_file
from .class_names import KEY as LABEL_NAMES
from .export_graph import (
    Dynamic,
    Format,
    Normalized,
    Shape,
    check_dynamic,
    check_onnx,
    compare,
    data_file,
    example_images,
    format_of,
    shapes_to_check,
    trace,
    write_onnx,
    write_torch,
)
from .files import place
from .formats.containers import as_metadata
from .licenses import public_text
from .pretrained import LoadSettings, describe, describe_model
from .provenance import Pretrained
from .student import check_described, check_values
from .weight_files import Weights, as_pair

if TYPE_CHECKING:
    from ..models.dense.dense_model import DenseModel

# Write the metadata of an exported file, and report the export.


@dataclass(frozen=True)
class ExportReport:
    """What was exported, and how far it is from the model."""

    path: Path
    files: tuple[Path, ...]
    """`path`, and the file of its weights where an ONNX model is too large for one file."""
    format: Format
    opset: int | None
    """The opset of ONNX."""
    output: str
    """"logits", or "features" of a model without a head."""
    dynamic: tuple[Dynamic, ...]
    checked: tuple[Shape, ...]
    """Shapes of the images on which file and model were compared."""
    error: float
    """Largest ‖file − model‖ / ‖model‖ of an image's output."""
    metadata: Mapping[str, str]

    def lines(self) -> list[str]:
        """Return the report as text."""
        kind = "torch.export" if self.format == "torch" else f"ONNX, opset {self.opset}"
        sizes = ", ".join(f"{file.name} ({file.stat().st_size / 1e6:.1f} MB)" for file in self.files)
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.checked)
        return [
            f"wrote    {self.path.parent}{os.sep}{sizes}",
            f"format   {kind}; dynamic: {', '.join(self.dynamic) or 'nothing'}",
            f"input    images: {self.metadata['input']}",
            f"output   {self.output}",
            f"checked  {shapes}: largest relative error {self.error:.1e}",
        ]


def provenance_words(teacher: Pretrained) -> dict[str, str]:
    """Return the source of a model, its classes and the cropping of its images, for its file; without a path of this
    machine.

    The description that reads an ONNX file back is among them.
    """
    images = teacher.preprocessing
    names = {} if teacher.label_names is None else {LABEL_NAMES: list(teacher.label_names)}
    arguments = teacher.model_args
    described = {**images.described(), "license": teacher.license, **names}
    built = Weights({}, "", "", teacher.architecture, arguments, described)
    facts = {
        "crop_pct": f"{images.crop_pct:g}",
        "crop_mode": images.crop_mode,
        "interpolation": images.interpolation,
        "architecture": teacher.architecture,
        "source": public_text(teacher.source, "source"),
        "revision": teacher.revision,
        "license": teacher.license or "unknown",
        **{key: json.dumps(value, ensure_ascii=False) for key, value in names.items()},
        **as_metadata(built),
    }
    return {key: value for key, value in facts.items() if value is not None}


def words_of(
    model: nn.Module, size: tuple[int, int], patch: tuple[int, int], dynamic: Collection[str],
    mean: Sequence[float] | None, std: Sequence[float] | None, normalize: bool,
) -> dict[str, str]:  # fmt: skip
    """Return the metadata of the file."""
    channels = channels_of(model)
    pixels = f"{size[0]} x {size[1]}"
    if "resolution" in dynamic:
        pixels += f" or any multiple of {patch[0]} x {patch[1]}"
    values = "values 0..1" if normalize else "normalized"
    plan, classes = plan_of(model), int(getattr(model, "num_classes", 0))
    copying = copying_of(model)
    if mean is not None and std is not None and not normalize:
        values = f"normalized, mean {_numbers(mean)} and std {_numbers(std)}"
    return {
        "graftvit": version("graftvit"),
        "input": f"{'RGB' if channels == 3 else f'{channels} channels'}, {pixels}, {values}",
        "input_size": f"{channels},{size[0]},{size[1]}",
        **({} if mean is None else {"mean": _numbers(mean)}),
        **({} if std is None else {"std": _numbers(std)}),
        "normalize": "in the file" if normalize else "before",
        "output": "logits" if classes else "features",
        **({"classes": str(classes)} if classes else {}),
        **({} if plan is None else {"plan": plan, **_described(model, mean, std)}),
        **({} if copying is None else {"copies": f"{copying.method} of {copying.teacher.architecture}"}),
    }


def _described(model: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None) -> dict[str, str]:
    """Return the description that reads a converted model back; nothing of one that timm cannot build again."""
    images = {} if mean is None or std is None else {"mean": tuple(mean), "std": tuple(std)}
    try:
        known = describe_model(model, **images)
        shown = known.preprocessing.described()
        return as_metadata(Weights({}, "", "", known.architecture, known.model_args, shown))
    except (CheckpointError, TypeError):
        return {}


def _numbers(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def channels_of(model: nn.Module) -> int:
    return int(getattr(model, "in_chans", 3))


logger = logging.getLogger(__name__)
TOLERANCE = 1e-4
DYNAMIC: tuple[Dynamic, ...] = ("batch",)


@check_types()
def export(
    model: Model | Pretrained,
    /,
    path: str | PathLike[str],
    *,
    format: Format | None = None,  # noqa: A002  its name on the command line
    dynamic: Collection[Dynamic] = DYNAMIC,
    opset: int | None = None,
    normalize: bool = False,
    tolerance: float = TOLERANCE,
    overwrite: bool = False,
    **how: Unpack[LoadSettings],
) -> ExportReport:
    """Export a model, or that of any source, as `export_model`; the file says how to feed it and where it comes from.

    Of a detector or segmenter, backbone and neck: its outputs are the maps `stride_8`, `stride_16` and so on.

    Args:
        model: as of `graftvit.save`.
        path: of the file, .onnx or .pt2.
        format: "onnx" or "torch"; by default what the suffix of `path` says.
        dynamic: sizes left free, of "batch" and "resolution" (in whole patches); the others are fixed, the batch at 1.
        opset: of ONNX; torch's choice by default.
        normalize: take images in 0..1, and normalize them in the graph.
        tolerance: largest relative error of the file against the model, above 0.
        overwrite: replace a file that is there.
        how: of a source: `img_size`, `model_args` and the rest, as of `load_pretrained`.

    Returns:
        What was exported, and how far it is from the model.

    Raises:
        CheckpointError: as `load_pretrained`; the path, the format or the opset is not valid, or a package is missing;
            with exit code 1 where file and model differ by more than `tolerance`, or the disk is full.
        UnsupportedModelError: the model, or a part of it, cannot be exported so.
    """
    path = place(path)
    check_export(path, format, dynamic, opset, tolerance, overwrite)
    from .dense_models import dense_of  # here: a classifier needs no detector

    dense = dense_of(model)
    if dense is not None:
        return _export_dense(dense, Path(path), format, dynamic, opset, normalize, tolerance, overwrite, how)
    teacher = describe(model, **how)
    check_described(teacher)
    module = teacher.model
    if "resolution" in dynamic and getattr(module, "dynamic_img_size", None) is False:
        module = _of_any_size(teacher)
    return export_model(
        module,
        path,
        format=format,
        image_size=None if families.image_size(module) else teacher.preprocessing.input_size[1:],
        dynamic=dynamic,
        opset=opset,
        mean=teacher.mean,
        std=teacher.std,
        normalize=normalize,
        metadata=provenance_words(teacher),
        tolerance=tolerance,
        overwrite=overwrite,
    )


@check_types()
def export_model(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    format: Format | None = None,  # noqa: A002  as of export
    image_size: int | tuple[int, int] | None = None,
    dynamic: Collection[Dynamic] = DYNAMIC,
    opset: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    normalize: bool = False,
    metadata: Mapping[str, str] | None = None,
    tolerance: float = TOLERANCE,
    overwrite: bool = False,
) -> ExportReport:
    """Write `model` in float32 as a function of `images` (B, 3, H, W), and its weights, to one file.

    Put the file at `path` only after it was loaded again and gave the output of the model for several shapes.

    Args:
        format: "onnx" or "torch"; by default what the suffix of `path` says, .onnx or .pt2.
        image_size: of a model whose patch embedding does not say it.
        dynamic: sizes left free, of "batch" and "resolution" (in whole patches, of a model built with
            `dynamic_img_size=True`); the others are fixed, the batch at 1.
        opset: of ONNX; torch's choice by default.
        mean, std: normalization of the images that the model was trained on, written to the file.
        normalize: take images in 0..1, and normalize them in the graph.
        metadata: more words for the file.

    Raises:
        UnsupportedModelError: the model, or a part of it, cannot be exported so.
        CheckpointError: the path, the format or the opset is not valid, or a package is missing; with exit code
            1 where file and model differ by more than `tolerance`, or the disk is full.
    """
    path = place(path)
    kind = check_export(path, format, dynamic, opset, tolerance, overwrite)
    check_values(model)
    if normalize and (mean is None or std is None):
        raise CheckpointError("normalize needs the mean and std of the images that the model was trained on")
    check_dynamic(model, dynamic)
    size, patch = _sizes(model, image_size, dynamic)
    words = words_of(model, size, patch, dynamic, mean, std, normalize) | dict(metadata or {})
    shapes = shapes_to_check(channels_of(model), size, patch, dynamic)
    norm = (mean, std) if normalize and mean is not None and std is not None else None
    return _write_checked(model, path, kind, words, shapes, patch, dynamic, opset, norm, tolerance)


def _write_checked(
    model: nn.Module, path: Path, kind: Format, words: Mapping[str, str], shapes: Sequence[Shape],
    patch: tuple[int, int], dynamic: Collection[Dynamic], opset: int | None,
    norm: tuple[Sequence[float], Sequence[float]] | None, tolerance: float,
) -> ExportReport:  # fmt: skip
    """Write the graph of `model`, which normalizes by `norm` if it is given, after it was compared for the shapes."""
    example = example_images(shapes[-1])
    found: JsonDict = {}
    with _for_inference(model) as plain:
        module = plain if norm is None else Normalized(plain, *norm)
        logger.info("tracing %s", type(model).__name__)
        graph = trace(module, example, dynamic, patch)

        def write(temporary: Path) -> None:
            logger.info("writing %s", path.name)
            if kind == "onnx":
                found["opset"] = write_onnx(graph, temporary, example, words, opset)
            else:
                write_torch(graph, temporary, words)
            logger.info("checking %s against the model", path.name)
            found["error"] = compare(module, temporary, kind, shapes, tolerance)
            if kind == "onnx":
                _place_data(temporary, path)

        tensors = module.state_dict().values()
        write_file(path, write, size=sum(tensor.numel() * tensor.element_size() for tensor in tensors))
    files = (path, data_file(path)) if kind == "onnx" and data_file(path).exists() else (path,)
    free = tuple(name for name in get_args(Dynamic) if name in dynamic)
    return ExportReport(
        path, files, kind, found.get("opset"), words["output"], free, tuple(shapes), found["error"], words
    )


class DenseMaps(nn.Module):
    """Backbone and neck of a detector or segmenter: the levels that its head gets, the finest first."""

    def __init__(self, model: DenseModel) -> None:
        super().__init__()
        self.backbone, self.neck = model.backbone, model.neck
        levels: Any = getattr(model.neck, "levels", model.backbone)
        self.strides: list[int] = levels.strides

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the levels (B, width, H / stride, W / stride) of normalized images."""
        return tuple(self.neck(self.backbone(images)))


def _export_dense(
    model: DenseModel, path: Path, wanted: Format | None, dynamic: Collection[Dynamic], opset: int | None,
    normalize: bool, tolerance: float, overwrite: bool, how: LoadSettings,
) -> ExportReport:  # fmt: skip
    """Write backbone and neck as maps; what makes boxes, masks and labels of them stays in Python."""
    kind = check_export(path, wanted, dynamic, opset, tolerance, overwrite)
    other = next((name for name in ("model", "model_args", "num_classes", "revision") if how.get(name)), None)
    if other is not None or "resolution" in dynamic:
        name = other or "dynamic resolution"
        raise CheckpointError(
            f"{name} is of classifiers: a detector or segmenter is exported as it is, at img_size"
        )
    size, divisor = how.get("img_size"), model.size_divisor
    if size is None or any(side % divisor for side in as_pair(size)):
        raise CheckpointError(
            f"img_size={size}: give height and width of the padded images in multiples of {divisor}, as in 800,1344"
        )
    maps, (height, width) = DenseMaps(model), as_pair(size)
    words = {
        **words_of(model.backbone.body, (height, width), (1, 1), dynamic, model.mean, model.std, normalize),
        "output": ",".join(f"stride_{stride}" for stride in maps.strides),
        "strides": ",".join(map(str, maps.strides)),
        "head": model.kind,
        "classes": str(model.num_classes),
        LABEL_NAMES: json.dumps(list(model.class_names), ensure_ascii=False),
    }
    shapes = shapes_to_check(3, (height, width), (1, 1), dynamic)
    norm = (model.mean, model.std) if normalize else None
    return _write_checked(maps, path, kind, words, shapes, (1, 1), dynamic, opset, norm, tolerance)


def check_export(
    path: Path, wanted: str | None, dynamic: Collection[str], opset: int | None, tolerance: float, overwrite: bool
) -> Format:  # fmt: skip
    """Return the format; raise CheckpointError for errors that need no model to be loaded."""
    kind = format_of(path, wanted)
    for name in dynamic:
        if name not in get_args(Dynamic):
            raise CheckpointError(f"dynamic={name!r} is unknown; {did_you_mean(name, get_args(Dynamic))}")
    if not tolerance > 0:
        raise CheckpointError(f"tolerance={tolerance} must be above 0")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: name a file in it")
    for file in (path, data_file(path)) if kind == "onnx" else (path,):
        if file.exists() and not overwrite:
            raise CheckpointError(
                f"{file} is there already: give another name, or --force (in Python overwrite=True) to replace it"
            )
    if kind == "onnx":
        check_onnx(opset)
    elif opset is not None:
        raise CheckpointError(f"opset {opset} is of ONNX, and {path.name} is of torch.export: leave it out")
    return kind


def _of_any_size(teacher: Pretrained) -> nn.Module:
    """Return the teacher's model as timm builds it for images of any size, with the same weights."""
    model = build(teacher.architecture, {**teacher.model_args, "dynamic_img_size": True})
    model.load_state_dict(teacher.model.state_dict(), assign=True)
    return model.eval().requires_grad_(False)


def _sizes(
    model: nn.Module, image_size: int | tuple[int, int] | None, dynamic: Collection[str]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the image and patch resolution. Raises CheckpointError if the model takes another one."""
    own = families.image_size(model)
    patch = families.patch_size(model)
    size = as_pair(image_size) if image_size is not None else own
    if size is None:
        raise CheckpointError(f"{type(model).__name__} does not say its image size: give image_size")
    if own not in (None, size) and not getattr(model, "dynamic_img_size", False):
        raise CheckpointError(
            f"image_size {size[0]}x{size[1]}: this model takes {own[0]}x{own[1]}; load it with img_size={size}"
        )
    if any(length % step for length, step in zip(size, patch, strict=True)) and "resolution" in dynamic:
        raise CheckpointError(
            f"dynamic resolution: {size[0]}x{size[1]} is not whole patches of {patch[0]}x{patch[1]}"
        )
    return size, patch


def in_float32(model: nn.Module) -> nn.Module:
    """Return the model in float32 on the CPU; a copy if it is elsewhere."""
    tensors = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    if any(tensor.device.type != "cpu" or tensor.dtype != torch.float32 for tensor in tensors):
        return copy_model(model).to("cpu", torch.float32)
    return model


@contextmanager
def _for_inference(model: nn.Module) -> Iterator[nn.Module]:
    """Return the model in eval mode, in float32 on the CPU, with attention that can be traced."""
    model = in_float32(model)
    family = families.find_family(_body_of(model))
    if family is not None and family.exported_hosted:
        model = sharing_copy(model)
        host_attention(_body_of(model))
        for module in model.modules():  # a layer that is no site: ONNX has no fused attention within windows
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # type: ignore[assignment]
    with families.evaluating(model):
        yield model


def _body_of(model: nn.Module) -> nn.Module:
    return model.backbone.body if isinstance(model, DenseMaps) else model


def _place_data(temporary: Path, path: Path) -> None:
    """Put the weights beside an ONNX file in place; remove the old file first, because it would read the new ones."""
    if not data_file(temporary).exists() and not data_file(path).exists():
        return
    path.unlink(missing_ok=True)
    data_file(path).unlink(missing_ok=True)
    if data_file(temporary).exists():
        sync(data_file(temporary))
        data_file(temporary).replace(data_file(path))
