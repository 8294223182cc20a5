"""Softmax attention within cross-shaped stripes of the token grid: columns in half of the heads, rows in the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..map_structure import Size, Windows
from .base import (
    AttentionOperator,
    Geometry,
    Heads,
    LayerShape,
    Sparse,
    Term,
    Traits,
    check_whole,
    without_prefix,
)
from .kernels import precise
from .local import DepthwiseConv, local_convolution
from .softmax import prefix_term, with_prefix

# Stripes of a grid. Shape suffixes: B batch, H heads, N tokens of the grid, S stripes, M tokens of a stripe, D width.


@dataclass(frozen=True)
class Stripes:
    """Stripes of `size` (rows, columns) that cut a grid; it is padded with zeros to whole ones, half on each side."""

    grid: Size
    size: Size

    @property
    def padded(self) -> Size:
        """Return the height and width of the grid in whole stripes."""
        return Windows(self.grid, self.size).padded

    @property
    def is_padded(self) -> bool:
        return self.padded != self.grid

    @property
    def pairs(self) -> int:
        """Return the number of pairs of a query and a key that meet, padding included."""
        return self.padded[0] * self.padded[1] * self.size[0] * self.size[1]

    def cut(self, x_BHND: Tensor) -> Tensor:
        """Return the tokens by stripe, (B·S, H, M, D)."""
        if self.is_padded:
            above, left = self._before()
            below, right = (self.padded[i] - self.grid[i] - before for i, before in ((0, above), (1, left)))
            x_BHND = F.pad(x_BHND.unflatten(2, self.grid), (0, 0, left, right, above, below)).flatten(2, 3)
        return Windows(self.padded, self.size).cut(x_BHND, None)

    def join(self, x: Tensor) -> Tensor:
        """Return stripes (B·S, H, M, D) as the tokens of the grid, (B, H, N, D), without padding."""
        x_BHND = Windows(self.padded, self.size).join(x)
        if not self.is_padded:
            return x_BHND
        (above, left), (height, width) = self._before(), self.grid
        x_BHhwD: Tensor = x_BHND.unflatten(2, self.padded)
        return x_BHhwD[:, :, above : above + height, left : left + width].flatten(2, 3)

    def _before(self) -> Size:
        return (self.padded[0] - self.grid[0]) // 2, (self.padded[1] - self.grid[1]) // 2


def cross(grid: Size, width: int) -> list[Stripes]:
    """Return the stripes of both halves of the heads: `width` columns of the whole height, and as many rows."""
    return [Stripes(grid, (grid[0], width)), Stripes(grid, (width, grid[1]))]


def stripe_softmax(heads: Heads, stripes: Sequence[Stripes]) -> Tensor:
    """Return softmax(s q·k) v within stripes, (B, H, n, D) for grid tokens; equal parts of the heads have one each.

    Padding is zeros after the projections, and is not masked: each of its keys has the weight exp(0) in the sum, and
    its values add nothing, as in the published dense backbone. Prefix tokens are keys of every stripe.
    """
    outs = []
    for cut, q, k, v in zip(stripes, *(_parts(x, len(stripes)) for x in heads.qkv()), strict=True):
        tokens = heads.tokens()
        out = F.scaled_dot_product_attention(
            cut.cut(without_prefix(q, tokens)),
            _with_prefix(cut, k, tokens),
            _with_prefix(cut, v, tokens),
            dropout_p=heads.dropout,
            scale=heads.scale,
        )
        outs.append(cut.join(out))
    return torch.cat(outs, 1) if len(outs) > 1 else outs[0]


def _parts(x_BHND: Tensor, count: int) -> Sequence[Tensor]:
    return x_BHND.tensor_split(count, 1)


def _with_prefix(cut: Stripes, x_BHND: Tensor, geometry: Geometry) -> Tensor:
    """Return the tokens by stripe, after the prefix tokens: (B·S, H, P + M, D)."""
    by_stripe = cut.cut(without_prefix(x_BHND, geometry))
    if not geometry.num_prefix:
        return by_stripe
    prefix = x_BHND[:, :, : geometry.num_prefix]
    count = (
        cut.padded[0] * cut.padded[1] // (cut.size[0] * cut.size[1])
    )  # not by len(), which fixes the batch
    return torch.cat([prefix.repeat_interleave(count, 0), by_stripe], 2)


class LePE(nn.Module):
    """Locally enhanced positional encoding: a depthwise 3 x 3 convolution of the values within each stripe."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.get_v = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, v_BHND: Tensor, stripes: Stripes) -> Tensor:
        """Return (B, H, N, D); neighbors across the border of a stripe count as zeros."""
        num_heads = v_BHND.shape[1]
        image = stripes.cut(v_BHND).transpose(2, 3).flatten(1, 2).unflatten(2, stripes.size)
        return stripes.join(self.get_v(image).flatten(2).unflatten(1, (num_heads, -1)).transpose(2, 3))


def stripe_positions(convolutions: Sequence[LePE], v_BHND: Tensor, stripes: Sequence[Stripes]) -> Tensor:
    """Return LePE of all heads, (B, H, N, D): each convolution has an equal part of them."""
    parts = zip(convolutions, _parts(v_BHND, len(convolutions)), stripes, strict=True)
    return torch.cat([lepe(v, cut) for lepe, v, cut in parts], 1)


# The operator: what a layer of CSwin does, for any layer with a grid.


class StripeAttention(AttentionOperator):
    """softmax(s q·k) within stripes: `width` columns for the first half of the heads, `width` rows for the others.

    Dong et al. 2022, arXiv 2107.00652. Added is LePE, a depthwise convolution of `local_size` x `local_size` with a
    bias over the values of each stripe, which starts at zero in a conversion; 0 means none. Stripes are at most as wide
    as the grid, which is padded as in `stripe_softmax`. Prefix tokens are keys of every stripe and attend to every
    token. 2 N w D multiply-adds for each row or column of a head, and one head has columns alone.

    Raises ConfigError: `width` is not a whole number above 0, or `local_size` is invalid.
    """

    def __init__(self, shape: LayerShape, width: int = 7, local_size: int = 3) -> None:
        super().__init__(shape)
        check_whole("width", width)
        self.width = width
        first = -(-shape.num_heads // 2)
        self.sizes = [size for size in (first, shape.num_heads - first) if size]
        shapes = [LayerShape(size, shape.head_dim, shape.geometry) for size in self.sizes]
        convs = [local_convolution(each, local_size, bias=True) for each in shapes]
        self.lepe = nn.ModuleList(conv for conv in convs if conv is not None)

    @property
    def traits(self) -> Traits:
        return Traits(
            row_stochastic=False, linear_cost=False, needs_grid=True, dropout=True
        )  # padding has weight

    def stripes(self, geometry: Geometry) -> list[Stripes]:
        """Return the stripes of both halves of the heads on a grid."""
        (height, width), size = geometry.grid, self.width
        columns, rows = Stripes((height, width), (height, min(size, width))), (min(size, height), width)
        return [columns, Stripes((height, width), rows)][: len(self.sizes)]

    def attend(self, heads: Heads) -> Tensor:
        return with_prefix(heads, stripe_softmax(heads, self.stripes(heads.tokens())))

    def local(self, heads: Heads) -> Tensor | None:
        if not len(self.lepe):
            return None
        tokens, outs = heads.tokens(), []
        cuts = zip(self.lepe, _parts(heads.values(), len(self.sizes)), self.stripes(tokens), strict=True)
        for conv, v, cut in cuts:
            by_stripe = conv(cut.cut(without_prefix(v, tokens)), Geometry(0, cut.size))
            outs.append(F.pad(cut.join(by_stripe), (0, 0, tokens.num_prefix, 0)))
        return torch.cat(outs, 1)

    def terms(self, heads: Heads) -> list[Term]:
        tokens = heads.tokens()
        q, k = heads.qk()
        found: list[Term] = [prefix_term(heads)]
        first, parts = 0, len(self.sizes)
        for cut, queries, keys in zip(self.stripes(tokens), _parts(q, parts), _parts(k, parts), strict=True):
            logits = heads.scale * precise(cut.cut(without_prefix(queries, tokens)))
            weights = (logits @ precise(_with_prefix(cut, keys, tokens)).transpose(2, 3)).softmax(-1)
            after = q.shape[1] - first - queries.shape[1]
            found.append(_sparse(cut.join(weights), cut, tokens, (first, after)))
            first += queries.shape[1]
        return found

    def start_fresh(self) -> None:
        for conv in self._convolutions():
            conv.start_fresh()

    def macs(self, geometry: Geometry) -> int:
        prefix = geometry.num_prefix
        total = prefix * geometry.num_tokens * self.shape.num_heads
        cuts = self.stripes(geometry)
        for size, cut in zip(self.sizes, cuts, strict=True):
            total += size * (cut.pairs + cut.padded[0] * cut.padded[1] * prefix)
        local = [
            conv.macs(Geometry(0, cut.padded)) for conv, cut in zip(self._convolutions(), cuts, strict=False)
        ]
        return 2 * total * self.shape.head_dim + sum(local)

    def _convolutions(self) -> list[DepthwiseConv]:
        return [conv for conv in self.lepe if isinstance(conv, DepthwiseConv)]


def _sparse(weights_BHnS: Tensor, cut: Stripes, geometry: Geometry, others: tuple[int, int]) -> Sparse:
    """Return the map of some heads as a term of all heads and tokens: `others` heads before and after have zeros."""
    numbers = torch.arange(1, geometry.num_patches + 1, device=weights_BHnS.device)
    keys = cut.cut(numbers[None, None, :, None])[..., 0]  # (S, 1, M), 0 at padding
    keys = cut.join(keys.unsqueeze(2).expand(-1, -1, keys.shape[2], -1))[0, 0]
    first = torch.arange(geometry.num_prefix, device=keys.device).expand(len(keys), -1)
    index = torch.cat([first, (keys - 1 + geometry.num_prefix).clamp_min(0)], 1)
    seen = torch.cat([torch.ones_like(first, dtype=torch.bool), keys > 0], 1)
    pad = (0, 0, geometry.num_prefix, 0, *others)
    return Sparse(F.pad(weights_BHnS * seen, pad), F.pad(index, (0, 0, geometry.num_prefix, 0)))


OPERATORS: dict[str, Callable[..., AttentionOperator]] = {"stripes": StripeAttention}
