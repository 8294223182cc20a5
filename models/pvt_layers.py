"""The parts of PVT (Wang et al. 2021, arXiv:2102.12122): patch embeddings, blocks and stages.

Attention layers are those of timm's PVTv2. Shape suffixes: B batch, C channels, H and W the grid, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, Mlp, resample_abs_pos_embed
from timm.models import checkpoint
from timm.models.pvt_v2 import Attention
from torch import Tensor, nn

Size = tuple[int, int]
EPSILON = 1e-6
"""Of the norms in and after the blocks; those of patch embeddings have torch's own, 1e-5."""


class PatchEmbedding(nn.Module):
    """Join patches that do not overlap by a convolution, then normalize: (B, C, H, W) to (B, h, w, C')."""

    img_size: Size | None = None
    """The size of the images, of the first embedding of a model."""
    strict_img_size = False

    def __init__(self, in_chans: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.proj = nn.Conv2d(in_chans, width, patch_size, patch_size)
        self.norm = nn.LayerNorm(width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.norm(self.proj(x_BCHW).permute(0, 2, 3, 1))
        return out


class PVTBlock(nn.Module):
    """Attention with reduced keys and values, then an MLP; both after a norm and beside a residual path."""

    def __init__(
        self, width: int, num_heads: int, sr_ratio: int, mlp_ratio: float, drop_path: float, **more: Any
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, EPSILON)
        self.attn = Attention(width, num_heads, sr_ratio, **more)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(width, EPSILON)
        self.mlp = Mlp(width, int(width * mlp_ratio), drop=more.get("proj_drop", 0.0))
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x_BNC: Tensor, grid: Size) -> Tensor:
        x_BNC = x_BNC + self.drop_path1(self.attn(self.norm1(x_BNC), grid))
        out: Tensor = x_BNC + self.drop_path2(self.mlp(self.norm2(x_BNC)))
        return out


class PVTStage(nn.Module):
    """A patch embedding (none in the first stage), learned positions, and blocks."""

    grad_checkpointing = False

    def __init__(
        self,
        embedding: nn.Module | None,
        blocks: Sequence[nn.Module],
        grid: Size,
        width: int,
        has_class: bool,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.downsample = embedding
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if has_class else None
        self.pos_embed = nn.Parameter(torch.zeros(1, has_class + grid[0] * grid[1], width))
        self.pos_drop = nn.Dropout(0.0)
        self.blocks = nn.ModuleList(blocks)

    @property
    def num_prefix(self) -> int:
        """Return the number of tokens before the grid: 1 with a class token, else 0."""
        return 0 if self.cls_token is None else 1

    def positions(self, grid: Size) -> Tensor:
        """Return the learned positions (1, N, C), resampled for another grid than the stage's own."""
        if grid == self.grid:
            return self.pos_embed
        found: Tensor = resample_abs_pos_embed(
            self.pos_embed, list(grid), list(self.grid), num_prefix_tokens=self.num_prefix
        )
        return found

    def set_grid(self, grid: Size) -> None:
        """Resample the learned positions for good."""
        self.pos_embed = nn.Parameter(self.positions(grid).detach())
        self.grid = grid

    def forward(self, x: Tensor) -> tuple[Tensor, Size]:
        """Return the tokens (B, N, C) and their grid, from (B, C, H, W), or (B, H, W, C) in the first stage."""
        x_BHWC = x if self.downsample is None else self.downsample(x)
        grid = (x_BHWC.shape[1], x_BHWC.shape[2])
        x_BNC = x_BHWC.flatten(1, 2)
        if self.cls_token is not None:
            x_BNC = torch.cat([self.cls_token.expand(x_BNC.shape[0], -1, -1).to(x_BNC.dtype), x_BNC], 1)
        x_BNC = self.pos_drop(x_BNC + self.positions(grid))
        for block in self.blocks:
            x_BNC = checkpoint(block, x_BNC, grid) if self.grad_checkpointing else block(x_BNC, grid)
        return x_BNC, grid

    def as_map(self, x_BNC: Tensor, grid: Size) -> Tensor:
        """Return the tokens of the grid as (B, C, H, W)."""
        x_BnC = x_BNC[:, self.num_prefix :] if self.num_prefix else x_BNC
        x_BChw: Tensor = x_BnC.transpose(1, 2).unflatten(2, grid)
        return x_BChw
