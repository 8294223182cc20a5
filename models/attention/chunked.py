"""Normalized kernel attention in chunks of tokens: features exist for one chunk at a time, forward and backward.

With features φ(q), φ(k) (B, H, N, F), S = Σ_j φ(k_j) v_jᵀ / N and m = Σ_j φ(k_j) / N, the output is
o_i = Sᵀφ(q_i) / z_i with z_i = φ(q_i)·m. A chunk stays in the cache of a CPU, and the memory does not grow with N F.

Shape suffixes: B batch, H heads, N tokens, n tokens of a chunk, D head width, F features, E = D + 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CACHED = {"cpu": 3 * 2**16}
"""The number of features in a chunk, by type of device."""
ELSEWHERE = 2**26


class Chunk(NamedTuple):
    """Some images, and some tokens of them."""

    images: slice
    tokens: slice

    def of(self, x_BHND: Tensor) -> Tensor:
        """Return a view of these tokens."""
        return x_BHND[self.images, :, self.tokens]


class ChunkedFeatures(ABC):
    """Features of one chunk of tokens, without parameters; φ(x) is what the methods return plus `floor`.

    The methods get and return float32 or float64. One object serves one forward pass and its backward pass. What a
    method returns is valid until it is called for the next chunk.
    """

    def __init__(self, num_features: int, floor: float = 0.0) -> None:
        self.num_features, self.floor = num_features, floor
        self._scratch: dict[tuple[str, torch.Size], Tensor] = {}

    def scratch(self, name: str, like: Tensor) -> Tensor:
        """Return memory of the shape and layout of `like`, kept from chunk to chunk so that it is in the cache."""
        key = name, like.shape
        if key not in self._scratch:
            self._scratch[key] = torch.empty_like(like)
        return self._scratch[key]

    def release(self) -> None:
        """Free the memory of `scratch`."""
        self._scratch.clear()

    @abstractmethod
    def queries(self, x_BHnD: Tensor, chunk: Chunk) -> Tensor:
        """Return φ(q) - floor, (B, H, n, F)."""

    @abstractmethod
    def keys(self, x_BHnD: Tensor, chunk: Chunk) -> Tensor:
        """Return φ(k) - floor, (B, H, n, F)."""

    @abstractmethod
    def queries_gradient(
        self, x_BHnD: Tensor, features_BHnF: Tensor, grad_BHnF: Tensor, chunk: Chunk
    ) -> Tensor:
        """Return the gradient for the queries. It may overwrite `grad_BHnF`."""

    @abstractmethod
    def keys_gradient(self, x_BHnD: Tensor, features_BHnF: Tensor, grad_BHnF: Tensor, chunk: Chunk) -> Tensor:
        """Return the gradient for the keys. It may overwrite `grad_BHnF`."""

    def first_keys(self, x_BHnD: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor | None]:
        """Return `keys` in the forward pass, and a factor (B, H, 1, 1) for the sums of earlier chunks."""
        return self.keys(x_BHnD, chunk), None


def several_chunks(x_BHND: Tensor, num_features: int) -> bool:
    """Return whether the features of all tokens do not fit in one chunk, as chunks cost more where they do."""
    batch, heads, tokens, _ = x_BHND.shape
    return batch * heads * tokens * num_features > CACHED.get(x_BHND.device.type, ELSEWHERE)


def chunked_attention(
    features: ChunkedFeatures, q: Tensor, k: Tensor, v: Tensor, centre: bool, least: float
) -> Tensor:
    """Return Sᵀφ(q) / max(z, least), (B, H, N, D) in the dtype of v; `centre` subtracts the mean key from all keys."""
    out: Tensor = _ChunkedAttention.apply(features, centre, least, q, k, v)
    return out


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: ChunkedFeatures, centre: bool, least: float, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        mean_BH1D = k.mean(2, keepdim=True, dtype=_dtype(k)) if centre else None
        sums_BHFE = _key_sums(features, k, v, mean_BH1D)
        out = torch.empty_like(v)
        total_BHN1 = v.new_empty((*v.shape[:3], 1), dtype=sums_BHFE.dtype)
        for chunk in _chunks(features, q):
            product_BHnE = features.queries(_precise(chunk.of(q)), chunk) @ sums_BHFE[chunk.images]
            if features.floor:
                product_BHnE += features.floor * sums_BHFE[chunk.images].sum(2, keepdim=True)
            total = torch.clamp_min(product_BHnE[..., -1:], least, out=chunk.of(total_BHN1))
            chunk.of(out).copy_(product_BHnE[..., :-1].mul_(total.reciprocal()))
        features.release()
        ctx.features, ctx.least = features, least
        ctx.save_for_backward(q, k, v, mean_BH1D, sums_BHFE, total_BHN1, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mean_BH1D, sums_BHFE, total_BHN1, out = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            dq, grad_sums = _query_gradients(ctx.features, q, grad_out, out, total_BHN1, sums_BHFE, ctx.least)
            dk, dv = _key_gradients(ctx.features, k, v, mean_BH1D, grad_sums)
        ctx.features.release()
        return None, None, None, dq, dk, dv


def _key_sums(features: ChunkedFeatures, k: Tensor, v: Tensor, mean_BH1D: Tensor | None) -> Tensor:
    """Return [S, m], (B, H, F, D + 1)."""
    batch, heads, tokens, width = v.shape
    sums_BHFE = v.new_zeros((batch, heads, features.num_features, width + 1), dtype=_dtype(k))
    for chunk in _chunks(features, k):
        some_BHFE = sums_BHFE[chunk.images]
        keys, factor = features.first_keys(_centred(features, k, mean_BH1D, chunk), chunk)
        if factor is not None:
            some_BHFE *= factor
        some_BHFE[..., :-1] += keys.transpose(2, 3) @ _precise(chunk.of(v))
        some_BHFE[..., -1] += keys.sum(2)
    sums_BHFE /= tokens
    if features.floor:
        sums_BHFE[..., :-1] += features.floor * v.mean(2, keepdim=True, dtype=sums_BHFE.dtype)
        sums_BHFE[..., -1] += features.floor
    return sums_BHFE


def _query_gradients(
    features: ChunkedFeatures,
    q: Tensor,
    grad_out: Tensor,
    out: Tensor,
    total_BHN1: Tensor,
    sums_BHFE: Tensor,
    least: float,
) -> tuple[Tensor, Tensor]:
    """Return the gradients for the queries and for [S, m]."""
    dq, grad_sums = torch.empty_like(q), torch.zeros_like(sums_BHFE)
    for chunk in _chunks(features, q):
        sums, total = sums_BHFE[chunk.images], chunk.of(total_BHN1)
        grad_BHnE = total.new_empty((*total.shape[:3], sums.shape[3]))
        numerator = torch.div(chunk.of(grad_out), total, out=grad_BHnE[..., :-1])
        torch.sum(numerator * chunk.of(out), 3, keepdim=True, out=grad_BHnE[..., -1:])
        grad_BHnE[..., -1:].neg_().masked_fill_(total <= least, 0.0)
        x = _precise(chunk.of(q))
        queries = features.queries(x, chunk)
        grad_sums[chunk.images] += queries.transpose(2, 3) @ grad_BHnE
        if features.floor:
            grad_sums[chunk.images] += features.floor * grad_BHnE.sum(2, keepdim=True)
        grad = grad_BHnE @ sums.transpose(2, 3)
        chunk.of(dq).copy_(features.queries_gradient(x, queries, grad, chunk))
    return dq, grad_sums


def _key_gradients(
    features: ChunkedFeatures, k: Tensor, v: Tensor, mean_BH1D: Tensor | None, grad_sums: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients for the keys and the values."""
    grad_sums /= k.shape[2]
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    common = None if mean_BH1D is None else torch.zeros_like(mean_BH1D)
    for chunk in _chunks(features, k):
        of_S_BHFD, of_m_BHF1 = grad_sums[chunk.images].split((v.shape[3], 1), 3)
        x = _centred(features, k, mean_BH1D, chunk)
        keys = features.keys(x, chunk)
        values = keys @ of_S_BHFD
        if features.floor:
            values += features.floor * of_S_BHFD.sum(2, keepdim=True)
        chunk.of(dv).copy_(values)
        grad = _precise(chunk.of(v)) @ of_S_BHFD.transpose(2, 3)
        grad += of_m_BHF1.transpose(2, 3)
        grad = features.keys_gradient(x, keys, grad, chunk)
        if common is not None:
            common[chunk.images] += grad.sum(2, keepdim=True)
        chunk.of(dk).copy_(grad)
    if common is not None:
        dk -= common / k.shape[2]
    return dk, dv


def _chunks(features: ChunkedFeatures, x_BHND: Tensor) -> Iterator[Chunk]:
    """Cut whole images where several fit, else the tokens of one image."""
    batch, heads, tokens, _ = x_BHND.shape
    most = max(1, CACHED.get(x_BHND.device.type, ELSEWHERE) // (heads * features.num_features))  # tokens
    images, length = max(1, most // tokens), min(most, tokens)
    for image in range(0, batch, images):
        for token in range(0, tokens, length):
            yield Chunk(slice(image, image + images), slice(token, token + length))


def _centred(features: ChunkedFeatures, k: Tensor, mean_BH1D: Tensor | None, chunk: Chunk) -> Tensor:
    keys = _precise(chunk.of(k))
    if mean_BH1D is None:
        return keys
    return torch.sub(keys, mean_BH1D[chunk.images], out=features.scratch("centred", keys))


def _dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _precise(x: Tensor) -> Tensor:
    return x.to(_dtype(x))
