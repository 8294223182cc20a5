"""Local softmax attention: windows, dilated windows and neighborhoods of the token grid."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from .base import AttentionOperator, Geometry, Heads, LayerShape, Traits
from .prefix import prefix_term, with_prefix
from .terms import Term
from .tiles import Cutter, Table, blocks, neighbors, sparse_term, tile_logits, tile_table, tiled_softmax
from .whole_windows import can_take_windows, spans, windowed_softmax

PARTS = ("queries", "keys", "sees", "place")


class TileTables(torch.nn.Module):
    """The table of the layer's own grid, on its device. Tables of other grids are made on demand."""

    def __init__(self, cutter: Cutter, geometry: Geometry, window: int, dilation: int) -> None:
        super().__init__()
        for name, value in (("window", window), ("dilation", dilation)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"plan: {name}={value}; give a whole number of tokens, 1 or more")
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
