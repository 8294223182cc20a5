"""What the shared projection of queries and keys starts from, when hashed attention replaces a softmax layer.

Each function sets the query rows of a layer in place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from .projections import Projections


def keep_queries(projections: Projections, num_heads: int) -> None:
    """Keep the query rows, as published."""


def take_keys(projections: Projections, num_heads: int) -> None:
    """Take the key rows."""
    _set(projections, _with_bias(projections, "k"))


def take_mean(projections: Projections, num_heads: int) -> None:
    """Take the mean of query and key rows."""
    query, key = _with_bias(projections, "q"), _with_bias(projections, "k")
    _set(projections, (query + key) / 2)


def take_symmetric(projections: Projections, num_heads: int) -> None:
    """Take the rows W (D, C) of each head whose WᵀW is nearest to the symmetric part of QᵀK.

    The D largest positive eigenvalues of (QᵀK + KᵀQ) / 2 and their vectors give W = Λ^½ Vᵀ. They lie in the span of
    the 2D rows of Q and K, so the matrix that is decomposed is 2D x 2D.
    """
    query, key = (_with_bias(projections, part).double() for part in "qk")
    found = [
        _symmetric_root(q, k)
        for q, k in zip(query.chunk(num_heads), key.chunk(num_heads), strict=True)
    ]  # fmt: skip
    _set(projections, torch.cat(found))


STARTS: dict[str, Callable[[Projections, int], None]] = {
    "q": keep_queries,
    "k": take_keys,
    "mean": take_mean,
    "symmetric": take_symmetric,
}


def _symmetric_root(query_DC: Tensor, key_DC: Tensor) -> Tensor:
    basis, _ = torch.linalg.qr(torch.cat([query_DC, key_DC]).T)
    product = (query_DC @ basis).T @ (key_DC @ basis)
    values, vectors = torch.linalg.eigh((product + product.T) / 2)
    largest = slice(max(0, len(values) - len(query_DC)), None)
    root = values[largest].clamp_min(0).sqrt()[:, None] * (basis @ vectors[:, largest]).T
    return torch.cat([root, root.new_zeros(len(query_DC) - len(root), root.shape[1])])


def _with_bias(projections: Projections, part: str) -> Tensor:
    """Return the weight with the bias as a last column, where the layer has biases."""
    weight, bias = projections.weight(part), projections.bias(part)
    if part == "k" and weight.shape != projections.weight("q").shape:
        raise UnsupportedModelError(
            f"this layer has fewer keys ({len(weight)} rows) than queries: take start=q for the operator hash"
        )
    own = projections.bias("q")
    if own is None:
        return weight
    return torch.cat([weight, (torch.zeros_like(own) if bias is None else bias)[:, None]], 1)


def _set(projections: Projections, rows: Tensor) -> None:
    weight, bias = projections.weight("q"), projections.bias("q")
    weight.copy_(rows[:, : weight.shape[1]])
    if bias is not None:
        bias.copy_(rows[:, -1])
