"""Evaluation's crop: timm's own, and of an image that timm would make huge the same part without the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.transfer.data import augment as crop
from graftvit.transfer.data.augment import eval_transform
from PIL import Image
from support.files.data_sets import image
from timm.data.transforms import ResizeKeepRatio
from torchvision import transforms

SIZES = [(10, 10), (30, 7), (7, 31), (200, 3), (3, 200)]


def spec(mode: str, size: tuple[int, int], share: float = 0.7, filter_: str = "bicubic") -> Preprocessing:
    return Preprocessing((3, *size), (0.5,) * 3, (0.5,) * 3, share, mode, filter_)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(16, 16), (16, 12)])
@pytest.mark.parametrize("filter_", ["bicubic", "bilinear", "nearest"])
def test_a_part_alone_is_what_the_whole_has(
    mode: str, size: tuple[int, int], filter_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = SIZES[:3] if mode == "border" else SIZES  # which leaves a thin image no row
    for place, (width, height) in enumerate(sizes):
        picture = image(place, 200).resize((width, height))
        wanted = spec(mode, size, filter_=filter_).transform()(picture)
        monkeypatch.setattr(crop, "LARGE", 1 << 25)
        assert torch.equal(eval_transform(spec(mode, size, filter_=filter_))(picture), wanted)
        monkeypatch.setattr(crop, "LARGE", 0)
        part = eval_transform(spec(mode, size, filter_=filter_))(picture)
        assert part.shape == wanted.shape
        # a level of 255 apart where a filter's weights round otherwise
        assert ((part - wanted).abs() > 2.1 / 127.5).float().mean() < (0.1 if filter_ == "nearest" else 0.01)


@pytest.mark.parametrize("mode", ["center", "squash"])
def test_an_image_is_never_made_huge(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """3,000 x 40 was enlarged to 1,680,000 x 22,400 to keep 224 x 224 of it."""

    def huge(*_: Any) -> None:
        raise AssertionError("the whole was made")

    monkeypatch.setattr(transforms.Resize, "forward", huge)
    monkeypatch.setattr(ResizeKeepRatio, "__call__", huge)
    pixels = eval_transform(spec(mode, (224, 224), 0.01))(Image.new("RGB", (3000, 40), (255, 0, 0)))
    assert torch.equal(pixels, torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1).expand(3, 224, 224))
