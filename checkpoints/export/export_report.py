"""Write the metadata of an exported file, and report the export."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from torch import nn

from ...models.conversion import plan_of
from ...models.copied import copying_of
from ..formats.described import as_metadata
from ..pretrained import Pretrained
from ..public import public_text
from ..weights import Weights
from .check import Shape
from .graph import Dynamic
from .graph_files import Format


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
    """Return the source of a model and the cropping of its images, for its file; without a path of this machine.

    The description that reads an ONNX file back is among them.
    """
    images = teacher.preprocessing
    arguments, described = teacher.model_args, {**images.described(), "license": teacher.license}
    built = Weights({}, "", "", teacher.architecture, arguments, described)
    facts = {
        "crop_pct": f"{images.crop_pct:g}",
        "crop_mode": images.crop_mode,
        "interpolation": images.interpolation,
        "architecture": teacher.architecture,
        "source": public_text(teacher.source, "source"),
        "revision": teacher.revision,
        "licence": teacher.license or "unknown",
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
        "normalise": "in the file" if normalize else "before",
        "output": "logits" if classes else "features",
        **({"classes": str(classes)} if classes else {}),
        **({} if plan is None else {"plan": plan}),
        **({} if copying is None else {"copies": f"{copying.method} of {copying.teacher.architecture}"}),
    }


def _numbers(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def channels_of(model: nn.Module) -> int:
    return int(getattr(model, "in_chans", 3))
