"""A teacher from another library, with the interface of a timm classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .errors import TransferError

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
