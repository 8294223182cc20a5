"""MonarchAttention: the map as a Monarch matrix (two batches of small matrices), found without training."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import (
    AttentionOperator,
    FirstRows,
    Geometry,
    Heads,
    LayerShape,
    Term,
    Traits,
    check_steps,
    check_whole,
)
from .softmax import softmax_rows, with_prefix

HIDDEN = -1e9
"""The logit of a padding key: finite, so that a block of padding alone gives no NaN."""


class Factors(NamedTuple):
    """A of query (l, j) and key (k, i) is `blocks` (B, H, J, L, K) times `within` (B, H, K, J, I), and `prefix`
    (B, H, J, L, P) for the prefix keys. The row of each grid query sums to one over all keys."""

    blocks: Tensor
    within: Tensor
    prefix: Tensor


class MonarchAttention(AttentionOperator):
    """Softmax attention projected on Monarch matrices: A[(l, j), (k, i)] = L[j, l, k] R[k, j, i].

    Yaras et al. 2025 (NeurIPS, arXiv 2505.18698). The tokens are cut into blocks of `block` tokens (default: a row of
    the grid): query (l, j) and key (k, i) are the tokens at positions j and i of blocks l and k. L weights the blocks,
    and R the keys in a block; all queries at one position share R. L and R maximize Σ A s QKᵀ + entropy(A) in turns,
    `steps` times, each in closed form, from L = 1, without parameters or training. Each turn lowers the sum over rows
    of KL(A ‖ softmax).

    Prefix keys are blocks of their own, so each query weights them exactly; prefix queries attend exactly. With
    blocks of one token, or one block, this is softmax attention. About (3 b + 2 N/b) N D multiply-adds per head and
    step, N^1.5 D where b is near √N.

    Raises ConfigError: steps or block is not a whole number above 0, or steps is too large.
    """

    def __init__(self, shape: LayerShape, steps: int = 2, block: int | None = None) -> None:
        super().__init__(shape)
        check_steps("steps", steps)
        if block is not None:
            check_whole("block", block)
        self.steps, self.block = steps, block

    @property
    def traits(self) -> Traits:
        return Traits(linear_cost=False, needs_grid=True, key_mask=True, graph_any_grid=True)

    def attend(self, heads: Heads) -> Tensor:
        v = heads.values()
        first = heads.tokens().num_prefix
        factors = self._factors(heads)
        with torch.autocast(v.device.type, enabled=False):
            values = v.to(factors.blocks.dtype)
            summed_BHKJD = factors.within @ self._cut(values[:, :, first:], heads.tokens())
            grid_BHJLD = factors.blocks @ summed_BHKJD.transpose(2, 3)
            if first:
                grid_BHJLD = grid_BHJLD + factors.prefix @ values[:, :, None, :first]
        grid = grid_BHJLD.transpose(2, 3).flatten(2, 3)[:, :, : v.shape[2] - first]
        return with_prefix(heads, grid.to(v.dtype))

    def rows(self, heads: Heads, index: Tensor) -> Tensor:
        factors, first = self._factors(heads), heads.tokens().num_prefix
        places, block = index.sub(first).clamp_min(0), factors.within.shape[-1]
        column, row = places % block, places // block
        blocks_BHSK, within_BHKSI = factors.blocks[:, :, column, row], factors.within[:, :, :, column]
        grid = torch.einsum("bhsk,bhksi->bhski", blocks_BHSK, within_BHKSI).flatten(3)
        rows = torch.cat((factors.prefix[:, :, column, row], grid[..., : heads.tokens().num_patches]), 3)
        rows[:, :, index < first] = softmax_rows(heads, index[index < first])
        return rows

    def terms(self, heads: Heads) -> list[Term]:
        """Return the whole map, because a Monarch matrix has no low rank. Losses use rows and probes instead."""
        return [FirstRows(self.matrix(heads))]

    def macs(self, geometry: Geometry) -> int:
        block = self._width(geometry)
        blocks, first, tokens = -(-geometry.num_patches // block), geometry.num_prefix, geometry.num_tokens
        padded = blocks * block
        step = padded * (2 * block + blocks + first)  # R, the keys' means, L
        means = padded * blocks  # the queries', from the second step on
        out = padded * (block + blocks + first)
        exact = 2 * first * tokens
        total = self.steps * step + (self.steps - 1) * means + out + exact
        return total * self.shape.head_dim * self.shape.num_heads

    def _factors(self, heads: Heads) -> Factors:
        q, k = heads.qk()
        geometry = heads.tokens()
        precise, first = torch.promote_types(q.dtype, torch.float32), geometry.num_prefix
        with torch.autocast(q.device.type, enabled=False):
            q_BHND, k_BHND = q.to(precise) * heads.scale, k.to(precise)
            q_BHLJD = self._cut(q_BHND[:, :, first:], geometry)
            k_BHKID = self._cut(k_BHND[:, :, first:], geometry)
            hidden_BKI = self._hidden(heads)
            if hidden_BKI is not None:  # padding queries do not influence the map
                q_BHLJD = q_BHLJD.masked_fill(hidden_BKI[:, None, :, :, None], 0)
            prefix_BHJLP = q_BHLJD.transpose(2, 3) @ k_BHND[:, :, None, :first].transpose(3, 4)
            if heads.key_mask is not None:
                prefix_BHJLP = prefix_BHJLP.masked_fill(~heads.key_mask[:, None, None, None, :first], HIDDEN)
            return _alternate(q_BHLJD, k_BHKID, prefix_BHJLP, hidden_BKI, self.steps)

    def _width(self, geometry: Geometry) -> int:
        """Return the number of tokens in a block."""
        return min(self.block or geometry.grid[1], geometry.num_patches)

    def _cut(self, x_BHND: Tensor, geometry: Geometry) -> Tensor:
        """Cut grid tokens into blocks (B, H, L, J, D), the last padded with zeros."""
        block = self._width(geometry)
        padded = F.pad(x_BHND, (0, 0, 0, -x_BHND.shape[2] % block))
        return padded.reshape(*padded.shape[:2], -1, block, padded.shape[3])

    def _hidden(self, heads: Heads) -> Tensor | None:
        """Return a mask that is True at padding, (B or 1, L, J); None without padding."""
        geometry = heads.tokens()
        q, _ = heads.qk()
        block = self._width(geometry)
        missing = -geometry.num_patches % block
        if heads.key_mask is None and missing == 0:
            return None
        if heads.key_mask is None:
            seen = torch.ones(1, geometry.num_patches, dtype=torch.bool, device=q.device)
        else:
            seen = heads.key_mask[:, geometry.num_prefix :]
        return ~F.pad(seen, (0, missing)).reshape(len(seen), -1, block)


def _alternate(
    q_BHLJD: Tensor, k_BHKID: Tensor, prefix_BHJLP: Tensor, hidden_BKI: Tensor | None, steps: int
) -> Factors:
    """Find the best R for L, then the best L for R, `steps` times. The queries are already scaled."""
    mean_BHKJD, blocks = q_BHLJD, k_BHKID.shape[2]
    queries_BHJLD = q_BHLJD.transpose(2, 3)
    hidden = None if hidden_BKI is None else hidden_BKI[:, None]
    log_BHJLS = within_BHKJI = prefix_BHJLP
    for step in range(steps):
        if step:
            mean_BHKJD = _mean_queries(log_BHJLS[..., :blocks], queries_BHJLD, hidden)
        logits_BHKJI = mean_BHKJD @ k_BHKID.transpose(3, 4)
        if hidden is not None:
            logits_BHKJI = logits_BHKJI.masked_fill(hidden[:, :, :, None], HIDDEN)
        log_BHKJI = logits_BHKJI.log_softmax(-1)
        within_BHKJI = log_BHKJI.exp()
        entropy_BHKJ = -(within_BHKJI * log_BHKJI).sum(-1)
        keys_BHKJD = within_BHKJI @ k_BHKID
        scores_BHJLK = queries_BHJLD @ keys_BHKJD.permute(0, 1, 3, 4, 2)
        scores_BHJLK = scores_BHJLK + entropy_BHKJ.transpose(2, 3)[:, :, :, None]
        if hidden is not None:
            scores_BHJLK = scores_BHJLK.masked_fill(hidden.all(-1)[:, :, None, None], HIDDEN)
        log_BHJLS = torch.cat((scores_BHJLK, prefix_BHJLP), -1).log_softmax(-1)
    weights = log_BHJLS.exp()
    return Factors(weights[..., :blocks], within_BHKJI, weights[..., blocks:])


def _mean_queries(log_BHJLK: Tensor, queries_BHJLD: Tensor, hidden: Tensor | None) -> Tensor:
    """Return for each block k and position j the mean query, weighted by L: (B, H, K, J, D), without padding."""
    if hidden is not None:
        log_BHJLK = log_BHJLK.masked_fill(hidden.transpose(2, 3)[..., None], HIDDEN)
    weights_BHJKL = log_BHJLK.transpose(3, 4).softmax(-1)
    return (weights_BHJKL @ queries_BHJLD).transpose(2, 3)


OPERATORS = {"monarch": MonarchAttention}
