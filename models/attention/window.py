"""Local softmax attention: windows, dilated windows and neighborhoods of the token grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .base import AttentionOperator, Geometry, Heads, LayerShape, Term, Traits, check_whole, without_prefix
from .kernels import empty_by_token
from .pooling import can_form_maps, few, form_map, logits_gradient, scaled_bmm
from .softmax import prefix_term, with_prefix
from .tiles import Cutter, Table, blocks, neighbors, sparse_term, tile_logits, tile_table, tiled_softmax

# Windows of a grid as rectangles: those of one size are a view of the grid, so nothing is indexed, padded or masked.
#
# Windows of nearly equal size have at most two sizes along an axis, times the dilation. Their maps are small, and are
# formed as in `small_maps`, for the windows of one size of some images at a time.
#
# Shape suffixes: B batch, H heads, N tokens, P prefix tokens, D head width, M tokens of a window, S its keys:
# the prefix tokens, then its own, Z maps.

CACHED = 2**18
"""The number of elements of the queries of one piece."""


class Span(NamedTuple):
    """Windows of one size along an axis: adjacent ones, of one residue class or of all."""

    start: int
    step: int
    """How far the tokens of a window are apart."""
    windows: int
    size: int
    classes: int
    """1 or `step`."""

    def parts(self, most: int) -> Iterator[Span]:
        """Cut into spans of at most `most` windows of a class."""
        for first in range(0, self.windows, most):
            start = self.start + first * self.size * self.step
            yield self._replace(start=start, windows=min(most, self.windows - first))


def spans(length: int, window: int, dilation: int) -> Iterator[Span]:
    """Cut an axis as `tiles.blocks` does: each residue class into windows of nearly equal size."""
    equal = length % dilation == 0
    for phase in range(1 if equal else min(dilation, length)):
        tokens = len(range(phase, length, dilation))
        windows = -(-tokens // window)
        size, larger = divmod(tokens, windows)
        classes = dilation if equal else 1
        if larger:
            yield Span(phase, dilation, larger, size + 1, classes)
        start = phase + larger * (size + 1) * dilation
        yield Span(start, dilation, windows - larger, size, classes)


class Piece(NamedTuple):
    """The windows of some images whose sizes are those of two spans."""

    first_image: int
    images: int
    rows: Span
    columns: Span

    def of(self, x_BHND: Tensor, geometry: Geometry) -> Tensor:
        """Return a view by window: B, four dimensions of windows, H, rows and columns of a window, D."""
        _, heads, _, width = x_BHND.shape
        image, head, column, channel = x_BHND.stride()
        row, rows, columns = column * geometry.grid[1], self.rows, self.columns
        first = self.first_image * image + rows.start * row + (geometry.num_prefix + columns.start) * column
        windows = (rows.windows, rows.classes, columns.windows, columns.classes)
        apart = (rows.size * rows.step * row, row, columns.size * columns.step * column, column)
        return x_BHND.as_strided(
            (self.images, *windows, heads, rows.size, columns.size, width),
            (image, *apart, head, rows.step * row, columns.step * column, channel),
            x_BHND.storage_offset() + first,
        )

    def prefix(self, x_BHND: Tensor, geometry: Geometry) -> Tensor:
        """Return a view of the prefix tokens, (B, H, P, D)."""
        images = slice(self.first_image, self.first_image + self.images)
        return x_BHND[images, :, : geometry.num_prefix]

    def queries(self, x_BHND: Tensor, geometry: Geometry) -> Tensor:
        """Return a copy of the tokens by window, (Z, M, D)."""
        return self.of(x_BHND, geometry).reshape(-1, self.rows.size * self.columns.size, x_BHND.shape[3])

    def keys(self, x_BHND: Tensor, geometry: Geometry) -> Tensor:
        """Return a copy of the prefix tokens and the tokens of each window, (Z, S, D)."""
        tokens_ZMD = self.queries(x_BHND, geometry)
        if not geometry.num_prefix:
            return tokens_ZMD
        first_BHPD = self.prefix(x_BHND, geometry)
        by_image = tokens_ZMD.view(len(first_BHPD), -1, x_BHND.shape[1], *tokens_ZMD.shape[1:])
        first = first_BHPD[:, None].expand(-1, by_image.shape[1], -1, -1, -1)
        return torch.cat((first, by_image), 3).flatten(0, 2)

    def write_queries(self, values_ZMD: Tensor, x_BHND: Tensor, geometry: Geometry) -> None:
        """Write the tokens of each window into `x`."""
        place = self.of(x_BHND, geometry)
        place.copy_(values_ZMD.view(place.shape))

    def write_keys(self, values_ZSD: Tensor, x_BHND: Tensor, geometry: Geometry) -> None:
        """Write the tokens of each window into `x`, and add those of the prefix tokens."""
        prefix = geometry.num_prefix
        if not prefix:
            self.write_queries(values_ZSD, x_BHND, geometry)
            return
        first_BHPD = self.prefix(x_BHND, geometry)
        by_image = values_ZSD.view(len(first_BHPD), -1, x_BHND.shape[1], *values_ZSD.shape[1:])
        first_BHPD += by_image[..., :prefix, :].sum(1)
        place = self.of(x_BHND, geometry)
        place.copy_(by_image[..., prefix:, :].reshape(place.shape))


def pieces(shape: torch.Size, geometry: Geometry, window: int, dilation: int) -> Iterator[Piece]:
    """Cut the windows of (B, H, N, D) into pieces that stay in the cache of a CPU."""
    batch, heads, _, width = shape
    rows, columns = (list(spans(side, window, dilation)) for side in geometry.grid)
    for down, across in product(rows, columns):
        row_elements = (
            down.size * down.classes * across.windows * across.size * across.classes * heads * width
        )
        for part in down.parts(max(1, CACHED // row_elements)):
            most = max(1, CACHED // (row_elements * part.windows))
            for image in range(0, batch, most):
                yield Piece(image, min(most, batch - image), part, across)


def can_take_windows(q: Tensor, k: Tensor, v: Tensor, window: int, num_prefix: int) -> bool:
    """Return whether the maps of windows can be formed, and are small."""
    return few(window**2, window**2 + num_prefix, q.shape[3]) and can_form_maps(q, k, v)


def windowed_softmax(
    q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, window: int, dilation: int, scale: float
) -> Tensor:
    """Return softmax attention of the grid tokens over the prefix tokens and their window, (B, H, n, D)."""
    return _WindowedSoftmax.apply(q, k, v, geometry, window, dilation, scale)


class _WindowedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        geometry: Geometry,
        window: int,
        dilation: int,
        scale: float,
    ) -> Tensor:
        ctx.geometry, ctx.scale = geometry, scale
        ctx.pieces, maps = list(pieces(q.shape, geometry, window, dilation)), []
        out = empty_by_token(without_prefix(v, geometry))
        for piece in ctx.pieces:
            weights = form_map(piece.queries(q, geometry), piece.keys(k, geometry), scale)
            piece.write_queries(torch.bmm(weights, piece.keys(v, geometry)), out, _alone(geometry))
            if any(ctx.needs_input_grad):
                maps.append(weights)
        ctx.save_for_backward(q, k, v, *maps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *maps = ctx.saved_tensors
        geometry, grads = ctx.geometry, [empty_by_token(x) for x in (q, k, v)]
        for each in grads:
            each[:, :, : geometry.num_prefix] = 0
        dq, dk, dv = grads
        for piece, weights in zip(ctx.pieces, maps, strict=True):
            grad = piece.queries(grad_out, _alone(geometry))
            piece.write_keys(torch.bmm(weights.mT, grad), dv, geometry)
            grad_logits = logits_gradient(weights, grad, piece.keys(v, geometry))
            piece.write_queries(scaled_bmm(grad_logits, piece.keys(k, geometry), ctx.scale), dq, geometry)
            piece.write_keys(scaled_bmm(grad_logits.mT, piece.queries(q, geometry), ctx.scale), dk, geometry)
        return dq, dk, dv, None, None, None, None


def _alone(geometry: Geometry) -> Geometry:
    """Return the grid without prefix tokens."""
    return Geometry(0, geometry.grid)


PARTS = ("queries", "keys", "sees", "place")


class TileTables(torch.nn.Module):
    """The table of the layer's own grid, on its device. Tables of other grids are made on demand."""

    def __init__(self, cutter: Cutter, geometry: Geometry, window: int, dilation: int) -> None:
        super().__init__()
        check_whole("window", window)
        check_whole("dilation", dilation)
        self.cutter, self.window, self.dilation = cutter, window, dilation
        self.fit(geometry)

    def fit(self, geometry: Geometry) -> None:
        """Make the table of this grid."""
        self.geometry = geometry
        table = tile_table(self.cutter, geometry, self.window, self.dilation)
        device = next((buffer.device for buffer in self.buffers()), None)
        for name, tensor in zip(PARTS, table, strict=True):
            self.register_buffer(name, tensor.to(device), persistent=False)
        self.masked = not bool(table[2].all())

    def forward(self, geometry: Geometry, device: torch.device) -> tuple[Table, bool]:
        """Return the table on this device, and whether some query does not see every key of its tile."""
        own: Table = (self.queries, self.keys, self.sees, self.place)  # type: ignore[assignment]
        same = geometry.grid == self.geometry.grid and geometry.num_prefix == self.geometry.num_prefix
        if same and own[0].device == device:
            return own, self.masked
        return self._other(geometry, device), True

    @torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]
    def _other(self, geometry: Geometry, device: torch.device) -> Table:
        table = tile_table(self.cutter, geometry, self.window, self.dilation)
        return tuple(part.to(device) for part in table)  # type: ignore[return-value]

    def attend(self, heads: Heads) -> Tensor:
        """Return softmax attention of the grid tokens over the keys of their tiles, (B, H, n, D)."""
        q, k, v = heads.qkv()
        geometry = heads.tokens()
        rectangles = self.cutter is blocks and heads.dropout == 0
        if rectangles and can_take_windows(q, k, v, self.window, geometry.num_prefix):
            return windowed_softmax(q, k, v, geometry, self.window, self.dilation, heads.scale)
        table, masked = self(geometry, q.device)
        return tiled_softmax(q, k, v, table, scale=heads.scale, dropout=heads.dropout, masked=masked)

    def products(self, geometry: Geometry) -> int:
        """Return the number of computed pairs of query and key. Only windows are without padding of smaller tiles."""
        if self.cutter is blocks:
            rows, columns = (
                sum(
                    each.classes * each.windows * each.size**2
                    for each in spans(side, self.window, self.dilation)
                )
                for side in geometry.grid
            )
            return rows * columns + geometry.num_patches * geometry.num_prefix
        queries, keys, _, _ = tile_table(self.cutter, geometry, self.window, self.dilation)
        return queries.numel() * keys.shape[1]


class WindowAttention(AttentionOperator):
    """softmax(s q·k) over the keys of the query's window: windows of at most `window` × `window` tokens.

    The grid is cut into windows of nearly equal size (Liu et al. 2021, arXiv 2103.14030, without shifts and bias).
    With a `dilation` r, a window has tokens with equal row and column modulo r (the atrous attention of Ibtehaz et al.
    2024, arXiv 2403.04200). Prefix tokens are keys of every window and attend to every token. With a window as large
    as the grid this is softmax attention. 2 N w² D multiply-adds per head.

    Raises ConfigError: window or dilation is not a whole number above 0.
    """

    cutter = staticmethod(blocks)

    def __init__(self, shape: LayerShape, window: int = 7, dilation: int = 1) -> None:
        super().__init__(shape)
        self.tables = TileTables(self.cutter, shape.geometry, window, dilation)

    @property
    def traits(self) -> Traits:
        return Traits(needs_grid=True, dropout=True)

    def attend(self, heads: Heads) -> Tensor:
        return with_prefix(heads, self.tables.attend(heads))

    def terms(self, heads: Heads) -> list[Term]:
        q, k = heads.qk()
        table, _ = self.tables(heads.tokens(), q.device)
        weights = tile_logits(q, k, table, heads.scale).softmax(-1)
        return [prefix_term(heads), sparse_term(weights, table, heads.tokens().num_prefix)]

    def macs(self, geometry: Geometry) -> int:
        pairs = geometry.num_prefix * geometry.num_tokens + self.tables.products(geometry)
        return 2 * pairs * self.shape.head_dim * self.shape.num_heads

    def resample(self, geometry: Geometry) -> None:
        super().resample(geometry)
        self.tables.fit(geometry)


class NeighborhoodAttention(WindowAttention):
    """softmax(s q·k) over `window` × `window` keys around the query, `dilation` tokens apart.

    At the border the window moves inwards, so every query has the same number of keys (Hassani et al. 2023,
    arXiv 2204.07143; dilated: arXiv 2209.15001). Prefix tokens are as in `WindowAttention`. A tile of queries computes
    the keys of all its queries: for a window of 7, two to three times the necessary 2 N w² D multiply-adds.
    """

    cutter = staticmethod(neighbors)


OPERATORS: dict[str, Callable[..., AttentionOperator]] = {
    "window": WindowAttention,
    "neighbourhood": NeighborhoodAttention,
    "dilated": partial(WindowAttention, dilation=2),
}
