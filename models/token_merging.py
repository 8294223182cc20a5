"""Deformable token merging (Pan et al. 2022, arXiv:2105.14217, section 3.3): a pyramid joins tokens that it chooses.

A convolution of 2 x 2 pixels with stride 2 reads each of its four taps t = 2 i + j at a learned offset from its place:

    Y[o, y, x] = b[o] + Σ_t Σ_c W[o, c, i, j] X[c](2 y + i + dy_t, 2 x + j + dx_t)

X[c](·) is bilinear, and zero outside of the image. The offsets are a second convolution of X with channels 2 t for dy_t
and 2 t + 1 for dx_t; they start at zero, so a new merge is an ordinary convolution. Batch norm and GELU follow. A side
of odd length loses its last row or column. Shape suffixes: B batch, C channels, H and W, and h and w after merging.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.extension import _has_ops
from torchvision.ops import deform_conv2d

from .attention.kernels import precise
from .errors import ConfigError

TAPS = ((0, 0), (0, 1), (1, 0), (1, 1))
"""Row i and column j of each tap, in the order of the offsets."""
HAS_OPERATOR = ("cpu", "cuda")
"""The devices for which torchvision has the operator."""


class PreciseConv2d(nn.Conv2d):
    """A convolution in the type of its input, whatever the type of its weights."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        weight, bias = (None if each is None else each.to(x_BCHW.dtype) for each in (self.weight, self.bias))
        assert weight is not None
        return self._conv_forward(x_BCHW, weight, bias)


class OffsetConv2d(PreciseConv2d):
    """The convolution that gives the offsets; it starts at zero."""

    def reset_parameters(self) -> None:
        """Set weights and biases to zero."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class DeformableConv2d(nn.Conv2d):
    """A convolution of 2 x 2 with stride 2 at learned offsets, computed in float32 or better."""

    def __init__(self, in_chans: int, out_chans: int) -> None:
        super().__init__(in_chans, out_chans, 2, 2)
        self.conv_offset = OffsetConv2d(in_chans, 2 * len(TAPS), 2, 2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return (B, C', h, w) in the type of the input. Half precision cannot hold a place between two pixels."""
        device = x_BCHW.device.type
        available = torch.amp.is_autocast_available(device)  # not on the meta device
        is_on = available and torch.is_autocast_enabled(
            device
        )  # an exported graph has no place for a context
        with torch.autocast(device, enabled=False) if is_on else nullcontext():
            x = precise(x_BCHW)
            weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
            out = convolve_at(x, self.conv_offset(x), weight, bias)
        return out.to(x_BCHW.dtype)


class TokenMerging(nn.Module):
    """Deformable convolution, batch norm and GELU: (B, C, H, W) to (B, h, w, C'), as PVT's embeddings of patches.

    Raises ConfigError: it trains on a single token, which has no deviation for the batch norm.
    """

    patch_size = (2, 2)

    def __init__(self, in_chans: int, out_chans: int) -> None:
        nn.Module.__init__(self)
        self.dconv = DeformableConv2d(in_chans, out_chans)
        self.norm_layer = nn.BatchNorm2d(out_chans)
        self.act = nn.GELU()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        merged_BCHW = self.dconv(x_BCHW)
        if self.training and merged_BCHW.numel() == merged_BCHW.shape[1]:
            raise ConfigError(
                "the batch norm of a deformable merge needs two tokens or more to train on, and a batch of one image "
                "leaves it one token: give data.batch_size=2 or more, or larger images (student.img_size)"
            )
        out: Tensor = self.act(self.norm_layer(merged_BCHW))
        return out.permute(0, 2, 3, 1)


def convolve_at(x_BCHW: Tensor, offsets_BThw: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the convolution of the module's equation, (B, C', h, w), by torchvision's operator.

    Where torchvision has none, and in a graph that is exported, it is computed by `convolve_samples`.
    """
    exporting = torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()
    known = _has_ops() and x_BCHW.device.type in (*HAS_OPERATOR, "meta")
    if exporting or not known:
        return convolve_samples(x_BCHW, offsets_BThw, weight, bias)
    return deform_conv2d(x_BCHW, offsets_BThw, weight, bias, stride=(2, 2))


def convolve_samples(x_BCHW: Tensor, offsets_BThw: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the same by torch alone: sample every tap, then multiply by the weights."""
    height, width = x_BCHW.shape[2:]
    places = tap_places(offsets_BThw)
    rows, columns = (2 * places[:, :, 0] + 1) / height - 1, (2 * places[:, :, 1] + 1) / width - 1
    grid_B4hw2 = torch.stack((columns, rows), -1).flatten(1, 2)  # the taps of a merge lie below each other
    samples = F.grid_sample(x_BCHW, grid_B4hw2, mode="bilinear", padding_mode="zeros", align_corners=False)
    taps_BC4hw = samples.unflatten(2, (len(TAPS), -1))
    out = torch.einsum("bcthw,oct->bohw", taps_BC4hw, weight.flatten(2))
    return out if bias is None else out + bias[:, None, None]


def tap_places(offsets_BThw: Tensor) -> Tensor:
    """Return the row and column of the input, in pixels, that each tap reads: (B, 4, 2, h, w)."""
    rows, columns = (torch.arange(size).to(offsets_BThw) for size in offsets_BThw.shape[2:])
    start_2hw = torch.stack(torch.meshgrid(2 * rows, 2 * columns, indexing="ij"))
    taps_42 = torch.tensor(TAPS).to(offsets_BThw)
    return start_2hw + taps_42[:, :, None, None] + offsets_BThw.unflatten(1, (len(TAPS), 2))
