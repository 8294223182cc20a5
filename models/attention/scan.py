"""Gated linear attention in both directions along the rows of the grid, in chunks.

Shape suffixes: B batch, H heads, N tokens, n grid tokens, P prefix tokens, T chunks, L tokens of a chunk, F features,
E channels of the values and a column of ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import AttentionOperator, FirstRows, Geometry, Heads, LayerShape, Term, Traits
from .kernel import EPSILON
from .kernels import precise
from .softmax import prefix_term, with_prefix

CHUNK = 64
"""The number of tokens of a chunk."""
WHOLE = 256
"""The number of grid tokens up to which one chunk has them all."""
START = 4.0
"""The logit of the gates at the start: a tenth is left after 127 tokens."""


class Parts(NamedTuple):
    """Features of the grid tokens, (B, H, n, F), and the logs of their gates, (B, H, n)."""

    q: Tensor
    k: Tensor
    gates: Tensor


class ScanAttention(AttentionOperator):
    """A_ij = φ(q_i)·φ(k_j) M_ij / Σ_j (the same), with M_ij the product of the gates g of the tokens from j towards i,
    with g_j and without g_i, in either direction: LION-S (Afzal et al. 2025, arXiv 2502.16249).

    φ = elu + 1 with centered keys, and tokens are in the order of rows. The gate of a token is sigmoid(k·w + b) with w
    and b for each head: from the key, as an operator does not see the layer's input. w starts at 0, b at 4. Prefix
    tokens are seen without a decay, and attend exactly. The map's rows sum to one.

    Tokens of one chunk of 64 see each other by a small map; what they see of other chunks is a sum of φ(k) vᵀ that
    decays from chunk to chunk. 4 n F D + n (F + D) 64 multiply-adds per head. The map itself has no factors: a loss of
    maps forms it.
    """

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.gate_weight = nn.Parameter(torch.zeros(shape.num_heads, shape.head_dim, 1))
        self.gate_bias = nn.Parameter(torch.full((shape.num_heads, 1, 1), START))

    @property
    def traits(self) -> Traits:
        return Traits(needs_grid=True)

    def attend(self, heads: Heads) -> Tensor:
        v, prefix = heads.values(), heads.tokens().num_prefix
        with torch.autocast(v.device.type, enabled=False):
            parts, first_BHPF = self._parts(heads)
            values = F.pad(precise(v), (0, 1), value=1.0)
            sums = scanned(parts, values[:, :, prefix:])
            if prefix:
                sums = sums + parts.q @ (first_BHPF.mT @ values[:, :, :prefix])
            out = sums[..., :-1] / sums[..., -1:].clamp_min(EPSILON)
        return with_prefix(heads, out.to(v.dtype))

    def terms(self, heads: Heads) -> list[Term]:
        parts, first_BHPF = self._parts(heads)
        mask = decay(parts.gates).exp()
        weights = torch.cat((parts.q @ first_BHPF.mT, parts.q @ parts.k.mT * mask), 3)
        weights = weights / weights.sum(3, keepdim=True).clamp_min(EPSILON)
        prefix = heads.tokens().num_prefix
        whole = FirstRows(F.pad(weights, (0, 0, prefix, 0)))
        return [prefix_term(heads), whole] if prefix else [whole]

    def macs(self, geometry: Geometry) -> int:
        width, tokens, prefix = self.shape.head_dim, geometry.num_patches, geometry.num_prefix
        length = chunk_length(tokens)
        padded = -(-tokens // length) * length
        near = padded * length * (2 * width + 1)
        far = 4 * padded * width * (width + 1) if padded > length else 0
        exact = 2 * prefix * geometry.num_tokens * width + (prefix + tokens) * width * (width + 1)
        return (near + far + exact + geometry.num_tokens * width) * self.shape.num_heads

    def _parts(self, heads: Heads) -> tuple[Parts, Tensor]:
        """Return the features of the grid tokens and their gates, and φ(k) of the prefix tokens."""
        prefix, (q, k) = heads.tokens().num_prefix, map(precise, heads.qk())
        logits = k @ self.gate_weight.to(k.dtype) + self.gate_bias.to(k.dtype)
        gates = -F.softplus(-logits).squeeze(
            3
        )  # the log of the sigmoid, which ONNX would take of a rounded sigmoid
        q, k = F.elu(q) + 1, F.elu(k - k.mean(2, keepdim=True)) + 1
        return Parts(q[:, :, prefix:], k[:, :, prefix:], gates[:, :, prefix:]), k[:, :, :prefix]


def chunk_length(tokens: int) -> int:
    """Return the number of tokens of a chunk."""
    return tokens if tokens <= WHOLE else CHUNK


def decay(gates: Tensor) -> Tensor:
    """Return log M of the tokens of a chunk, (..., L, L), from the logs of their gates, (..., L)."""
    upto = gates.cumsum(-1)
    before = upto - gates
    earlier = before[..., :, None] - before[..., None, :]  # for keys j before i: the gates of j to i - 1
    later = upto[..., None, :] - upto[..., :, None]  # for keys after i: the gates of i + 1 to j
    return earlier.tril_().add_(later.triu_(1))


def scanned(parts: Parts, values_BHnE: Tensor) -> Tensor:
    """Return Σ_j φ(q_i)·φ(k_j) M_ij v_j, (B, H, n, E)."""
    tokens = parts.q.shape[2]
    length = chunk_length(tokens)
    if length == tokens:
        return (parts.q @ parts.k.mT * decay(parts.gates).exp_()) @ values_BHnE
    more = -tokens % length
    q, k, v = (F.pad(x, (0, 0, 0, more)).unflatten(2, (-1, length)) for x in (parts.q, parts.k, values_BHnE))
    gates = F.pad(parts.gates, (0, more)).unflatten(2, (-1, length))
    out = (q @ k.mT * decay(gates).exp_()) @ v + _from_others(q, k, v, gates)
    by_token: Tensor = out.flatten(2, 3)
    return by_token[:, :, :tokens]


def _from_others(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    """Return what the tokens of each chunk (B, H, T, L) see of other chunks, (B, H, T, L, E)."""
    upto = gates.cumsum(3)
    before, whole = upto - gates, upto[..., -1:]
    forward = (k * (whole - before).exp()[..., None]).mT @ v
    backward = (k * upto.exp()[..., None]).mT @ v
    factor = whole.exp()[..., None]
    count = q.shape[2]
    earlier, later = (
        _carried(sums, factor, order)
        for sums, order in ((forward, range(count)), (backward, reversed(range(count))))
    )
    return (q * before.exp()[..., None]) @ earlier + (q * (whole - upto).exp()[..., None]) @ later


def _carried(sums_BHTFE: Tensor, factor: Tensor, order: Iterable[int]) -> Tensor:
    """Return for each chunk the decayed sum over the chunks before it in `order`, (B, H, T, F, E)."""
    states: dict[int, Tensor] = {}
    state = torch.zeros_like(sums_BHTFE[:, :, 0])
    for chunk in order:
        states[chunk] = state
        state = factor[:, :, chunk] * state + sums_BHTFE[:, :, chunk]
    return torch.stack([states[chunk] for chunk in sorted(states)], 2)


OPERATORS = {"scan": ScanAttention}
