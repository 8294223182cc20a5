"""HiLo attention (Pan et al. 2022, arXiv:2205.13213, section 3.2): some heads see windows, the others pooled tokens.

Of H heads, ⌊α H⌋ are low: their queries see the means of the keys and values of each window of w x w tokens. The others
are high, and see the tokens of their own window. Means of projections are projections of means, so this is the paper's
pooling before the projection. High heads come first. At the border, windows have the tokens that are left, so nothing
is padded or masked. Shape suffixes: B batch, H heads, N tokens, n grid tokens, P prefix tokens, W windows, M tokens of
a window, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from .base import (
    AttentionOperator,
    Geometry,
    Heads,
    LayerShape,
    LowRank,
    Sparse,
    Term,
    Traits,
    check_whole,
    without_prefix,
)
from .kernels import precise
from .softmax import prefix_term, with_prefix


@dataclass(frozen=True)
class Region:
    """A rectangle of the grid that whole windows of one size fill."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    window: tuple[int, int]

    @property
    def num_tokens(self) -> int:
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])

    def cut(self, x_BHyxD: Tensor) -> Tensor:
        """Return the tokens of the region by window, (B, W, H, M, D)."""
        (rows, columns), part = self.window, x_BHyxD[:, :, slice(*self.rows), slice(*self.columns)]
        cut: Tensor = part.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))
        return cut.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(1, 2)

    def join(self, x_BWHMD: Tensor) -> Tensor:
        """Return windows as the rectangle (B, H, y, x, D)."""
        across = (self.columns[1] - self.columns[0]) // self.window[1]
        x: Tensor = x_BWHMD.unflatten(3, self.window).unflatten(1, (-1, across))
        return x.permute(0, 3, 1, 4, 2, 5, 6).flatten(4, 5).flatten(2, 3)


def regions(grid: tuple[int, int], window: int) -> list[list[Region]]:
    """Cut a grid into at most two rows of at most two regions: whole windows, and what is left at the border."""
    rows, columns = (list(_spans(side, window)) for side in grid)
    return [
        [Region((top, end), (left, right), (tall, wide)) for left, right, wide in columns]
        for top, end, tall in rows
    ]


class HiLoAttention(AttentionOperator):
    """softmax(s q·k) over the query's window in high heads, over the means of all windows in ⌊`alpha` H⌋ low heads.

    With `window` 1 every head is low, and this is softmax attention. Prefix tokens are keys of every query, and attend
    to every token. Multiply-adds per head: 2 n (P + w²) D in a high one; 2 n (P + n / w²) D in a low one, quadratic in
    the tokens for a fixed window, and linear for a fixed number of windows.

    Raises ConfigError: `alpha` is not between 0 and 1, or `window` is no whole number above 0.
    """

    def __init__(self, shape: LayerShape, alpha: float = 0.9, window: int = 2) -> None:
        super().__init__(shape)
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
            raise ConfigError(f"plan: alpha={alpha}; give the part of low heads, a number from 0 to 1")
        check_whole("window", window)
        self.window = window
        low = shape.num_heads if window == 1 else int(shape.num_heads * alpha)
        self.num_high = shape.num_heads - low

    @property
    def traits(self) -> Traits:
        return Traits(linear_cost=self.num_high == self.shape.num_heads, needs_grid=True, dropout=True)

    def attend(self, heads: Heads) -> Tensor:
        parts = [self._high(heads)] if self.num_high else []
        if self.num_high < self.shape.num_heads:
            parts.append(self._low(heads))
        return with_prefix(heads, parts[0] if len(parts) == 1 else torch.cat(parts, 1))

    def terms(self, heads: Heads) -> list[Term]:
        geometry = heads.tokens()
        prefix, head = geometry.num_prefix, (0, 0, geometry.num_prefix, 0)
        q, k = (precise(x) for x in heads.qk())
        q_grid = heads.scale * q[:, :, prefix:]
        is_high = (torch.arange(q.shape[1], device=q.device) < self.num_high)[:, None, None].to(q.dtype)
        terms: list[Term] = [prefix_term(heads)]
        if self.num_high:
            near, sees = own_window(geometry, self.window, q.device)
            logits = torch.einsum("bhnd,bhnsd->bhns", q_grid, k[:, :, near]).masked_fill(~sees, -torch.inf)
            terms.append(Sparse(F.pad(logits.softmax(-1) * is_high, head), F.pad(near, head)))
        if self.num_high < self.shape.num_heads:
            means = self._means(geometry, q)
            left = F.pad((q_grid @ (means.T @ k).transpose(2, 3)).softmax(-1), head)
            terms.append(LowRank(left * (1 - is_high), means.expand(*left.shape[:2], -1, -1)))
        return terms

    def macs(self, geometry: Geometry) -> int:
        prefix, patches = geometry.num_prefix, geometry.num_patches
        parts = [region for row in regions(geometry.grid, self.window) for region in row]
        windows = sum(each.num_tokens // (each.window[0] * each.window[1]) for each in parts)
        high = sum(each.num_tokens * (prefix + each.window[0] * each.window[1]) for each in parts)
        low = patches * (prefix + windows)
        exact = prefix * geometry.num_tokens * self.shape.num_heads
        num_low = self.shape.num_heads - self.num_high
        return 2 * self.shape.head_dim * (exact + self.num_high * high + num_low * low)

    def _high(self, heads: Heads) -> Tensor:
        """Return the output of the grid tokens in the high heads, (B, H, n, D)."""
        geometry = heads.tokens()
        q, k, v = (x[:, : self.num_high] for x in heads.qkv())
        grids = [without_prefix(x, geometry).unflatten(2, geometry.grid) for x in (q, k, v)]
        prefixes = [x[:, :, : geometry.num_prefix].unsqueeze(1) for x in (k, v)]
        bands = []
        for row in regions(geometry.grid, self.window):
            band = [region.join(_windowed(region, grids, prefixes, heads)) for region in row]
            bands.append(band[0] if len(band) == 1 else torch.cat(band, 3))
        out: Tensor = bands[0] if len(bands) == 1 else torch.cat(bands, 2)
        return out.flatten(2, 3)

    def _low(self, heads: Heads) -> Tensor:
        """Return the output of the grid tokens in the low heads, (B, H, n, D)."""
        geometry = heads.tokens()
        q, k, v = (x[:, self.num_high :] for x in heads.qkv())
        k, v = (self._with_means(x, geometry) for x in (k, v))
        return F.scaled_dot_product_attention(
            without_prefix(q, geometry), k, v, dropout_p=heads.dropout, scale=heads.scale
        )

    def _with_means(self, x_BHND: Tensor, geometry: Geometry) -> Tensor:
        """Return the prefix tokens, then the means of the windows."""
        if self.window == 1:
            return x_BHND
        images = without_prefix(x_BHND, geometry).transpose(2, 3).unflatten(3, geometry.grid)
        means: Tensor = F.avg_pool2d(
            images.flatten(1, 2), self.window, ceil_mode=True, count_include_pad=False
        ).unflatten(1, x_BHND.shape[1:2] + x_BHND.shape[3:])
        pooled = means.flatten(3).transpose(2, 3)
        return torch.cat((x_BHND[:, :, : geometry.num_prefix], pooled), 2) if geometry.num_prefix else pooled

    def _means(self, geometry: Geometry, like: Tensor) -> Tensor:
        """Return (N, P + W): the weight of each token in each key of a low head."""
        axes = []
        for side in geometry.grid:
            window = torch.arange(side, device=like.device) // self.window
            members = F.one_hot(window, -(-side // self.window)).to(like.dtype)
            axes.append(members / members.sum(0))
        return torch.block_diag(torch.eye(geometry.num_prefix).to(like), torch.kron(*axes))


def own_window(geometry: Geometry, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the prefix tokens and the tokens of each grid token's window, (n, P + w²), and which of them exist."""
    places, exist = [], []
    for side in geometry.grid:
        place = torch.arange(side, device=device)[:, None] // window * window + torch.arange(
            window, device=device
        )
        places.append(place.clamp(max=side - 1))
        exist.append(place < side)
    (rows, columns), prefix = places, geometry.num_prefix
    near = prefix + rows[:, None, :, None] * geometry.grid[1] + columns[None, :, None, :]
    sees = exist[0][:, None, :, None] & exist[1][None, :, None, :]
    first = torch.arange(prefix, device=device).expand(geometry.num_patches, -1)
    near, sees = (x.flatten(2).flatten(0, 1) for x in (near, sees))
    return torch.cat((first, near), 1), F.pad(sees, (prefix, 0), value=True)


def _windowed(region: Region, grids: list[Tensor], prefixes: list[Tensor], heads: Heads) -> Tensor:
    """Return softmax attention within the windows of a region, (B, W, H, M, D)."""
    q, k, v = (region.cut(grid) for grid in grids)
    if prefixes[0].shape[3]:
        first = (prefix.expand(-1, q.shape[1], -1, -1, -1) for prefix in prefixes)
        k, v = (torch.cat(pair, 3) for pair in zip(first, (k, v), strict=True))
    shape = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # the fused kernels take four dimensions
    out: Tensor = F.scaled_dot_product_attention(q, k, v, dropout_p=heads.dropout, scale=heads.scale)
    return out.unflatten(0, shape)


def _spans(side: int, window: int) -> Iterator[tuple[int, int, int]]:
    """Yield start, end and window of the whole windows of an axis, then of what is left."""
    whole = side - side % window
    if whole:
        yield 0, whole, window
    if whole < side:
        yield whole, side, side - whole


OPERATORS = {"hilo": HiLoAttention}
