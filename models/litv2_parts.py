"""What LITv2 (arXiv:2205.13213) has beside HiLo: convolutions in its MLPs, and two output projections a layer."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import Tensor, nn

from .attention.hilo import HiLoAttention
from .converted import converted_layers
from .families import sites
from .shifted_windows import WholeGridBlock, as_kind


class ConvBlock(WholeGridBlock):
    """A block of Swin whose MLP has a depthwise convolution of 3 x 3 over the grid before its activation."""

    def forward(self, x_BHWC: Tensor) -> Tensor:
        batch, height, width, channels = x_BHWC.shape
        x_BHWC = x_BHWC + self.drop_path1(self._attn(self.norm1(x_BHWC)))
        tokens = self.mlp(self.norm2(x_BHWC).reshape(batch, -1, channels), (height, width))
        out: Tensor = x_BHWC + self.drop_path2(tokens).reshape(x_BHWC.shape)
        return out


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
