"""Which keys each query of an attention layer sees: what two maps must share to be compared or copied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]


@dataclass(frozen=True)
class MapStructure:
    """How the maps of a layer lie on its grid. Layers of equal structure and grid have maps of the same tokens."""

    window: Size | None = None
    """The rows and columns of the windows within which tokens meet; None where all tokens meet."""
    shift: Size = (0, 0)
    spread: bool = False
    """The tokens of a window are as far apart as they can be: a window is a grid over the whole."""
    reduction: tuple[str, Size] | None = None
    """How the keys are made of the tokens: ("stride", rows and columns of a key's tokens), or ("pool", rows and columns
    of the keys); None where every token is a key."""
    stripes: int = 0
    """Width of the stripes within which tokens meet, columns in half of the heads and rows in the others. 0: no
    stripes."""
    padded: bool = False
    """Whether stripes are padded with keys of zeros that no token has."""
    mixed: bool = False
    """Whether heads are mixed before and after the softmax, so that no head has a map of its queries and keys."""

    @property
    def is_whole(self) -> bool:
        """Whether every token attends to every token, as in a plain vision transformer."""
        return self.window is None and self.reduction is None and not self.stripes

    @property
    def brief(self) -> str:
        """Say in a few words what a token attends to."""
        if self.window is not None:
            kind = "grids" if self.spread else "shifted windows" if any(self.shift) else "windows"
            return f"{_words(self.window)} {kind}"
        if self.stripes:
            return f"stripes of {self.stripes}"
        if self.reduction is None:
            return "all with mixed heads" if self.mixed else "all"
        kind, size = self.reduction
        return f"keys of {_words(size)}" if kind == "stride" else f"{_words(size)} pooled"

    def __str__(self) -> str:
        if self.window is not None:
            if self.spread:
                return f"within grids of {_words(self.window)} tokens, spread over the whole"
            shifted = f" shifted by {_words(self.shift)}" if any(self.shift) else ""
            return f"within windows of {_words(self.window)} tokens{shifted}"
        if self.stripes:
            return f"within {'padded ' * self.padded}stripes {self.stripes} tokens wide"
        if self.reduction is None:
            return f"of all tokens to all tokens{', mixed between heads' * self.mixed}"
        kind, size = self.reduction
        return (
            f"to keys of {_words(size)} tokens each" if kind == "stride" else f"to {_words(size)} pooled keys"
        )


def _words(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


# Windows of a token grid, shifted cyclically.
#
# Shape suffixes: B batch, H heads, N tokens of the grid, W windows, M tokens of a window, D head width.


@dataclass(frozen=True)
class Windows:
    """Windows over a grid. The grid is shifted, then padded below and on the right to whole windows, as timm does.

    With `spread` a window has not neighbors, but every n-th token down and across, as MaxViT's grids.
    """

    grid: Size
    window: Size
    shift: Size = (0, 0)
    spread: bool = False

    @property
    def padded(self) -> Size:
        """Return the height and width of the grid in whole windows."""
        (height, width), (rows, columns) = self.grid, self.window
        return -(-height // rows) * rows, -(-width // columns) * columns

    @property
    def is_padded(self) -> bool:
        return self.padded != self.grid

    def cut(self, x_BHND: Tensor, pad_1H1D: Tensor | None) -> Tensor:
        """Return the tokens by window, (B·W, H, M, D); `pad_1H1D` is the value of a padded token, if there are any."""
        x: Tensor = x_BHND.unflatten(2, self.grid)
        if any(self.shift):
            x = x.roll((-self.shift[0], -self.shift[1]), (2, 3))
        if self.is_padded:
            assert pad_1H1D is not None
            x = self._pad(x, pad_1H1D.unsqueeze(2))
        (height, width), (rows, columns) = self.padded, self.window
        if self.spread:
            cut: Tensor = x.unflatten(3, (columns, width // columns)).unflatten(2, (rows, height // rows))
            return cut.permute(0, 3, 5, 1, 2, 4, 6).flatten(4, 5).flatten(0, 2)
        cut = x.unflatten(3, (width // columns, columns)).unflatten(2, (height // rows, rows))
        return cut.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(0, 2)

    def join(self, x: Tensor) -> Tensor:
        """Return windows (B·W, H, M, D) as the tokens of the grid, (B, H, N, D), without padded tokens."""
        (height, width), (rows, columns) = self.padded, self.window
        x = x.unflatten(2, self.window).unflatten(0, (-1, height // rows, width // columns))
        order = (0, 3, 4, 1, 5, 2, 6) if self.spread else (0, 3, 1, 4, 2, 5, 6)
        x = x.permute(order).flatten(4, 5).flatten(2, 3)
        if self.is_padded:
            x = x[:, :, : self.grid[0], : self.grid[1]]
        if any(self.shift):
            x = x.roll(self.shift, (2, 3))
        return x.flatten(2, 3)

    def _pad(self, x: Tensor, pad: Tensor) -> Tensor:
        batch, heads, height, width, channels = x.shape
        below, right = self.padded[0] - height, self.padded[1] - width
        if right:
            x = torch.cat([x, pad.expand(batch, heads, height, right, channels).to(x.dtype)], 3)
        if below:
            x = torch.cat([x, pad.expand(batch, heads, below, width + right, channels).to(x.dtype)], 2)
        return x


# Positions of a grid, and the table of relative positions of a window, resampled for another one.


def resample_plainly(
    position_1ND: Tensor, new: Size, old: Size, num_prefix: int, mode: Literal["bicubic", "bilinear"]
) -> Tensor:
    """Return embeddings (1, num_prefix + H W, D) of the grid `old` on the grid `new`, without antialiasing.

    Prefix tokens stay. Computed in float32 or better, and returned in the dtype given.
    """
    prefix_1PD, patches_1ND = position_1ND[:, :num_prefix], position_1ND[:, num_prefix:]
    precise = patches_1ND.to(torch.promote_types(patches_1ND.dtype, torch.float32))
    grid_1DHW = precise.transpose(1, 2).unflatten(2, old)
    resized_1DHW = F.interpolate(grid_1DHW, size=new, mode=mode, align_corners=False)
    resized_1ND = resized_1DHW.flatten(2).transpose(1, 2).to(position_1ND.dtype)
    return torch.cat([prefix_1PD, resized_1ND], dim=1)


def resample_table(table_RH: Tensor, old: Size, new: Size) -> Tensor:
    """Return a table of relative positions, one row for each of the `offsets` of a window, for other offsets."""
    return resample_plainly(table_RH[None], new, old, 0, "bicubic")[0]


def offsets(window: Size) -> Size:
    """Return the rows and columns of a table of relative positions: 2 h - 1 and 2 w - 1."""
    return 2 * window[0] - 1, 2 * window[1] - 1
