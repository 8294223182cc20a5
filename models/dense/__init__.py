"""Detectors and segmenters on the maps of any timm model. No torch here, so that conditions can ask it."""

from dataclasses import dataclass
from typing import Final, Literal

IGNORED = 255
"""The label of a pixel that no loss and no score counts."""
FINEST = 4
"""The smallest stride of a map that is used: convolutional networks have larger maps, which no head reads."""
DETECTION: Final = "detection"
SEGMENTATION: Final = "segmentation"
Kind = Literal["retinanet", "mask_rcnn", "fcos", "semantic_fpn", "upernet"]


@dataclass(frozen=True)
class Design:
    """What a kind of model is made of, and what settings and scores ask about it."""

    head: str
    """Class in `detectors` or `segmenters`."""
    best: str
    """The score that picks the best state of a run."""
    task: Literal["detection", "segmentation"] = DETECTION
    finest: int = FINEST
    """The smallest stride of the levels."""
    extra: int = 0
    """The number of levels beyond those of the backbone, as of `backbone.Pyramid`."""
    width: int = 256
    has_neck: bool = True
    """Whether a pyramid gets a neck; the one map of a plain vision transformer always does."""
    has_anchors: bool = False
    has_masks: bool = False


DESIGNS: dict[Kind, Design] = {
    "retinanet": Design("RetinaNetBoxes", "box_ap", finest=8, extra=2, has_anchors=True),
    "mask_rcnn": Design("MaskRCNNBoxes", "mask_ap", extra=1, has_anchors=True, has_masks=True),
    "fcos": Design("FCOSBoxes", "box_ap", finest=8, extra=2),
    "semantic_fpn": Design("SemanticFPNHead", "miou", SEGMENTATION),
    "upernet": Design("UPerNetHead", "miou", SEGMENTATION, width=512, has_neck=False),
}
"""By the value of `dense.head`."""
