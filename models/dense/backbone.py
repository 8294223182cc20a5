"""A timm model as maps of an image at several strides, and the necks that make equally wide levels of them.

Shape suffixes: B batch, C channels, H and W rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models import is_model
from torch import Tensor, nn
from torchvision.ops import feature_pyramid_network as fpn

from ..errors import ConfigError, GraftError, JsonDict, UnsupportedModelError
from ..families import any_family, create_timm_model, image_size
from ..small import without_memory
from . import FINEST

Maps: TypeAlias = list[Tensor]
ANY_SIZE: tuple[JsonDict, ...] = ({}, {"strict_img_size": False}, {"dynamic_img_size": True})
"""Arguments of timm's constructors with which a model takes images of any size; the first that do are used."""
PROBE = (448, 672)
"""A size of images that no model is built for."""


class Backbone(nn.Module):
    """A timm model, plain or converted, as the last of its maps at each stride, the finest first.

    A pyramid has maps of strides 4, 8, 16 and 32, a plain vision transformer one map. The parts that no map needs, the
    classifier and the last norm, are removed from `body`, so each parameter is trained.

    Args:
        body: takes images of any size whose sides are multiples of its largest stride (`any_size_arguments`).
        norms: the outputs, counted from 0, that go through a new LayerNorm over their channels: 1 to 3 of LIT-S and
            LITv2 for detection, all of Swin, CSwin and for segmentation, none of PVT and LIT-Ti.

    Raises:
        UnsupportedModelError: `body` gives no maps, or takes images of one size alone.
        ConfigError: `norms` names an output that there is not.
    """

    def __init__(self, body: Any, norms: Sequence[int] = ()) -> None:
        super().__init__()
        if not all(hasattr(body, name) for name in ("forward_intermediates", "prune_intermediate_layers")):
            raise UnsupportedModelError(f"{type(body).__name__} gives no maps, and is no backbone")
        _check_any_size(body)
        known = [(int(each["num_chs"]), int(each["reduction"])) for each in body.feature_info]
        chosen = _last_of_each([stride for _, stride in known])
        self.indices: list[int] = body.prune_intermediate_layers(chosen, prune_norm=True)
        self.channels = [known[index][0] for index in chosen]
        self.strides = [known[index][1] for index in chosen]
        wrong = [each for each in norms if not 0 <= each < len(chosen)]
        if wrong:
            raise ConfigError(
                f"norms={wrong}; the outputs of {type(body).__name__} are 0 to {len(chosen) - 1}"
            )
        self.body = body
        self.norms = nn.ModuleDict(
            {str(each): LayerNorm2d(self.channels[each], eps=1e-5) for each in sorted(set(norms))}
        )

    def forward(self, images_BCHW: Tensor) -> Maps:
        """Return the maps (B, C, H / stride, W / stride) of normalized images."""
        body: Any = self.body
        maps = body.forward_intermediates(images_BCHW, indices=self.indices, intermediates_only=True)
        return [self.norms[str(i)](each) if str(i) in self.norms else each for i, each in enumerate(maps)]


def divisor_of(body: Any) -> int:
    """Return what the sides of a batch are multiples of: the largest stride, and twice that of a single map."""
    strides = {int(each["reduction"]) for each in body.feature_info}
    return max(strides) * (2 if len(strides) == 1 else 1)


def any_size_arguments(name: str) -> JsonDict:
    """Return the arguments with which timm's constructor of `name` makes a model for images of any size.

    Raises UnsupportedModelError: timm has no such architecture, or it takes images of one size alone.
    """
    if not is_model(name):
        raise UnsupportedModelError(f"{name!r} is not an architecture of timm")
    for arguments in ANY_SIZE:
        try:
            with without_memory(), torch.no_grad():
                model: Any = create_timm_model(name, **arguments)
                _check_any_size(model)
                model.forward_intermediates(torch.empty(1, 3, *PROBE))
        except (GraftError, TypeError, ValueError, AssertionError, RuntimeError):
            continue
        return dict(arguments)
    raise UnsupportedModelError(f"{name} takes images of one size alone, and is no backbone")


def _check_any_size(body: nn.Module) -> None:
    family, size = any_family(body), image_size(body)
    if family is not None and family.is_strict(body):
        shown = "one size" if size is None else f"{size[0]}x{size[1]}"
        raise UnsupportedModelError(
            f"{type(body).__name__} takes images of {shown} alone: build it with strict_img_size=False, a plain vision "
            "transformer with dynamic_img_size=True"
        )


def _last_of_each(strides: Sequence[int]) -> list[int]:
    """Return the place of the last map of each stride from `FINEST` up, or of a coarser first one."""
    ends = [i for i, (one, following) in enumerate(pairwise(strides)) if one != following]
    return [i for i in [*ends, len(strides) - 1] if strides[i] >= FINEST]


@dataclass(frozen=True)
class Prepared:
    """Images of several sizes as one batch: normalized, then padded with zeros below and on the right."""

    tensors: Tensor
    """(B, 3, H, W)."""
    sizes: list[tuple[int, int]]
    """Height and width of each image without padding."""
    targets: list[JsonDict] | None = None
    """One for each image; maps of labels are padded with 255."""


class Levels(NamedTuple):
    """The maps that a head gets, the finest first."""

    channels: list[int]
    strides: list[int]


# Necks: `levels` of one width from the maps of a backbone, with the extra ones.


class RawP6P7(fpn.LastLevelP6P7):
    """The two coarsest levels of RetinaNet: P6 = conv(C5), P7 = conv(P6), both 3 x 3 with stride 2.

    Lin et al. 2017 (arXiv:1708.02002) have a ReLU before P7; the published detectors of pyramids have none.
    """

    def forward(self, levels: Maps, maps: Maps, names: list[str]) -> tuple[Maps, list[str]]:
        p6 = self.p6(maps[-1])
        return [*levels, p6, self.p7(p6)], [*names, "p6", "p7"]


def _extra(number: int, channels: int, width: int) -> fpn.ExtraFPNBlock | None:
    return RawP6P7(channels, width) if number == 2 else fpn.LastLevelMaxPool() if number else None


def _levels(width: int, strides: Sequence[int], extra: int) -> Levels:
    found = [*strides, *(strides[-1] * 2 ** (i + 1) for i in range(extra))]
    return Levels([width] * len(found), found)


class Pyramid(nn.Module):
    """The feature pyramid network of Lin et al. 2017 (arXiv:1612.03144) on the maps of a pyramid.

    M_i = conv1(C_i) + nearest(M_(i+1), to the size of C_i), P_i = conv3(M_i); `width` channels, biases, no norm.

    Args:
        backbone: gives the maps C_i.
        width: of the levels.
        finest: the smallest stride that is used.
        extra: number of coarser levels: one has every second token of the last, two are P6 and P7 of `RawP6P7`.
    """

    def __init__(self, backbone: Backbone, width: int, finest: int = FINEST, extra: int = 0) -> None:
        super().__init__()
        self.first = next(i for i, each in enumerate(backbone.strides) if each >= finest)
        channels = backbone.channels[self.first :]
        self.levels = _levels(width, backbone.strides[self.first :], extra)
        self.fpn = fpn.FeaturePyramidNetwork(channels, width, _extra(extra, channels[-1], width))

    def forward(self, maps: Maps) -> Maps:
        """Return the levels (B, width, H, W), the finest first."""
        named = {str(i): each for i, each in enumerate(maps[self.first :])}
        return list(self.fpn(named).values())


class SimplePyramid(nn.Module):
    """The neck of ViTDet (Li et al. 2022, arXiv:2203.16527): levels of 1/4, 1/2, 1 and 2 times the stride of one map.

    Two transposed convolutions with LayerNorm and GELU between, one, the map itself, its 2 x 2 maximum; then for each
    conv1, LayerNorm, conv3, LayerNorm to `width` channels. Arguments are those of `Pyramid`; P6 is made of the maximum.

    Raises ConfigError: the stride of the map is no multiple of 4.
    """

    def __init__(self, backbone: Backbone, width: int, finest: int = FINEST, extra: int = 0) -> None:
        super().__init__()
        stride, channels = backbone.strides[-1], backbone.channels[-1]
        if stride % 4:
            raise ConfigError(f"patches of {stride} pixels cannot be halved twice: give a multiple of 4")
        half = channels // 2
        twice = nn.Sequential(_enlarged(channels), LayerNorm2d(half), nn.GELU(), _enlarged(half))
        scaled: list[tuple[int, int, nn.Module]] = [
            (stride // 4, half // 2, twice),
            (stride // 2, half, _enlarged(channels)),
            (stride, channels, nn.Identity()),
            (2 * stride, channels, nn.MaxPool2d(2)),
        ]
        scaled = [each for each in scaled if each[0] >= min(finest, stride)]
        self.levels = _levels(width, [each[0] for each in scaled], extra)
        self.scales = nn.ModuleList(each[2] for each in scaled)
        self.outputs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inner, width, 1, bias=False),
                LayerNorm2d(width),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                LayerNorm2d(width),
            )
            for _, inner, _ in scaled
        )
        self.extra = _extra(extra, channels, width)

    def forward(self, maps: Maps) -> Maps:
        """Return the levels (B, width, H, W), the finest first, of one map."""
        scaled = [scale(maps[-1]) for scale in self.scales]
        levels = [output(each) for output, each in zip(self.outputs, scaled, strict=True)]
        if self.extra is not None:
            levels = self.extra(levels, scaled, [""] * len(levels))[0]
        return levels


def _enlarged(channels: int) -> nn.Module:
    return nn.ConvTranspose2d(channels, channels // 2, 2, 2)


def resized(map_BCHW: Tensor, size: Sequence[int]) -> Tensor:
    """Return a map on another grid, bilinear between the centers of its tokens (align_corners false)."""
    if map_BCHW.shape[2:] == tuple(size):
        return map_BCHW
    return F.interpolate(map_BCHW, size=tuple(size), mode="bilinear", align_corners=False)
