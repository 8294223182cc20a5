"""Hybrid attention: exact in windows and dilated windows, a kernel for all other tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, did_you_mean
from .base import AttentionOperator, Geometry, Heads, LayerShape, LowRank, Term, Traits
from .kernel import KernelAttention
from .kernels import precise
from .softmax import prefix_term, with_prefix
from .tiles import Table, blocks, gather, sparse_term, tile_logits
from .window import TileTables

BRANCHES = ("window", "dilated", "kernel")
COMBINE = ("gate", "joint")
RARE = -2.197
"""The logit of 0.1."""


class Outside(NamedTuple):
    """A joint map: weights of each table's keys beyond the kernel's, (B, H, n, S), and the kernel's factors."""

    inside: list[Tensor]
    left: Tensor
    right: Tensor


class HybridAttention(AttentionOperator):
    """Local softmax attention and kernel attention in one map, combined by `combine`:

    gate:  A = Σ_b diag(g_b) A_b over the branches, with g = softmax_b(q W + β) for each token and head. W starts at
           zero, and β gives the kernel a tenth of a window's weight.
    joint: out_i = [γ Σ_{j∈W} exp(s q_i·k_j - c_i) v_j + Σ_{j∉W} φ(q_i)·φ(k_j) v_j] / [the same with v = 1], where W is
           the set of keys in the (dilated) windows of i, c_i the largest logit in W, and γ = sigmoid(g) one number
           per head, 0.1 at the start (LoLCATs, Zhang et al. 2024, arXiv 2410.10254, in two dimensions).

    Every query sees prefix tokens exactly; prefix queries attend exactly to all tokens. `branches` joins names with
    "+"; `feature` is the feature map of the kernel.

    Raises ConfigError: an option is invalid.
    """

    def __init__(
        self,
        shape: LayerShape,
        combine: str = "gate",
        branches: str = "window+dilated+kernel",
        window: int = 7,
        dilation: int = 2,
        feature: str = "elu",
    ) -> None:
        super().__init__(shape)
        names = _checked(combine, str(branches))
        self.combine, self.has_kernel = combine, "kernel" in names
        dilations = {"window": 1, "dilated": dilation}
        self.tables = nn.ModuleList(
            TileTables(blocks, shape.geometry, window, dilations[name]) for name in names if name != "kernel"
        )
        self.kernel = KernelAttention(shape, feature=feature) if self.has_kernel else None
        if self.kernel is not None and self.kernel.feature.opposed:
            raise ConfigError(f"plan: feature={feature} has two maps a head, and hybrid has one; use another")
        if combine == "joint":
            self.inside = nn.Parameter(torch.full((shape.num_heads, 1, 1), RARE))
        else:
            bias = torch.tensor([0.0] * len(self.tables) + [RARE] * self.has_kernel)
            self.gate_weight = nn.Parameter(torch.zeros(shape.num_heads, shape.head_dim, len(names)))
            self.gate_bias = nn.Parameter(bias.repeat(shape.num_heads, 1, 1))

    @property
    def traits(self) -> Traits:
        kernel = Traits() if self.kernel is None else self.kernel.traits
        return Traits(
            nonnegative=kernel.nonnegative,
            row_stochastic=self.combine == "joint" or kernel.row_stochastic,
            needs_grid=True,
        )

    def attend(self, heads: Heads) -> Tensor:
        if self.combine == "joint":
            v = heads.values()
            with torch.autocast(v.device.type, enabled=False):
                grid = self._joined(heads)
        else:
            grid = self._gated(heads)
        return with_prefix(heads, grid)

    def local(self, heads: Heads) -> Tensor | None:
        return None if self.kernel is None else self.kernel.local(heads)

    def terms(self, heads: Heads) -> list[Term]:
        num_prefix = heads.tokens().num_prefix
        grid = self._joined_terms(heads) if self.combine == "joint" else self._gated_terms(heads)
        return [prefix_term(heads), *grid] if num_prefix else grid

    def rows(self, heads: Heads, index: Tensor) -> Tensor:
        rows = super().rows(heads, index)
        # Where the exact weight is tiny, the difference of terms can round to just below zero.
        return rows.clamp_min(0) if self.combine == "joint" and self.traits.nonnegative else rows

    def macs(self, geometry: Geometry) -> int:
        prefix, tokens = geometry.num_prefix, geometry.num_tokens
        pairs = sum(tables.products(geometry) for tables in self._tile_tables())
        width = self.shape.head_dim
        total = 2 * (prefix * tokens + pairs) * width * self.shape.num_heads
        if self.kernel is not None:
            total += self.kernel.macs(geometry)
            if self.combine == "joint":
                total += pairs * self.kernel.feature.num_features(geometry) * self.shape.num_heads
        if self.combine == "gate":
            total += geometry.num_patches * width * self.gate_weight.shape[2] * self.shape.num_heads
        return total

    def resample(self, geometry: Geometry) -> None:
        super().resample(geometry)
        for tables in self._tile_tables():
            tables.fit(geometry)
        if self.kernel is not None:
            self.kernel.resample(geometry)

    def _tile_tables(self) -> list[TileTables]:
        return [tables for tables in self.tables if isinstance(tables, TileTables)]

    def _tables(self, heads: Heads) -> list[tuple[Table, bool]]:
        q, _ = heads.qk()
        return [tables(heads.tokens(), q.device) for tables in self._tile_tables()]

    def _gates(self, heads: Heads) -> list[Tensor]:
        """Return g of each branch, (B, H, n, 1)."""
        q, _ = heads.qk()
        with torch.autocast(q.device.type, enabled=False):
            grid = precise(q[:, :, heads.tokens().num_prefix :])
            gates = grid @ self.gate_weight.to(grid.dtype) + self.gate_bias.to(grid.dtype)
        return list(gates.softmax(-1).split(1, dim=-1))

    def _gated(self, heads: Heads) -> Tensor:
        outs = [tables.attend(heads) for tables in self._tile_tables()]
        if self.kernel is not None:
            outs.append(self.kernel.attend(heads)[:, :, heads.tokens().num_prefix :])
        mixed = [gate * out for gate, out in zip(self._gates(heads), outs, strict=True)]
        return torch.stack(mixed).sum(0).to(heads.values().dtype)

    def _gated_terms(self, heads: Heads) -> list[Term]:
        q, k = heads.qk()
        num_prefix, gates = heads.tokens().num_prefix, self._gates(heads)
        terms: list[Term] = []
        for gate, (table, _) in zip(gates, self._tables(heads), strict=False):
            weights = gate * tile_logits(q, k, table, heads.scale).softmax(-1)
            terms.append(sparse_term(weights, table, num_prefix))
        if self.kernel is not None:
            padded = F.pad(gates[-1], (0, 0, num_prefix, 0))
            for term in self.kernel.terms(heads):
                assert isinstance(term, LowRank)
                terms.append(LowRank(padded * term.left, term.right))
        return terms

    def _joint(self, heads: Heads) -> Outside:
        """Return the rows of grid tokens: the kernel's map, and inside the windows the difference to it."""
        assert self.kernel is not None
        q, k = map(precise, heads.qk())
        left, right = self.kernel.features(heads)
        tables = [table for table, _ in self._tables(heads)]
        logits = [tile_logits(q, k, table, heads.scale) for table in _disjoint(tables, heads.tokens())]
        largest = torch.cat([part.amax(-1, keepdim=True) for part in logits], -1).amax(-1, keepdim=True)
        share = self.inside.to(q.dtype).sigmoid()
        inside = []
        for table, part in zip(tables, logits, strict=True):
            kernel = tile_logits(left, right, table, 1.0).masked_fill(part == -torch.inf, 0.0)
            inside.append(share * (part - largest).exp() - kernel)
        left = left[:, :, heads.tokens().num_prefix :]
        total = sum(part.sum(-1, keepdim=True) for part in inside) + left @ right.sum(2)[..., None]
        return Outside([part / total for part in inside], left / total, right)

    def _joined(self, heads: Heads) -> Tensor:
        v = heads.values()
        joint = self._joint(heads)
        values = v.to(joint.right.dtype)
        out = joint.left @ (joint.right.transpose(2, 3) @ values)
        for weights, (table, _) in zip(joint.inside, self._tables(heads), strict=True):
            out = out + _weighted(weights, values, table, heads.tokens().num_prefix)
        return out.to(v.dtype)

    def _joined_terms(self, heads: Heads) -> list[Term]:
        num_prefix, joint = heads.tokens().num_prefix, self._joint(heads)
        sparse = [
            sparse_term(weights, table, num_prefix)
            for weights, (table, _) in zip(joint.inside, self._tables(heads), strict=True)
        ]
        return [*sparse, LowRank(F.pad(joint.left, (0, 0, num_prefix, 0)), joint.right)]


def _disjoint(tables: list[Table], geometry: Geometry) -> list[Table]:
    """Remove from each table the keys that a query already sees in an earlier table."""
    if len(tables) == 1:
        return tables
    first, (queries, keys, sees, place) = tables
    tile = first[3] // first[0].shape[1]
    tile = F.pad(tile, (geometry.num_prefix, 0), value=-1)
    twice = (tile[queries][:, :, None] == tile[keys][:, None, :]) | (keys < geometry.num_prefix)[:, None, :]
    return [first, (queries, keys, sees & ~twice, place)]


def _weighted(weights_BHnS: Tensor, v: Tensor, table: Table, num_prefix: int) -> Tensor:
    """Return the weighted sum of the values of each grid token's tile, (B, H, n, D)."""
    queries, keys, _, place = table
    tiles: Tensor = gather(weights_BHnS, queries - num_prefix) @ gather(v, keys)
    return tiles.flatten(2, 3).index_select(2, place)


def _checked(combine: str, branches: str) -> list[str]:
    """Return the names of the branches, the kernel last. Raise ConfigError if they or `combine` are invalid."""
    if combine not in COMBINE:
        raise ConfigError(f"plan: combine={combine}; {did_you_mean(str(combine), COMBINE)}")
    names = branches.split("+")
    for name in names:
        if name not in BRANCHES:
            raise ConfigError(f"plan: branches={branches}: {name!r}; {did_you_mean(name, BRANCHES)}")
    if len(set(names)) < len(names) or len(names) < 2:
        raise ConfigError(f"plan: branches={branches}; write two or three different ones, as window+kernel")
    if combine == "joint" and "kernel" not in names:
        raise ConfigError(f"plan: branches={branches}; combine=joint needs the kernel for what is outside")
    return [name for name in BRANCHES if name in names]


OPERATORS = {"hybrid": HybridAttention}
