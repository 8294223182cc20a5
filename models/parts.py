"""A teacher from another library, sizes of any timm classifier, and images as patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import ConfigError, TransferError, UnsupportedModelError
from .families import any_family, find_family, valueless

# A teacher from another library, with the interface of a timm classifier.

RESULTS = {"pooled": "pooler_output", "patches": "last_hidden_state", "classes": "logits"}
"""Results of a whole model, and their names in outputs of transformers."""


class OutsideTeacher(nn.Module):
    """A module or a function of images (B, C, H, W) as a teacher for the methods `feature` and `logits`.

    Args:
        model: Returns a mapping with any of `pooled` (B, feature_width), `patches` (B, N, patch_width) or
            (B, patch_width, rows, columns), and `classes` (B, num_classes), an output of transformers (`pooler_output`,
            `last_hidden_state`, `logits`), or a tensor: the feature if `feature_width` is given, else the logits.
        feature_width: Width of the pooled feature; 0 without one.
        patch_width: Width of the features of the patches (default: feature_width).
        num_classes: Number of classes; 0 without logits.
        mean: Mean of each channel, to normalize its images from 0..1.
        std: Standard deviation of each channel.
        img_size: Size (height, width) of its images (default: the student's).
    """

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        *,
        feature_width: int = 0,
        patch_width: int = 0,
        num_classes: int = 0,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        img_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if not feature_width and not patch_width and not num_classes:
            raise TransferError(
                "an OutsideTeacher teaches nothing: give its feature_width, its num_classes or both"
            )
        self.model = model
        self.num_features, self.num_classes = feature_width, num_classes
        self.patch_width = patch_width or feature_width
        self.pooled = nn.Identity()
        self.in_chans = len(mean)
        self.img_size = img_size
        self.pretrained_cfg = {"mean": tuple(mean), "std": tuple(std)}

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, or the features of a model without classes."""
        results = self.forward_features(images)
        if self.num_features:
            self.pooled(self.forward_head(results, pre_logits=True))
        return self.forward_head(results, pre_logits=not self.num_classes)

    def get_classifier(self) -> nn.Module:
        """Return the module that the pooled features go into. Raises TransferError: there are none."""
        if not self.num_features:
            raise TransferError(
                "this teacher gives classes and no features, so there is no distance to it: set engine.metric to "
                "another than distance"
            )
        return self.pooled

    def forward_features(self, images: Tensor) -> dict[str, Tensor]:
        """Return all results by name. Raises TransferError: the model returned none of them."""
        found = self.model(images)
        if isinstance(found, Tensor):
            return {"pooled" if self.num_features else "classes": found}
        results = {
            name: found[key]
            for name, theirs in RESULTS.items()
            for key in (name, theirs)
            if isinstance(found, Mapping) and found.get(key) is not None
        }
        if not results:
            known = [f"{name} ({theirs})" for name, theirs in RESULTS.items()]
            raise TransferError(
                f"the model of an OutsideTeacher returned a {type(found).__name__} without results; valid are a "
                f"tensor, or a mapping with {', '.join(known)}"
            )
        return results

    def forward_head(self, results: Mapping[str, Tensor], pre_logits: bool = False) -> Tensor:
        """Return the pooled feature with `pre_logits`, else the logits."""
        wanted, width = ("pooled", self.num_features) if pre_logits else ("classes", self.num_classes)
        found = results.get(wanted)
        if found is None or found.flatten(1).shape[1] != width:
            setting = "feature_width" if pre_logits else "num_classes"
            raise _wrong(found, wanted, f"{setting}={width} says (B, {width})")
        return found.flatten(1)

    def patches(self, results: Mapping[str, Tensor]) -> Tensor:
        """Return the features of the patches, (B, rows, columns, C) or (B, N, C)."""
        found, width = results.get("patches"), self.patch_width
        if found is not None and found.dim() == 4 and found.shape[1] == width:
            return found.permute(0, 2, 3, 1)
        if found is None or found.dim() != 3 or found.shape[2] != width:
            raise _wrong(
                found, "patches", f"patch_width={width} says (B, N, {width}) or (B, {width}, rows, columns)"
            )
        return found


def _wrong(found: Tensor | None, name: str, said: str) -> TransferError:
    shape = "nothing" if found is None else tuple(found.shape)
    return TransferError(f"the model of an OutsideTeacher returned {shape} as {name!r}, and {said}")


# Read sizes and patch features from any timm classifier, whatever its architecture.


def run_features(model: nn.Module, images: Tensor) -> Any:
    """Run a model up to its features, of which `patch_features` and `run_head` give parts."""
    family, timm_model = any_family(model), cast(Any, model)
    return timm_model.forward_features(images) if family is None else family.features(model, images)


def run_head(model: nn.Module, features: Any, *, pre_logits: bool = False) -> Tensor:
    """Return the logits (B, classes) of features; with `pre_logits` what goes into the classifier, (B, C)."""
    family, timm_model = find_family(model), cast(Any, model)
    if family is not None:
        return family.head(model, features, pre_logits=pre_logits)
    return timm_model.forward_head(features, pre_logits=pre_logits)


def num_classes(model: nn.Module) -> int:
    """Return the number of classes of a classifier; 0 without one."""
    family, timm_model = find_family(model), cast(Any, model)
    return int(timm_model.num_classes) if family is None else family.num_classes(model)


def feature_width(model: nn.Module) -> int:
    """Return the width C of the pooled feature (B, C) that goes into a model's head."""
    timm_model, family = cast(Any, model), find_family(model)
    if family is not None:
        return family.feature_widths(model)[0]
    return int(getattr(timm_model, "head_hidden_size", timm_model.num_features))


def patch_width(model: nn.Module) -> int:
    """Return the width C of the features of the patches (B, ..., C) that `patch_features` gives."""
    if isinstance(model, OutsideTeacher):
        return model.patch_width
    timm_model, family = cast(Any, model), find_family(model)
    return int(timm_model.num_features) if family is None else family.feature_widths(model)[1]


def patch_features(model: Any, features: Any, images: tuple[int, int]) -> Tensor:
    """Return the features of the patches without prefix tokens, of images of a size (height, width).

    The shape is (B, rows, columns, C), or (B, N, C) of a model that does not say how its N patches lie.

    Raises UnsupportedModelError: the features are not a map of patches.
    """
    family = find_family(model)
    if family is not None:
        return family.patches(family.tokens(features), family.last_geometry(model, images))
    if not isinstance(features, Tensor):
        if isinstance(model, OutsideTeacher):
            return model.patches(features)
        raise UnsupportedModelError(
            f"{type(model).__name__} gives {type(features).__name__}, not one tensor of features"
        )
    width = int(model.num_features)
    if features.dim() == 3 and features.shape[2] == width:
        return features[:, int(getattr(model, "num_prefix_tokens", 0)) :]
    if features.dim() == 4 and features.shape[3] == width:
        return features
    if features.dim() == 4 and features.shape[1] == width:
        return features.permute(0, 2, 3, 1)
    raise UnsupportedModelError(
        f"{type(model).__name__} gives features of shape {tuple(features.shape)}, which are not patches of width "
        f"{width}"
    )


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
    family = any_family(model)
    return None if family is None else family.fixed_size(model)


def check_takes(model: nn.Module, size: tuple[int, int], section: str) -> None:
    """Run a model on an image of `size` (height, width) on the meta device, which computes only shapes.

    Raises UnsupportedModelError: the model does not take this size; `section` is its section of the settings.
    """
    if isinstance(model, OutsideTeacher):  # may need real values: the first step will show
        return
    dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
    image = torch.empty(1, image_channels(model), *size, dtype=dtype, device="meta")
    try:
        with torch.no_grad():
            valueless(model)(image)
    except NotImplementedError:
        return  # an operation that the meta device does not have: the first step will show
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UnsupportedModelError(
            f"the {type(model).__name__} of {section} does not take images of {size[0]}x{size[1]}, set "
            f"{section}.img_size to a size that it takes: {' '.join(str(error).split())[:200]}"
        ) from error


# From images to patches: unfold, normalize, and fixed positions on a grid of any shape.


def unfold_patches(images_BCHW: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut images into patches, row by row: (B, N, K) with K ordered (height, width, channel) in a patch.

    Raises:
        ConfigError: height or width is not a multiple of the patch.
    """
    batch, channels, height, width = images_BCHW.shape
    ph, pw = patch_size
    if height % ph or width % pw:
        raise ConfigError(f"Images of {height}x{width} pixels cannot be cut into patches of {ph}x{pw}.")
    x = images_BCHW.reshape(batch, channels, height // ph, ph, width // pw, pw)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, (height // ph) * (width // pw), ph * pw * channels)


def normalize_patches(patches_BNK: Tensor) -> Tensor:
    """Subtract its mean from each patch, and divide by its deviation sqrt(var + 1e-6)."""
    mean_BN1 = patches_BNK.mean(dim=-1, keepdim=True)
    deviation_BN1 = (patches_BNK.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    return (patches_BNK - mean_BN1) / deviation_BN1


def grid_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Return sine and cosine positions of a (rows, columns) grid: (1, rows * columns, dim); `dim` is a multiple of 4.

    A quarter each of sin(row w), cos(row w), sin(column w), cos(column w), with w = 10000^(-i / (dim / 4)).
    """
    quarter = dim // 4
    frequency = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in (rows, columns)]
    parts = [wave(angle) for angle in angles for wave in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=1).float().unsqueeze(0)
