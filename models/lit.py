"""LIT and LITv2: pyramids that pay less attention in early stages (arXiv:2105.14217, arXiv:2205.13213).

They are timm's Swin, and our PVT, with a layer plan. LIT has no attention in stages 1 and 2, softmax over all tokens in
stages 3 and 4, and merges tokens deformably. LIT-S, M and B have Swin's relative position bias, of the whole grid.
Importing this package's models registers them with timm.

| name      | built from                    | parameters | drop path |
| --------- | ----------------------------- | ---------- | --------- |
| lit_ti    | pvt_small                     | 19,886,272 | 0.1       |
| lit_s     | swin_tiny_patch4_window7_224  | 27,973,720 | 0.2       |
| lit_m     | swin_small_patch4_window7_224 | 49,372,264 | 0.3       |
| lit_b     | swin_base_patch4_window7_224  | 87,292,384 | 0.5       |
| litv2_s   | swin_tiny_patch4_window7_224  | 27,844,000 | 0.2       |
| litv2_m   | swin_small_patch4_window7_224 | 48,830,368 | 0.3       |
| litv2_b   | swin_base_patch4_window7_224  | 86,520,704 | 0.5       |

Counted with 1,000 classes at 224 x 224. LITv2 has HiLo attention in stages 3 and 4 (there with windows of one token,
which is softmax), no relative position bias, and the parts of `litv2_parts.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from . import pvt_models
from .attention.hilo import HiLoAttention
from .conversion import convert_layers
from .converted import converted_layers
from .families import as_kind, create_timm_model, sites
from .families.pvt import MlpWithDepthwiseConv
from .families.swin import WholeGridBlock

# What LITv2 (arXiv:2205.13213) has beside HiLo: convolutions in its MLPs, and two output projections a layer.


class ConvBlock(WholeGridBlock):
    """A block of Swin whose MLP has a depthwise convolution of 3 x 3 over the grid before its activation."""

    def forward(self, x_BHWC: Tensor) -> Tensor:
        batch, height, width, channels = x_BHWC.shape
        x_BHWC = x_BHWC + self.drop_path1(self._attn(self.norm1(x_BHWC)))
        tokens = self.mlp(self.norm2(x_BHWC).reshape(batch, -1, channels), (height, width))
        return x_BHWC + self.drop_path2(tokens).reshape(x_BHWC.shape)


class SplitLinear(nn.Module):
    """Project the high and the low heads of HiLo apart: a linear layer with a block-diagonal weight."""

    def __init__(self, num_high: int, num_low: int) -> None:
        super().__init__()
        self.high = nn.Linear(num_high, num_high)
        self.low = nn.Linear(num_low, num_low)
        self.in_features = self.out_features = num_high + num_low

    def forward(self, x_BNC: Tensor) -> Tensor:
        high, low = x_BNC.split((self.high.in_features, self.low.in_features), -1)
        return torch.cat((self.high(high), self.low(low)), -1)


def add_convolutions(model: nn.Module) -> None:
    """Give every block of a Swin, without attention or converted, an MLP with a depthwise convolution."""
    for site in sites(model):
        block: Any = as_kind(site.block(model), ConvBlock)
        old, like = block.mlp, block.mlp.fc1.weight
        mlp = MlpWithDepthwiseConv(site.width, old.fc1.out_features, drop=old.drop1.p).to(like)
        _initialize(mlp)
        block._modules["mlp"] = mlp.train(old.training)
        site.replace_block(model, block)


def split_projections(model: nn.Module) -> None:
    """Give each layer with heads of both kinds a projection for either."""
    for layer in converted_layers(model).values():
        operator: Any = layer.operator
        if isinstance(operator, HiLoAttention) and 0 < operator.num_high < operator.shape.num_heads:
            high = operator.num_high * operator.shape.head_dim
            old: Any = layer.proj
            projection = SplitLinear(high, old.out_features - high).to(old.weight)
            _initialize(projection)
            layer._modules["proj"] = projection.train(old.training)


def _initialize(module: nn.Module) -> None:
    for each in module.modules():
        if isinstance(each, nn.Linear):
            trunc_normal_(each.weight, std=0.02)
            nn.init.zeros_(each.bias)


PLAN = "stage1: none; stage2: none; stage3: softmax; stage4: softmax; merge: deformable"
PLAN_V2 = "stage1: none; stage2: none; stage3: hilo; stage4: hilo(window=1); merge: deformable"
HOSTS = {
    "lit_ti": ("pvt_small", 0.1),
    "lit_s": ("swin_tiny_patch4_window7_224", 0.2),
    "lit_m": ("swin_small_patch4_window7_224", 0.3),
    "lit_b": ("swin_base_patch4_window7_224", 0.5),
    "litv2_s": ("swin_tiny_patch4_window7_224", 0.2),
    "litv2_m": ("swin_small_patch4_window7_224", 0.3),
    "litv2_b": ("swin_base_patch4_window7_224", 0.5),
}
"""The pyramid that each is built from, and its drop path."""
SWIN = {name: pvt_models.described(classifier="head.fc") for name in HOSTS if name != "lit_ti"}
default_cfgs = generate_default_cfgs({"lit_ti": pvt_models.described(), **SWIN})


def _create(name: str, host: str, drop_path: float, /, pretrained: bool = False, **given: Any) -> nn.Module:
    def build(**arguments: Any) -> nn.Module:
        model = create_timm_model(host, **{"drop_path_rate": drop_path, **arguments})
        return _second(model) if name.startswith("litv2") else _first(model)

    return build_model_with_cfg(build, name, pretrained, feature_cfg={**pvt_models.FOUR}, **given)


for _name, _built in HOSTS.items():
    register_model(pvt_models.as_constructor(_create, _name, *_built))


def _first(model: nn.Module) -> nn.Module:
    """Return LIT, with fresh tables of relative positions: Swin's are of its windows."""
    lit = convert_layers(model, PLAN)
    for name, parameter in lit.named_parameters():
        if name.endswith("relative_position_bias_table"):
            trunc_normal_(parameter, std=0.02)
    return lit


def _second(model: nn.Module) -> nn.Module:
    """Return LITv2."""
    lit = convert_layers(model, PLAN_V2, without=("bias",))
    add_convolutions(lit)
    split_projections(lit)
    return lit
