"""Windows of a grid as rectangles: those of one size are a view of the grid, so nothing is indexed, padded or masked.

Windows of nearly equal size have at most two sizes along an axis, times the dilation. Their maps are small, and are
formed as in `small_maps`, for the windows of one size of some images at a time.

Shape suffixes: B batch, H heads, N tokens, P prefix tokens, D head width, M tokens of a window, S its keys: the prefix
tokens, then its own, Z maps.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .base import Geometry, without_prefix
from .kernels import empty_by_token
from .small_maps import can_form_maps, few, form_map, logits_gradient, scaled_bmm

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
    out: Tensor = _WindowedSoftmax.apply(q, k, v, geometry, window, dilation, scale)
    return out


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
