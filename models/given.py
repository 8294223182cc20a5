"""What a caller may give as a model, and the images for it: one sentence for anything else."""

from __future__ import annotations

from os import PathLike
from pkgutil import resolve_name
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from .errors import DataError, UnsupportedModelError
from .families import find_family, image_channels, refuse_compiled


@runtime_checkable
class HoldsModel(Protocol):
    """An object that a model can be taken from: what `load_pretrained` returns, a `DualViT`, the result of a run."""

    def to_model(self) -> nn.Module:
        """Return the model."""


Model: TypeAlias = nn.Module | HoldsModel | str | PathLike[str]
"""A model, an object that holds one, or a source of weights by name."""
LOADER = f"{__package__.partition('.')[0]}.checkpoints.pretrained:load"
"""What opens a source by name; by its own name, because checkpoints stand on models."""


def as_model(thing: object, role: str = "model") -> nn.Module:
    """Return the model that `thing` is, holds or names.

    Args:
        thing: a model, what `load_pretrained` returns, a `DualViT`, which gives a copy of its student as `release`
            would, the result of a run, or a source by name, which is loaded as by `graftvit.load`.
        role: begins the sentence of an error.

    Raises:
        UnsupportedModelError: it is something else, or was compiled by torch.compile.
        CheckpointError: as `load`.
    """
    if isinstance(thing, HoldsModel) and not isinstance(thing, type):
        return thing.to_model()
    if isinstance(thing, str | PathLike):
        model: nn.Module = resolve_name(LOADER)(thing)
        return model
    if not isinstance(thing, nn.Module):
        kind = f"the class {thing.__name__}" if isinstance(thing, type) else f"of type {type(thing).__name__}"
        wrapped = ", or a function as an OutsideTeacher" if callable(thing) else ""
        raise UnsupportedModelError(
            f"{role} is {kind} and no model: give an nn.Module, what graftvit.load_pretrained returns, a DualViT, or a "
            f"source of weights by name{wrapped}"
        )
    refuse_compiled(thing)
    return thing


def check_images(images: object, model: nn.Module, role: str = "images") -> None:
    """Raise DataError where a batch of images cannot be shown to a model; its values are not looked at.

    Its size is not checked: which sizes a model takes is for the caller to ask (`check_size`).
    """
    if not isinstance(images, Tensor) or images.ndim != 4:
        shape = (
            f"of shape {tuple(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        )
        one = ": a single image is images[None]" if isinstance(images, Tensor) and images.ndim == 3 else ""
        raise DataError(f"{role} is {shape}{one}; give a tensor (B, C, H, W), normalized for the model")
    if not len(images):
        raise DataError(f"{role} holds no image: its shape is {tuple(images.shape)}")
    if not images.is_floating_point():
        raise DataError(
            f"{role} is of {images.dtype}: give images as load_pretrained(...).preprocessing.transform() makes them, "
            "values of 0..1 less the mean, by the deviation"
        )
    if find_family(model) is not None and images.shape[1] != image_channels(model):
        raise DataError(
            f"{role} has {images.shape[1]} channels, and {type(model).__name__} takes {image_channels(model)}"
        )
    weight = next((each for each in model.parameters() if each.is_floating_point()), None)
    if weight is None:
        return
    if images.device != weight.device:
        raise DataError(
            f"{role} is on {images.device} and the model on {weight.device}: give images.to({str(weight.device)!r})"
        )
    kind = images.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    casts &= images.dtype != torch.float64
    if images.dtype != weight.dtype and not casts:
        raise DataError(
            f"{role} is of {images.dtype} and the weights of {weight.dtype}: give images.to({weight.dtype})"
        )
