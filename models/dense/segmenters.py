"""The heads of Semantic FPN and UPerNet: a class for each pixel.

Both are trained by the cross-entropy of the labeled pixels, in float32 or better, at the size of the padded images.
Shape suffixes: B batch, K classes, H and W rows and columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from ..errors import DataError, JsonDict
from . import IGNORED
from .backbone import Levels, Maps, Prepared, resized
from .detectors import Sizes, in_float32

BINS = (1, 2, 3, 6)
"""The grids of UPerNet's pyramid pooling."""
AUXILIARY_WEIGHT = 0.4


def _conv(channels: int, width: int, kernel: int = 3) -> nn.Module:
    """Return a convolution without bias, BatchNorm and ReLU."""
    return Conv2dNormActivation(channels, width, kernel)


def _classifier(width: int, num_classes: int, dropout: float) -> nn.Sequential:
    layer = nn.Conv2d(width, num_classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return nn.Sequential(nn.Dropout2d(dropout), layer)


def cross_entropy(logits_BKhw: Tensor, labels_BHW: Tensor) -> Tensor:
    """Return the mean of -log softmax(logits)[label] over the labeled pixels, or 0 without one."""
    logits_BKHW = resized(in_float32(logits_BKhw), labels_BHW.shape[1:])
    total = F.cross_entropy(logits_BKHW, labels_BHW, ignore_index=IGNORED, reduction="sum")
    return total / (labels_BHW != IGNORED).sum().clamp(min=1)


class Segmenter(nn.Module, ABC):
    """A head that gives logits at the finest level, and in training those of an auxiliary head, if it has one."""

    auxiliary: nn.Module | None

    @abstractmethod
    def forward(self, levels: Maps) -> Tensor:
        """Return the logits (B, K, H, W)."""

    def losses(self, prepared: Prepared, levels: Maps) -> dict[str, Tensor]:
        """Return the cross-entropy, and 0.4 of that of the auxiliary head on the last level but one."""
        labels_BHW = torch.stack([each["labels"] for each in prepared.targets or ()])
        found = {"cross_entropy": cross_entropy(self(levels), labels_BHW)}
        if self.auxiliary is not None:
            logits = self.auxiliary(levels[-2])
            found["auxiliary"] = AUXILIARY_WEIGHT * cross_entropy(logits, labels_BHW)
        return found

    def predict(
        self, prepared: Prepared, levels: Maps, original_sizes: Sizes, *, logits: bool = False
    ) -> list[JsonDict]:
        """Return `labels` (H, W) of each image at its original size, on request with its `logits` (K, H, W).

        Logits are resized to the padded image, cut to the image, and resized to the original.
        """
        found = []
        for one, (height, width), size in zip(self(levels), prepared.sizes, original_sizes, strict=True):
            whole = resized(in_float32(one[None]), prepared.tensors.shape[2:])
            scores = resized(whole[:, :, :height, :width], size)[0]
            found.append({"labels": scores.argmax(0), **({"logits": scores} if logits else {})})
        return found


class SemanticFPNHead(Segmenter):
    """The head of Semantic FPN (Kirillov et al. 2019, arXiv:1901.02446) on levels of a feature pyramid network.

    Level i > 0 goes through i times (conv3, BatchNorm, ReLU, twice as large), level 0 through conv3, BatchNorm and
    ReLU; the sum of all, half of `width` wide, with dropout, through conv1.
    """

    def __init__(self, levels: Levels, width: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        inner = width // 2
        self.scales = nn.ModuleList(_grown(each, inner, i) for i, each in enumerate(levels.channels))
        self.classifier = _classifier(inner, num_classes, dropout)
        self.auxiliary = None

    def forward(self, levels: Maps) -> Tensor:
        first, *others = (scale(each) for scale, each in zip(self.scales, levels, strict=True))
        for each in others:
            first = first + resized(each, first.shape[2:])
        return self.classifier(first)


def _grown(width: int, inner: int, times: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for i in range(max(1, times)):
        parts.append(_conv(width if i == 0 else inner, inner))
        if times:
            parts.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    return nn.Sequential(*parts)


class UPerNetHead(Segmenter):
    """UPerNet (Xiao et al. 2018, arXiv:1807.10221) on the maps of a backbone, with its auxiliary head.

    The last map is pooled to grids of 1, 2, 3 and 6, each through conv1 and resized; with the map itself they go
    through conv3. From there down, as in a feature pyramid network with bilinear resizing: M_i = conv1(C_i) + M_(i+1),
    P_i = conv3(M_i). All levels at the size of the first, joined, go through conv3 and, with dropout, conv1. Every
    convolution but the last has BatchNorm and ReLU. The auxiliary head is conv3 to 256 and conv1 on the last map but
    one. In training a batch has two images or more, because the grid of 1 has one token an image.
    """

    def __init__(self, levels: Levels, width: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        *finer, last = levels.channels
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), _conv(last, width, 1)) for side in BINS
        )
        self.bottleneck = _conv(last + len(BINS) * width, width)
        self.laterals = nn.ModuleList(_conv(each, width, 1) for each in finer)
        self.outputs = nn.ModuleList(_conv(width, width) for _ in finer)
        self.joined = _conv(len(levels.channels) * width, width)
        self.classifier = _classifier(width, num_classes, dropout)
        half, self.auxiliary = width // 2, None
        if finer:
            self.auxiliary = nn.Sequential(_conv(finer[-1], half), *_classifier(half, num_classes, dropout))

    def forward(self, levels: Maps) -> Tensor:
        *finer, last = levels
        if self.training and len(last) == 1:
            raise DataError(
                "UPerNet learns from two images or more in a batch: the grid of 1 has one token an image"
            )
        pooled = [resized(pool(last), last.shape[2:]) for pool in self.pools]
        found = [self.bottleneck(torch.cat([last, *pooled], 1))]
        merged = found[0]
        for lateral, output, each in reversed(list(zip(self.laterals, self.outputs, finer, strict=True))):
            merged = lateral(each) + resized(merged, each.shape[2:])
            found.insert(0, output(merged))
        size = found[0].shape[2:]
        return self.classifier(self.joined(torch.cat([resized(each, size) for each in found], 1)))
