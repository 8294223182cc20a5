"""The refusal of image sizes that leave a model without tokens, or with broken patches."""

from __future__ import annotations

from torch import nn

from ..attention.base import Geometry
from ..errors import UnsupportedModelError
from .plain import fills, image_size, patch_size
from .walk import find_family


def check_patches(model: nn.Module, size: tuple[int, int] | None = None) -> None:
    """Raise UnsupportedModelError if images of `size` (default: the model's own) have no patch, or a broken one."""
    size = image_size(model) if size is None else size
    patch = patch_size(model)
    if size is not None and any(side < least for side, least in zip(size, patch, strict=True)):
        raise UnsupportedModelError(
            f"images of {size[0]}x{size[1]} have no whole patch of {patch[0]}x{patch[1]}: give a larger img_size"
        )
    if size is not None and not fills(getattr(model, "patch_embed", None), size):
        raise UnsupportedModelError(
            f"images of {size[0]}x{size[1]} are not whole patches of {patch[0]}x{patch[1]}, which a model with "
            "dynamic_img_size needs: give another img_size"
        )
    family = find_family(model)
    if size is not None and family is not None and family.is_pyramid:
        _check_stages(family.geometries(model, size), size)


def _check_stages(stages: list[Geometry], size: tuple[int, int]) -> None:
    empty = next((number for number, stage in enumerate(stages, 1) if min(stage.grid) < 1), None)
    if empty is not None:
        raise UnsupportedModelError(
            f"images of {size[0]}x{size[1]} leave no token in stage {empty}: give a larger img_size"
        )
