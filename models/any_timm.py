"""Read sizes and patch features from any timm classifier, whatever its architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .errors import UnsupportedModelError
from .families import find_family, is_supported, patch_grid
from .outside import OutsideTeacher


def feature_width(model: nn.Module) -> int:
    """Return the width C of the pooled feature (B, C) that goes into a model's head."""
    timm_model: Any = model
    return int(getattr(timm_model, "head_hidden_size", timm_model.num_features))


def patch_width(model: nn.Module) -> int:
    """Return the width C of the features of the patches (B, ..., C) that `patch_features` gives."""
    if isinstance(model, OutsideTeacher):
        return model.patch_width
    timm_model: Any = model
    return int(timm_model.num_features)


def patch_features(
    model: nn.Module, features: Tensor | Mapping[str, Tensor], images: tuple[int, int]
) -> Tensor:
    """Return the features of the patches without prefix tokens, of images of a size (height, width).

    The shape is (B, rows, columns, C), or (B, N, C) of a model that does not say how its N patches lie.

    Raises UnsupportedModelError: the features are not a map of patches.
    """
    if not isinstance(features, Tensor):
        if isinstance(model, OutsideTeacher):
            return model.patches(features)
        raise UnsupportedModelError(
            f"{type(model).__name__} gives {type(features).__name__}, not one tensor of features"
        )
    family = find_family(model)
    if family is not None and family.is_pyramid:
        return family.patches(features, family.geometries(model, images)[-1])
    timm_model: Any = model
    width = int(timm_model.num_features)
    if features.dim() == 3 and features.shape[2] == width:
        patches = features[:, int(getattr(timm_model, "num_prefix_tokens", 0)) :]
        return as_grid(model, patches, images) if is_supported(model) else patches
    if features.dim() == 4 and features.shape[3] == width:
        return features
    if features.dim() == 4 and features.shape[1] == width:
        return features.permute(0, 2, 3, 1)
    raise UnsupportedModelError(
        f"{type(model).__name__} gives features of shape {tuple(features.shape)}, which are not patches of width "
        f"{width}"
    )


def as_grid(model: nn.Module, patches_BNC: Tensor, images: tuple[int, int]) -> Tensor:
    """Return the patches of a plain vision transformer, of images of a size, as (B, rows, columns, C)."""
    grid = patch_grid(model.patch_embed, images)
    found: Tensor = patches_BNC.unflatten(1, grid)
    return found


def image_channels(model: nn.Module) -> int:
    """Return the channels of the images that a model takes: those of its first convolution; 3 without one."""
    if isinstance(model, OutsideTeacher):
        return model.in_chans
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        return 3
    return first.in_channels


def fixed_size(model: nn.Module) -> tuple[int, int] | None:
    """Return the only size (height, width) of images that a model takes; None if it takes any."""
    if isinstance(model, OutsideTeacher):
        return model.img_size
    described = getattr(model, "pretrained_cfg", None) or {}
    family = find_family(model)
    if family is not None and family.is_pyramid and described.get("fixed_input_size"):
        return family.image_size(model)
    if described.get("fixed_input_size") and getattr(model, "patch_embed", None) is None:
        return int(described["input_size"][1]), int(described["input_size"][2])
    embedding: Any = getattr(model, "patch_embed", None)
    size = getattr(embedding, "img_size", None)
    if size is None or not getattr(embedding, "strict_img_size", True):
        return None
    return int(size[0]), int(size[1])


def check_takes(model: nn.Module, size: tuple[int, int], section: str) -> None:
    """Run a model on an image of `size` (height, width) on the meta device, which computes only shapes.

    Raises UnsupportedModelError: the model does not take this size; `section` is its section of the settings.
    """
    if isinstance(model, OutsideTeacher):  # may need real values: the first step will show
        return
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    empty = {name: tensor.to("meta") for name, tensor in tensors.items()}
    dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
    image = torch.empty(1, image_channels(model), *size, dtype=dtype, device="meta")
    try:
        with torch.no_grad():
            functional_call(model, empty, (image,))
    except NotImplementedError:
        return  # an operation that the meta device does not have: the first step will show
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UnsupportedModelError(
            f"the {type(model).__name__} of {section} does not take images of {size[0]}x{size[1]}, set "
            f"{section}.img_size to a size that it takes: {' '.join(str(error).split())[:200]}"
        ) from error
