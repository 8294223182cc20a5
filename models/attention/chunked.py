"""Normalized kernel attention in chunks of tokens: features exist for one chunk at a time, forward and backward.

With features φ(q), φ(k) (B, H, N, F), S = Σ_j φ(k_j) v_jᵀ and m = Σ_j φ(k_j), the output is o_i = Sᵀφ(q_i) / z_i with
z_i = φ(q_i)·m. A chunk stays in the cache of a CPU, and the memory does not grow with N F. Features that are no wider
than the heads are kept for the backward pass, which computes wider ones again.

With g_i the gradient for o_i, u_i = g_i / z_i and w_i = u_i·o_i, the gradients are S u_i - w_i m for φ(q_i),
dS v_j - dm for φ(k_j) and dSᵀφ(k_j) for v_j, where dS = Σ_i φ(q_i) u_iᵀ and dm = Σ_i w_i φ(q_i).

Shape suffixes: B batch, H heads, N tokens, n tokens of a chunk, D head width, F features.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import precise

# Features of some tokens at a time, with their derivatives, for `chunked`.
#
# Shape suffixes: B batch, H heads, N tokens, n tokens of a chunk, D head width, F features.

LOG2_E = math.log2(math.e)
"""exp(x) = exp2(x LOG2_E), which torch computes three times as fast on a CPU."""


class Chunk(NamedTuple):
    """Some images, and some tokens of them."""

    images: slice
    tokens: slice
    everything: bool
    """These are all tokens of all images."""

    def of(self, x_BHND: Tensor) -> Tensor:
        """Return a view of these tokens."""
        return x_BHND if self.everything else x_BHND[self.images, :, self.tokens]

    def of_images(self, sums_BHFD: Tensor) -> Tensor:
        """Return a view of the sums of these images."""
        return sums_BHFD if self.everything else sums_BHFD[self.images]


class ChunkedFeatures(ABC):
    """Features of one chunk of tokens, without parameters; φ(x) is what the methods return plus `floor`.

    The methods get and return float32 or float64, and write what they return into `out`. One object serves one
    forward pass and its backward pass.
    """

    by_features = False
    """The gradients are functions of the features: they do not read the tokens, which are then not centered. The
    features are as wide as the tokens, which may be given in `out`."""
    rescaled = False
    """Sums of earlier chunks of keys get a factor, so the features of a chunk depend on the chunks before it."""

    def __init__(self, num_features: int, floor: float = 0.0) -> None:
        self.num_features, self.floor = num_features, floor
        self._scratch: dict[tuple[str, int, int, int], Tensor] = {}

    def scratch(self, name: str, like: Tensor, width: int | None = None) -> Tensor:
        """Return memory for tokens (B, H, n, width), kept from chunk to chunk so that it is in the cache.

        Its layout is (B, n, H, width), as a layer's, in which most steps run over the whole memory in one go. The
        tokens that a method gets may be in "first", a method may use "second".
        """
        width = width or like.shape[3]
        key = name, like.shape[0], like.shape[2], width
        if key not in self._scratch:
            self._scratch[key] = empty_tokens(like, width)
        return self._scratch[key]

    def release(self) -> None:
        """Free the memory of `scratch`."""
        self._scratch.clear()

    @abstractmethod
    def queries(self, x_BHnD: Tensor, chunk: Chunk, out: Tensor) -> Tensor:
        """Return φ(q) - floor, (B, H, n, F)."""

    @abstractmethod
    def keys(self, x_BHnD: Tensor, chunk: Chunk, out: Tensor) -> Tensor:
        """Return φ(k) - floor, (B, H, n, F)."""

    @abstractmethod
    def queries_gradient(
        self, x_BHnD: Tensor, features_BHnF: Tensor, grad_BHnF: Tensor, chunk: Chunk, out: Tensor
    ) -> None:
        """Write the gradient for the queries into `out`. It may overwrite `grad_BHnF`, but not the features."""

    @abstractmethod
    def keys_gradient(
        self, x_BHnD: Tensor, features_BHnF: Tensor, grad_BHnF: Tensor, chunk: Chunk, out: Tensor
    ) -> None:
        """Write the gradient for the keys into `out`. It may overwrite `grad_BHnF`, but not the features."""

    def first_keys(self, x_BHnD: Tensor, chunk: Chunk, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return `keys` in the forward pass, and a factor (B, H, 1, 1) for the sums of earlier chunks."""
        return self.keys(x_BHnD, chunk, out), None


def empty_tokens(like_BHND: Tensor, width: int) -> Tensor:
    """Return empty memory (B, H, N, width) for float32 or float64, in the layout of a layer, (B, N, H, width)."""
    batch, heads, tokens, _ = like_BHND.shape
    empty = like_BHND.new_empty((batch, tokens, heads, width), dtype=sum_dtype(like_BHND))
    return empty.transpose(1, 2)


def sum_dtype(x: Tensor) -> torch.dtype:
    """Return the type of features and sums of `x`."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


CACHED = {"cpu": 3 * 2**17}
"""The number of features in a chunk, by type of device."""
ELSEWHERE = 2**26


def in_chunks(x_BHND: Tensor, num_features: int) -> bool:
    """Return whether chunks are faster: always on a CPU, elsewhere where the features do not fit in one chunk."""
    batch, heads, tokens, _ = x_BHND.shape
    return x_BHND.device.type in CACHED or batch * heads * tokens * num_features > ELSEWHERE


def chunked_attention(
    features: ChunkedFeatures, q: Tensor, k: Tensor, v: Tensor, center: bool, least: float
) -> Tensor:
    """Return Sᵀφ(q) / max(z, N least), (B, H, N, D) in the dtype of v.

    `center` subtracts the mean key from all keys first.
    """
    least *= k.shape[2]
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _ChunkedAttention.apply(features, center, least, q, k, v)
    with _no_autocast(q):
        return _attend(features, _chunks(features, q), center, least, q, k, v, learned=False).out


class _Saved(NamedTuple):
    """What the backward pass reads besides queries, keys and values."""

    mean: Tensor | None
    """The mean key, (B, H, 1, D)."""
    sums: Tensor
    """S, (B, H, F, D)."""
    total: Tensor
    """m, (B, H, 1, F)."""
    z: Tensor
    out: Tensor
    q_features: Tensor | None
    k_features: Tensor | None
    """Features (B, H, N, F), if they are kept."""


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: ChunkedFeatures, center: bool, least: float, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        chunks = _chunks(features, q)
        with _no_autocast(q):
            saved = _attend(features, chunks, center, least, q, k, v, learned=True)
        ctx.features, ctx.chunks, ctx.least = features, chunks, least
        ctx.save_for_backward(q, k, v, *saved)
        return saved.out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *rest = ctx.saved_tensors
        features, chunks, saved = ctx.features, ctx.chunks, _Saved(*rest)
        with _no_autocast(q):
            dq, grad_sums, grad_total = _query_gradients(features, chunks, q, grad_out, saved, ctx.least)
            dk, dv = _key_gradients(features, chunks, k, v, grad_sums, grad_total, saved)
        features.release()
        return None, None, None, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _attend(
    features: ChunkedFeatures,
    chunks: list[Chunk],
    center: bool,
    least: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    learned: bool,
) -> _Saved:
    """Return the output, and what the backward pass needs if there will be one."""
    width = features.num_features
    kept = learned and (len(chunks) == 1 or (width <= q.shape[3] and not features.rescaled))
    q_features, k_features = (empty_tokens(x, width) if kept else None for x in (q, k))
    mean_BH1D = k.mean(2, keepdim=True, dtype=sum_dtype(k)) if center else None
    sums_BHFD, total_BH1F = _key_sums(features, chunks, k, v, mean_BH1D, k_features)
    out, z_BHN1 = torch.empty_like(v), empty_tokens(q, 1)
    for chunk in chunks:
        x, sums = precise(chunk.of(q)), chunk.of_images(sums_BHFD)
        queries = features.queries(x, chunk, _memory(features, q_features, chunk, q))
        product = torch.matmul(queries, sums, out=features.scratch("second", x, v.shape[3]))
        z = torch.matmul(queries, chunk.of_images(total_BH1F).mT, out=chunk.of(z_BHN1))
        if features.floor:
            product += features.floor * sums.sum(2, keepdim=True)
            z += features.floor * chunk.of_images(total_BH1F).sum(3, keepdim=True)
        torch.mul(product, z.clamp_min_(least).reciprocal(), out=chunk.of(out))
    features.release()
    return _Saved(mean_BH1D, sums_BHFD, total_BH1F, z_BHN1, out, q_features, k_features)


def _key_sums(
    features: ChunkedFeatures,
    chunks: list[Chunk],
    k: Tensor,
    v: Tensor,
    mean_BH1D: Tensor | None,
    k_features: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return S and m, (B, H, F, D) and (B, H, 1, F)."""
    sums_BHFD, total_BH1F = _Sums(), _Sums()
    for chunk in chunks:
        out = _memory(features, k_features, chunk, k)
        x = _centered(features, k, mean_BH1D, chunk, out if features.by_features else None)
        keys, factor = features.first_keys(x, chunk, out)
        sums_BHFD.add(chunk, keys.mT @ precise(chunk.of(v)), factor)
        total_BH1F.add(chunk, keys.sum(2, keepdim=True), factor)
    sums, total = sums_BHFD.of_all_images(), total_BH1F.of_all_images()
    if features.floor:
        sums += features.floor * v.sum(2, keepdim=True, dtype=sums.dtype)
        total += features.floor * k.shape[2]
    return sums, total


def _query_gradients(
    features: ChunkedFeatures, chunks: list[Chunk], q: Tensor, grad_out: Tensor, saved: _Saved, least: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients for the queries, for S, and minus the gradient for m."""
    dq, grad_sums, grad_total = empty_tokens(q, q.shape[3]), _Sums(), _Sums()
    for chunk in chunks:
        x, z, out = precise(chunk.of(q)), chunk.of(saved.z), chunk.of(saved.out)
        u = torch.mul(chunk.of(grad_out), z.reciprocal(), out=features.scratch("first", x, out.shape[3]))
        w = torch.mul(u, out, out=features.scratch("second", x, out.shape[3])).sum(3, keepdim=True)
        w *= z > least
        if saved.q_features is None:
            queries = features.queries(x, chunk, _memory(features, None, chunk, q))
        else:
            queries = chunk.of(saved.q_features)
        of_sums, of_total = queries.mT @ u, w.mT @ queries
        if features.floor:
            of_sums += features.floor * u.sum(2, keepdim=True)
            of_total += features.floor * w.sum(2, keepdim=True)
        grad_sums.add(chunk, of_sums)
        grad_total.add(chunk, of_total)
        grad = torch.matmul(u, chunk.of_images(saved.sums).mT, out=_scratch_features(features, x))
        grad.addcmul_(w, chunk.of_images(saved.total), value=-1)
        features.queries_gradient(x, queries, grad, chunk, chunk.of(dq))
    return dq, grad_sums.of_all_images(), grad_total.of_all_images()


def _key_gradients(
    features: ChunkedFeatures,
    chunks: list[Chunk],
    k: Tensor,
    v: Tensor,
    grad_sums: Tensor,
    grad_total: Tensor,
    saved: _Saved,
) -> tuple[Tensor, Tensor]:
    """Return the gradients for the keys and the values."""
    dk, dv, common = empty_tokens(k, k.shape[3]), empty_tokens(v, v.shape[3]), _Sums()
    for chunk in chunks:
        sums = chunk.of_images(grad_sums)
        if saved.k_features is not None and features.by_features:
            x = precise(chunk.of(k))
        else:
            x = _centered(features, k, saved.mean, chunk)
        if saved.k_features is None:
            keys = features.keys(x, chunk, _memory(features, None, chunk, k))
        else:
            keys = chunk.of(saved.k_features)
        values = torch.matmul(keys, sums, out=chunk.of(dv))
        if features.floor:
            values += features.floor * sums.sum(2, keepdim=True)
        grad = torch.matmul(precise(chunk.of(v)), sums.mT, out=_scratch_features(features, x))
        grad -= chunk.of_images(grad_total)
        features.keys_gradient(x, keys, grad, chunk, chunk.of(dk))
        if saved.mean is not None:
            common.add(chunk, chunk.of(dk).sum(2, keepdim=True))
    if saved.mean is not None:
        dk -= common.of_all_images() / k.shape[2]
    return dk, dv


class _Sums:
    """Sums over the chunks of each image."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def add(self, chunk: Chunk, part: Tensor, factor: Tensor | None = None) -> None:
        """Add the sum over a chunk; `factor` is for the earlier ones of the same images."""
        before = self._sums.get(chunk.images.start)
        if before is not None:
            part += before if factor is None else before * factor
        self._sums[chunk.images.start] = part

    def of_all_images(self) -> Tensor:
        """Return the sums of all images."""
        return (
            torch.cat(list(self._sums.values())) if len(self._sums) > 1 else next(iter(self._sums.values()))
        )


def _chunks(features: ChunkedFeatures, x_BHND: Tensor) -> list[Chunk]:
    """Cut whole images where several fit, else the tokens of one image."""
    batch, heads, tokens, _ = x_BHND.shape
    most = max(1, CACHED.get(x_BHND.device.type, ELSEWHERE) // (heads * features.num_features))  # tokens
    images, length = max(1, most // tokens), min(most, tokens)
    return [
        Chunk(
            slice(image, image + images), slice(token, token + length), images >= batch and length == tokens
        )
        for image in range(0, batch, images)
        for token in range(0, tokens, length)
    ]


def _centered(
    features: ChunkedFeatures, k: Tensor, mean_BH1D: Tensor | None, chunk: Chunk, out: Tensor | None = None
) -> Tensor:
    """Return the keys of a chunk minus their mean, in `out` or memory of their own."""
    keys = precise(chunk.of(k))
    if mean_BH1D is None:
        return keys
    return torch.sub(
        keys, chunk.of_images(mean_BH1D), out=features.scratch("first", keys) if out is None else out
    )


def _memory(features: ChunkedFeatures, kept: Tensor | None, chunk: Chunk, x_BHND: Tensor) -> Tensor:
    """Return where to write the features of a chunk."""
    if kept is not None:
        return chunk.of(kept)
    return features.scratch("features", chunk.of(x_BHND), features.num_features)


def _scratch_features(features: ChunkedFeatures, x_BHnD: Tensor) -> Tensor:
    return features.scratch("second", x_BHnD, features.num_features)


def _no_autocast(x: Tensor) -> AbstractContextManager[object]:
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
