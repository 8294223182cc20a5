"""Agent attention: a few pooled queries gather the values, and every token attends to them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Geometry, Heads, LayerShape, LowRank, Term, Traits, without_prefix
from .kernels import precise
from .pooling import PooledAttention, Pooling, default_count, pooling_macs, small_map_attention
from .softmax import prefix_term, softmax_rows, with_prefix


class AgentAttention(PooledAttention):
    """A of grid queries: softmax(s Q [K_P; T]ᵀ + log c) [I_P; softmax(s T Kᵀ)] (Han et al. 2024, arXiv 2312.08874).

    The agents T are the means of the queries over at most `num_agents` cells of the grid (default: a quarter of the
    patches, at most 81); K_P are the keys of the prefix tokens, which every query sees exactly; c is 1 for these
    and the size of its cell for an agent. Prefix queries have softmax attention. The map is nonnegative and its
    rows sum to one.

    The paper's position biases are left out: a converted model has its positions in queries and keys, and the bias
    tables would be tied to the grid. 4 N M D multiply-adds per head. `local_size` is the side of a depthwise
    convolution of the values; 0 means no convolution.

    Raises ConfigError: an option is invalid.
    """

    def __init__(self, shape: LayerShape, num_agents: int | None = None, local_size: int = 3) -> None:
        count = default_count(shape.geometry, 4, 81) if num_agents is None else num_agents
        super().__init__(shape, "num_agents", count, local_size)

    @property
    def traits(self) -> Traits:
        return Traits(needs_grid=True, key_mask=True)

    def attend(self, heads: Heads) -> Tensor:
        q, k, v = heads.qkv()
        num_prefix = heads.tokens().num_prefix
        agents, counts = self._agents(heads)
        gathered = small_map_attention(agents, k, v, heads.seen, heads.scale)
        keys, values = agents, gathered
        if num_prefix:
            keys = torch.cat((k[:, :, :num_prefix], agents), 2)
            values = torch.cat((v[:, :, :num_prefix], gathered), 2)
        grid = small_map_attention(without_prefix(q, heads.tokens()), keys, values, counts, heads.scale)
        return with_prefix(heads, grid)

    def terms(self, heads: Heads) -> list[Term]:
        q, k, v = heads.qkv()
        num_prefix = heads.tokens().num_prefix
        agents, counts = self._agents(heads)
        keys = precise(torch.cat((k[:, :, :num_prefix], agents), 2))
        logits = heads.scale * precise(q[:, :, num_prefix:]) @ keys.transpose(2, 3) + counts
        gathering = softmax_rows(heads.with_qkv(agents, k, v), slice(None))
        itself = torch.eye(num_prefix, k.shape[2], dtype=logits.dtype, device=k.device)
        right = torch.cat((itself.expand(*k.shape[:2], -1, -1), gathering), 2).transpose(2, 3)
        return [prefix_term(heads), LowRank(F.pad(logits.softmax(-1), (0, 0, num_prefix, 0)), right)]

    def macs(self, geometry: Geometry) -> int:
        cells, tokens, patches = self.cells(geometry), geometry.num_tokens, geometry.num_patches
        count = cells[0] * cells[1]
        maps = 2 * tokens * count + 2 * patches * (count + geometry.num_prefix)
        total = (maps + pooling_macs(geometry, cells)) * self.shape.head_dim * self.shape.num_heads
        return total + self.macs_beside(geometry)

    def _agents(self, heads: Heads) -> tuple[Tensor, Tensor]:
        """Return T (B, H, M, D) and the log-counts of prefix keys and agents, in the dtype of q."""
        q, _ = heads.qk()
        cells = self.cells(heads.tokens())
        own = precise(q)
        with torch.autocast(q.device.type, enabled=False):
            pooling = Pooling(heads, cells, own)
            agents, counts = pooling.means(own), pooling.log_counts()
        return agents.to(q.dtype), counts.to(q.dtype)


OPERATORS = {"agent": AgentAttention}
