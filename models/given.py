"""What a caller may give as a model, and the images for it: one sentence for anything else."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pkgutil import resolve_name
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from .errors import DataError, UnsupportedModelError, counted, kind_of
from .families import find_family, image_channels, refuse_compiled


@runtime_checkable
class HoldsModel(Protocol):
    """An object that a model can be taken from: what `load_pretrained` returns, a `DualViT`, the result of a run."""

    def to_model(self) -> nn.Module:
        """Return the model."""


@runtime_checkable
class HoldsBody(HoldsModel, Protocol):
    """A detector or segmenter, which stands on a model."""

    def on(self, body: nn.Module) -> nn.Module:
        """Return a copy that stands on another model."""


Model: TypeAlias = nn.Module | HoldsModel | str | PathLike[str]
"""A model, an object that holds one, or a source of weights by name."""
LOADER = f"{__package__.partition('.')[0]}.checkpoints.pretrained:load"
"""What opens a source by name; by its own name, because checkpoints stand on models."""


def opened(thing: object) -> object:
    """Return what a source names, or what is loaded or trained holds; a module, or anything else, as it is."""
    if isinstance(thing, str | PathLike):
        return resolve_name(LOADER)(thing)
    holds = isinstance(thing, HoldsModel) and not isinstance(thing, type | nn.Module)
    return thing.to_model() if holds else thing  # type: ignore[attr-defined]


def as_model(thing: object, role: str = "model") -> nn.Module:
    """Return the model that `thing` is, holds or names.

    Args:
        thing: a model; what `load_pretrained` returns; a `DualViT`, for its student as it would be saved; a detector or
            segmenter, for the backbone inside; the result of a run; or a source by name, which is loaded as by
            `graftvit.load`.
        role: begins the sentence of an error.

    Raises:
        UnsupportedModelError: it is something else, or was compiled by torch.compile.
        CheckpointError: as `load`.
    """
    thing = opened(thing)
    if isinstance(thing, HoldsModel) and not isinstance(thing, type):
        return thing.to_model()
    if isinstance(thing, Mapping):
        raise UnsupportedModelError(
            f"{role} is a mapping, as a state dict is, and no model: load it into one first"
        )
    if not isinstance(thing, nn.Module):
        kind = f"the class {thing.__name__}" if isinstance(thing, type) else f"of type {type(thing).__name__}"
        wrapped = ", or a function as an OutsideTeacher" if callable(thing) else ""
        raise UnsupportedModelError(
            f"{role} is {kind} and no model: give an nn.Module, what graftvit.load_pretrained returns, a DualViT, or a "
            f"source of weights by name{wrapped}"
        )
    refuse_compiled(thing)
    name = type(thing).__name__
    if [part for part, _ in thing.named_children()] == ["module"]:  # DataParallel, DDP, averages of weights
        raise UnsupportedModelError(f"{role} is a {name}, which wraps a model: give its .module")
    if isinstance(thing, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            f"{role} is a {name}, whose parts cannot be read: give the model before it was scripted"
        )
    if hasattr(thing, "merge_and_unload"):
        raise UnsupportedModelError(
            f"{role} is a {name}, with adapters beside its weights: give its merge_and_unload()"
        )
    return thing


def computes_with(images: Tensor, weight: Tensor) -> bool:
    """Return whether weights of this type compute with such images: of the same, or of any that autocast converts."""
    kind = images.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return images.dtype == weight.dtype or (casts and images.dtype != torch.float64)


def check_images(images: object, model: nn.Module, role: str = "images", *, values: bool = False) -> None:
    """Raise DataError where a batch of images cannot be shown to a model, or, with `values`, holds NaN or infinity.

    Its size is not checked: which sizes a model takes is for the caller to ask (`check_size`). Looking at `values`
    waits for the device.
    """
    if isinstance(images, Tensor) and (images.is_nested or images.layout != torch.strided):
        raise DataError(
            f"{role} is a nested or sparse tensor: give a dense one (B, C, H, W), as by .to_dense()"
        )
    if not isinstance(images, Tensor) or images.ndim != 4:
        shape = f"of shape {tuple(images.shape)}" if isinstance(images, Tensor) else kind_of(images)
        one = f": a single image is {role}[None]" if isinstance(images, Tensor) and images.ndim == 3 else ""
        raise DataError(f"{role} is {shape}{one}; give a tensor (B, C, H, W), normalized for the model")
    if not len(images):
        raise DataError(f"{role} holds no image: its shape is {tuple(images.shape)}")
    if not images.is_floating_point():
        raise DataError(
            f"{role} is of {images.dtype}: give pixels of 0..1 less the model's mean, by its deviation, as "
            "timm.data.create_transform makes them"
        )
    channels = images.shape[1] if find_family(model) is None else image_channels(model)
    if images.shape[1] != channels:
        shown = counted(images.shape[1], "channel")
        raise DataError(f"{role} has {shown}, and {type(model).__name__} takes {channels}")
    weight = next((each for each in model.parameters() if each.is_floating_point()), None)
    if weight is None:
        return
    if images.device != weight.device:
        raise DataError(
            f"{role} is on {images.device} and the model on {weight.device}: give images.to({str(weight.device)!r})"
        )
    if not computes_with(images, weight):
        raise DataError(
            f"{role} is of {images.dtype} and the weights of {weight.dtype}: give images.to({weight.dtype})"
        )
    if values and not torch.isfinite(images).all():
        raise DataError(f"{role} holds values that are not finite")
