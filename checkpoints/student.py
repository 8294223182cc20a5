"""Writing a student as a plain timm folder, which timm loads without this package."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from timm.models import split_model_name_tag
from torch import Tensor, nn

from ..models.errors import CheckpointError
from .atomic import write_folder
from .build import build, published_config
from .report import some

KEPT = ("classifier", "first_conv", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "pool_size")
"""Fields of timm's description that are the architecture's and not of some published weights."""


def save_student(
    model: nn.Module,
    folder: Path,
    *,
    architecture: str,
    model_args: Mapping[str, Any],
    mean: Sequence[float],
    std: Sequence[float],
    licence: str | None = None,
) -> None:
    """Writes `model.safetensors` and `config.json` to `folder`, whole or not at all.

    `timm.create_model('local-dir:FOLDER', pretrained=True)` then gives the same weights, bit for bit. An
    older folder at the same place is replaced.

    Args:
        architecture: timm name; a tag is dropped, for the weights are no longer those that it names.
        model_args: what timm's constructor needs besides the name to build this model; JSON.
        mean, std: normalisation of the input, one number a channel.

    Raises CheckpointError: these arguments do not build a model with these weights, or one is not JSON;
    with exit code 1 if the disk is full, and the old folder is then intact.
    """
    name = split_model_name_tag(architecture)[0]
    arguments = _plain({key: value for key, value in model_args.items() if value is not None})
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    _check(name, arguments, tensors)
    config = _config(model, name, arguments, mean, std, licence)

    def write(temporary: Path) -> None:
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_folder(folder, write, size=size)


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    for key, value in arguments.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"model_args.{key}={value!r} cannot be written to config.json: give its name"
            ) from error
    return arguments


def _check(architecture: str, arguments: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """CheckpointError where timm would build another model than the one whose weights these are."""
    wanted = {
        key: tensor.shape for key, tensor in build(architecture, arguments, on_meta=True).state_dict().items()
    }
    found = {key: tensor.shape for key, tensor in tensors.items()}
    if wanted != found:
        names = [key for key in sorted(wanted.keys() | found.keys()) if wanted.get(key) != found.get(key)]
        raise CheckpointError(
            f"{architecture} built with {dict(arguments)} has other weights than the student: {some(names)}"
        )


def _config(
    model: Any, architecture: str, arguments: Mapping[str, Any], mean: Sequence[float], std: Sequence[float],
    licence: str | None,
) -> dict[str, Any]:  # fmt: skip
    described = {**published_config(architecture), **(getattr(model, "default_cfg", None) or {})}
    channels, height, width = _input_size(model, arguments, described)
    pretrained = {key: described[key] for key in KEPT if key in described}
    pretrained |= {
        "input_size": [channels, height, width],
        "mean": list(mean),
        "std": list(std),
        "num_classes": model.num_classes,
        "custom_load": False,
    }
    if licence is not None:
        pretrained["license"] = licence
    return {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": getattr(model, "global_pool", None),
        "model_args": dict(arguments),
        "pretrained_cfg": pretrained,
    }


def _input_size(
    model: Any, arguments: Mapping[str, Any], described: Mapping[str, Any]
) -> tuple[int, int, int]:
    channels, height, width = described.get("input_size", (3, 224, 224))
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = size if size is not None else (height, width)
    return int(arguments.get("in_chans", channels)), int(height), int(width)
