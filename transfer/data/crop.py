"""Evaluation's resize and crop as one step, which never makes more of an image than it keeps."""

from __future__ import annotations

from typing import Any

from PIL import Image
from timm.data.transforms import ResizeKeepRatio
from torchvision.transforms import Resize
from torchvision.transforms import functional as F

LARGE = 1 << 25
"""Pixels of a resized image, above which only the part that is kept is made."""


class ResizeAndCenterCrop:
    """timm's two steps; of an image that they would make huge, the same part by the same filter.

    A small `crop_pct`, or an image that is long and thin, is enlarged to gigabytes, of which little is kept.
    """

    def __init__(self, resize: Any, crop: Any) -> None:
        self._resize = resize
        self._crop = crop

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = resized(self._resize, image)
        if height * width <= LARGE:
            return self._keep(self._resize(image))
        kept_height, kept_width = (
            min(kept, whole) for kept, whole in zip(self._crop.size, (height, width), strict=True)
        )
        top, left = round((height - kept_height) / 2), round((width - kept_width) / 2)
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + kept_width) * across, (top + kept_height) * down)
        filter_ = Image.Resampling[self._resize.interpolation.name]
        return self._keep(image.resize((kept_width, kept_height), filter_, box))

    def _keep(self, image: Image.Image) -> Image.Image:
        cropped: Image.Image = self._crop(image)
        return cropped


def resized(resize: Resize | ResizeKeepRatio, image: Image.Image) -> tuple[int, int]:
    """Height and width that a step gives an image."""
    if isinstance(resize, ResizeKeepRatio):
        height, width = ResizeKeepRatio.get_params(image, resize.size, resize.longest)
        return int(height), int(width)
    if not isinstance(resize.size, int):
        return int(resize.size[0]), int(resize.size[1])
    height, width = F.get_dimensions(image)[1:]
    long = int(resize.size * max(height, width) / min(height, width))
    return (resize.size, long) if height <= width else (long, resize.size)
