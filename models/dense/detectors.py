"""RetinaNet, FCOS and Mask R-CNN of torchvision's parts, with the published settings of detectors on pyramids.

Matching, sampling, losses and the choice of boxes are torchvision's; boxes are (x1, y1, x2, y2) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map  # as torchvision does
from torchvision.models.detection import FCOS, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from ..errors import JsonDict
from .backbone import Levels, Maps, Prepared

RATIOS = (0.5, 1.0, 2.0)
"""Height by width of the anchors."""
Sizes = Sequence[tuple[int, int]]


class ExactAnchors(AnchorGenerator):
    """Anchors of the published sizes and strides, where torchvision rounds both; in float32 under autocast, too."""

    def __init__(
        self, sizes: Sequence[tuple[float, ...]], strides: Sequence[int], ratios: tuple[float, ...] = RATIOS
    ) -> None:
        super().__init__(tuple(sizes), (ratios,) * len(sizes))
        self.strides = strides

    def generate_anchors(self, scales: Any, aspect_ratios: Any, *_: Any, **__: Any) -> Tensor:
        """Return (-w, -h, w, h) / 2 for each ratio and, within it, each size: w h = size², h / w = ratio."""
        roots = torch.tensor(aspect_ratios, dtype=torch.float64).sqrt()[:, None]
        sizes = torch.tensor(scales, dtype=torch.float64)
        width, height = (sizes / roots).flatten(), (sizes * roots).flatten()
        return torch.stack([-width, -height, width, height], 1) / 2

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        """Put the anchors on the device of the maps."""
        super().set_cell_anchors(torch.promote_types(dtype, torch.float32), device)

    def grid_anchors(self, grid_sizes: Any, strides: Any) -> list[Tensor]:
        """Return the anchors of each level, (rows columns A, 4)."""
        return super().grid_anchors(grid_sizes, [(each, each) for each in self.strides])


class _Outside(nn.Identity):
    """Stands where torchvision's detectors have their backbone: the maps come from outside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out_channels = width


def in_float32(*given: Any) -> Any:
    """Return tensors, the last that a hook is given, in float32 or better: boxes are exact under autocast."""
    return tree_map(lambda each: each.to(torch.promote_types(each.dtype, torch.float32)), given[-1])


def _precise(part: nn.Module) -> nn.Module:
    part.register_forward_hook(in_float32)
    return part


def _targets(prepared: Prepared, like: Tensor, background: int = 0) -> list[JsonDict]:
    """Return the targets with boxes of the type of the anchors, and labels counted from `background`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return [
        {**each, "boxes": each["boxes"].to(dtype), "labels": each["labels"] + background}
        for each in prepared.targets or ()
    ]


class _OneStage(nn.Module):
    """What torchvision's detectors without proposals share."""

    def losses(self: Any, prepared: Prepared, levels: Maps) -> dict[str, Tensor]:
        """Return the losses of classes and of boxes, and of the centerness of FCOS."""
        outputs, anchors, counts = self._run(prepared, levels)
        more = (counts,) if isinstance(self, FCOS) else ()
        return self.compute_loss(_targets(prepared, levels[0]), outputs, anchors, *more)

    def predict(self: Any, prepared: Prepared, levels: Maps, original_sizes: Sizes) -> list[JsonDict]:
        """Return `boxes`, `scores` and `labels` of each image, at its original size."""
        outputs, anchors, counts = self._run(prepared, levels)
        by_level = {name: each.split(counts, 1) for name, each in outputs.items()}
        by_image = [each.split(counts) for each in anchors]
        found = self.postprocess_detections(by_level, by_image, prepared.sizes)
        return self.transform.postprocess(found, prepared.sizes, original_sizes)

    def _run(self: Any, prepared: Prepared, levels: Maps) -> tuple[Any, list[Tensor], list[int]]:
        """Return the outputs of the head, the anchors of each image, and the number of those of each level."""
        anchors = self.anchor_generator(ImageList(prepared.tensors, prepared.sizes), levels)
        per_token = self.anchor_generator.num_anchors_per_location()[0]
        return in_float32(self.head(levels)), anchors, [per_token * each[0, 0].numel() for each in levels]


class RetinaNetBoxes(_OneStage, RetinaNet):
    """The head of RetinaNet (Lin et al. 2017, arXiv:1708.02002): 9 anchors a token of each level, focal loss and L1.

    Anchors are `anchor_scale` times the stride times 1, 2^(1/3) and 2^(2/3). The losses of an image are divided by its
    positive anchors, then averaged over the images. 1,000 boxes of a level above `score_threshold` go to the
    suppression of overlaps of .5, and the best `detections` are left. Arguments are those of `create_dense`.
    """

    def __init__(
        self, levels: Levels, width: int, num_classes: int, anchor_scale: float = 4.0,
        score_threshold: float = 0.05, detections: int = 100,
    ) -> None:  # fmt: skip
        sizes = [tuple(anchor_scale * stride * 2 ** (i / 3) for i in range(3)) for stride in levels.strides]
        super().__init__(
            _Outside(width),
            num_classes,
            anchor_generator=ExactAnchors(sizes, levels.strides),
            head=RetinaNetHead(width, 3 * len(RATIOS), num_classes),
            score_thresh=score_threshold,
            detections_per_img=detections,
        )


class FCOSBoxes(_OneStage, FCOS):
    """The head of FCOS (Tian et al. 2019, arXiv:1904.01355): four distances and a centerness of each token, no anchors.

    A token learns the smallest box around it whose center is within 1.5 strides, and whose largest distance is from 4
    to 8 strides; the finest level also has smaller ones, the coarsest larger ones. Focal loss, GIoU, and cross-entropy
    of the centerness are divided by the positive tokens of the batch. A score is the root of class times centerness;
    overlaps of .6 are suppressed. Arguments are those of `create_dense`.
    """

    def __init__(
        self, levels: Levels, width: int, num_classes: int, score_threshold: float = 0.05, detections: int = 100,
    ) -> None:  # fmt: skip
        norm = partial(nn.GroupNorm, math.gcd(32, width, max(1, width // 8)))  # 32 of 256 channels
        head = FCOSHead(width, 1, num_classes, num_convs=0)  # its norms refuse 16 channels
        head.classification_head = FCOSClassificationHead(width, 1, num_classes, norm_layer=norm)
        head.regression_head = FCOSRegressionHead(width, 1, norm_layer=norm)
        super().__init__(
            _Outside(width),
            num_classes,
            anchor_generator=ExactAnchors([(stride,) for stride in levels.strides], levels.strides, (1.0,)),
            head=head,
            score_thresh=score_threshold,
            detections_per_img=detections,
        )


class MaskRCNNBoxes(MaskRCNN):
    """Proposals, boxes and masks of Mask R-CNN (He et al. 2017, arXiv:1703.06870) on levels, the last one subsampled.

    Three anchors a token, of `anchor_scale` times the stride: 256 are sampled of an image, half of them positive, and
    1,000 proposals are left. `samples` of these teach an image, a quarter positive. Box head of two layers of four
    times `width`, mask head of four convolutions and one that doubles 14 x 14 to 28 x 28, one mask for each class.
    Arguments are those of `create_dense`.
    """

    def __init__(
        self, levels: Levels, width: int, num_classes: int, anchor_scale: float = 8.0,
        score_threshold: float = 0.05, detections: int = 100, samples: int = 512,
    ) -> None:  # fmt: skip
        strides = levels.strides
        super().__init__(
            _Outside(width),
            rpn_anchor_generator=ExactAnchors([(anchor_scale * stride,) for stride in strides], strides),
            rpn_head=_precise(RPNHead(width, len(RATIOS))),
            rpn_pre_nms_top_n_test=1000,
            rpn_post_nms_top_n_train=1000,
            box_roi_pool=_pool(strides[:-1], 7),
            box_head=TwoMLPHead(49 * width, 4 * width),
            box_predictor=_precise(FastRCNNPredictor(4 * width, num_classes + 1)),
            box_score_thresh=score_threshold,
            box_detections_per_img=detections,
            box_batch_size_per_image=samples,
            mask_roi_pool=_pool(strides[:-1], 14),
            mask_head=MaskRCNNHeads(width, (width,) * 4, 1),
            mask_predictor=_precise(MaskRCNNPredictor(width, width, num_classes + 1)),
        )

    def losses(self, prepared: Prepared, levels: Maps) -> dict[str, Tensor]:
        """Return the losses of proposals (two), of boxes (two) and of masks."""
        targets = _targets(prepared, levels[0], background=1)
        named = _named(levels)
        proposals, first = self.rpn(ImageList(prepared.tensors, prepared.sizes), named, targets)
        _, second = self.roi_heads(named, proposals, prepared.sizes, targets)
        return {**first, **second}

    def predict(self, prepared: Prepared, levels: Maps, original_sizes: Sizes) -> list[JsonDict]:
        """Return `boxes`, `scores`, `labels` and `masks` (N, H, W) of each image, at its original size."""
        named = _named(levels)
        proposals, _ = self.rpn(ImageList(prepared.tensors, prepared.sizes), named)
        found, _ = self.roi_heads(named, proposals, prepared.sizes)
        found = self.transform.postprocess(found, prepared.sizes, original_sizes)
        return [{**each, "labels": each["labels"] - 1, "masks": each["masks"][:, 0] > 0.5} for each in found]


def _named(levels: Maps) -> dict[str, Tensor]:
    return {str(i): each for i, each in enumerate(levels)}


def _pool(strides: Sequence[int], size: int) -> MultiScaleRoIAlign:
    """Return the RoIAlign of a size on levels of these strides, whatever the padding of the images."""
    made = MultiScaleRoIAlign([str(i) for i in range(len(strides))], size, sampling_ratio=2)
    made.scales = [1 / stride for stride in strides]
    made.map_levels = initLevelMapper(int(math.log2(strides[0])), int(math.log2(strides[-1])))
    return made
