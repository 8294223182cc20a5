"""The registered sizes of CSwin, the pyramid of Dong et al. 2022 with cross-shaped windows (arXiv:2107.00652).

Half of the heads of a layer attend within columns of the grid, the others within rows; the last stage sees the whole
map. Values are convolved within each stripe (LePE). No tensor depends on the size of the images: at 384 x 384 a model
has `split_size=(1, 2, 12, 12)` and the same weights.

| name        | depths       | width | parameters  | multiply-adds  | 384 x 384       |
| ----------- | ------------ | ----- | ----------- | -------------- | --------------- |
| cswin_tiny  | 1, 2, 21, 1  | 64    | 22,320,552  | 4,324,203,008  | 13,991,948,288  |
| cswin_small | 2, 4, 32, 2  | 64    | 34,643,304  | 6,800,714,752  | 21,994,606,592  |
| cswin_base  | 2, 4, 32, 2  | 96    | 77,382,184  | 14,955,348,480 | 46,963,660,800  |
| cswin_large | 2, 4, 32, 2  | 144   | 173,262,664 | 33,130,144,512 | 101,881,930,752 |

Counted with 1,000 classes. Importing this file registers the models with timm.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from .errors import JsonDict
from .families.cswin import CSwin
from .pvt_models import FOUR, as_constructor, described

LARGE: JsonDict = {"depths": (2, 4, 32, 2)}
SHAPES: dict[str, JsonDict] = {
    "cswin_tiny": {},
    "cswin_small": LARGE,
    "cswin_base": {**LARGE, "embed_dim": 96, "num_heads": (4, 8, 16, 32)},
    # heads of the last stage are twice as wide
    "cswin_large": {**LARGE, "embed_dim": 144, "num_heads": (6, 12, 24, 24)},
}
SHOWN: JsonDict = {"first_conv": "stage1_conv_embed.0", "crop_pct": 0.9}
default_cfgs = generate_default_cfgs({name: described(**SHOWN) for name in SHAPES})


def _create(name: str, shape: JsonDict, /, pretrained: bool = False, **given: Any) -> nn.Module:
    return build_model_with_cfg(CSwin, name, pretrained, feature_cfg={**FOUR}, **{**shape, **given})


for _name, _shape in SHAPES.items():
    register_model(as_constructor(_create, _name, _shape))
