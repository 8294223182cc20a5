"""The genotypes of AttnZero's code in numpy, restated from its description: 28 unary and 10 binary operators, 8 graphs.

Written apart from the package, for comparison. An operation that the description calls an error raises ValueError or
IndexError. Tensors are (batch, heads, tokens, channels).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


def _softmax(x: Array) -> Array:
    raised = np.exp(x - np.atleast_1d(x).max(-1, keepdims=True))
    return (raised / raised.sum(-1, keepdims=True)).reshape(x.shape)


def _log_softmax(x: Array) -> Array:
    lowered = x - np.atleast_1d(x).max(-1, keepdims=True)
    return (lowered - np.log(np.exp(lowered).sum(-1, keepdims=True))).reshape(x.shape)


def _unit(x: Array, axis: int) -> Array:
    if x.ndim == 0 and axis == -1:  # a number has a last dimension
        return _unit(x[None], axis)[0]
    return x / np.maximum(np.sqrt((x**2).sum(axis, keepdims=True)), 1e-12)


def _zscore(x: Array) -> Array:
    out = (x - x.mean()) / x.std(ddof=1)
    return np.where(np.isnan(out), 0.0, out)


def _log_of_size(x: Array) -> Array:
    x[x == 0] = 1.0  # where the caller reads it, too
    return np.log(np.abs(x))


def _root(x: Array) -> Array:
    x[x <= 0] = 0.0  # where the caller reads it, too
    return np.sqrt(x)


def _shares(x: Array) -> Array:
    x /= x.sum(-1)[..., None]
    return x


def _scaled(x: Array) -> Array:
    if x.ndim != 4:
        raise ValueError("four dimensions are unpacked")
    return x / np.sqrt(x.shape[3])


def _tiled(x: Array) -> Array:
    if x.ndim > 3:
        raise ValueError("three numbers do not tile four dimensions")
    return 1.0 / (np.tile(x, (1, 1, 192)) + 1e-8)


def _logistic(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


UNARY: dict[int, Callable[[Array], Array]] = {
    0: lambda x: x,
    1: lambda x: np.swapaxes(x, -1, -2),
    2: _softmax,
    3: lambda x: np.log(x + 1e-9),
    4: _log_of_size,
    5: np.abs,
    6: _zscore,
    7: lambda x: x / (1.0 + np.abs(x)),
    8: lambda x: 1.0 / (x + 1e-6),
    9: _logistic,
    10: _log_softmax,
    11: _root,
    12: np.negative,
    13: lambda x: (x - x.min()) / (x.max() - x.min() + 1e-9),
    14: lambda x: np.where(np.isnan(x), 0.0, np.sign(x)),
    15: _scaled,
    16: lambda x: np.where(x > 0, x + 1.0, np.exp(np.minimum(x, 0.0))),
    17: lambda x: x.sum(2),
    18: lambda x: x[..., None],
    19: lambda x: np.maximum(x, 0.0),
    20: lambda x: _unit(x, -2),
    21: np.exp,
    22: lambda x: x[None],
    23: lambda x: x.sum(1),
    24: _tiled,
    25: lambda x: _unit(x, -1),
    26: lambda x: 1.0 - _logistic(x),
    27: _shares,
}  # fmt: skip


def _distance(a: Array, b: Array) -> Array:
    return np.sqrt((np.atleast_1d(a - b + 1e-6) ** 2).sum(-1))


def _cosine(a: Array, b: Array) -> Array:
    """The sum over images of the cosine of A with A in the batch of B."""
    left, right = a.reshape(a.shape[0], -1), a.reshape(b.shape[0], -1)
    sizes = np.maximum(np.sqrt((left**2).sum(1)), 1e-8) * np.maximum(np.sqrt((right**2).sum(1)), 1e-8)
    return np.asarray(((left * right).sum(1) / sizes).sum())


def _contracted(a: Array, b: Array) -> Array:
    if a.ndim != 4 or b.ndim != 4 or a.shape[:2] != b.shape[:2]:
        raise ValueError("four dimensions, the same images and heads")
    if a.shape[2] == b.shape[2]:
        return np.swapaxes(a, 2, 3) @ b
    if a.shape[3] == b.shape[3]:
        return a @ np.swapaxes(b, 2, 3)
    raise ValueError("neither as many tokens nor as many channels")


BINARY: dict[int, Callable[[Array, Array], Array]] = {
    0: np.add, 1: _distance, 2: np.multiply, 3: np.matmul, 4: _cosine, 5: _contracted,
    6: lambda a, b: np.swapaxes(_contracted(a, b), 2, 3), 7: lambda a, b: np.einsum("bnsd,bnd->bns", a, b),
    8: lambda a, b: np.einsum("bti,bi->bt", a, b), 9: lambda a, b: np.concatenate((a, b), -1),
}  # fmt: skip


def restated(
    graph: str,
    unary: Sequence[Iterable[int]],
    binary: Sequence[int],
    q: Array,
    k: Array,
    v: Array,
    *,
    bench: bool = False,
) -> Array:
    """Return the output of a genotype; the benchmark applies chain 4 of i3n301 after the second product."""

    def u(index: int, x: Array, *, fresh: bool = True) -> Array:
        x = x.copy() if fresh else x
        for number in unary[index]:
            x = np.asarray(UNARY[number](x))
        return x

    def b(index: int, left: Array, right: Array) -> Array:
        return np.asarray(BINARY[binary[index]](left, right))

    with np.errstate(all="ignore"):
        if graph in ("i3n2", "i3n301"):
            first = b(0, u(0, q), u(1, k))
            if graph == "i3n2":
                return b(1, u(3, first, fresh=False), u(2, v))
            again = first if bench else u(4, first, fresh=False)  # both read one memory
            second = b(1, u(3, first, fresh=False), u(2, v))
            again = u(4, first, fresh=False) if bench else again
            return b(2, u(5, second, fresh=False), again)
        first = b(0, u(0, k), u(1, v))
        if graph == "i3n302":
            return b(2, u(4, q), u(5, b(1, u(2, v), u(3, first, fresh=False)), fresh=False))
        if graph in ("i3n303", "i3n304"):
            second = b(1, u(2, q), u(3, first, fresh=False))
            return b(2, u(4, q if graph == "i3n303" else v), u(5, second, fresh=False))
        if graph == "i3n305":
            second = b(1, u(2, q), u(3, v))
            return b(2, u(4, first, fresh=False), u(5, second, fresh=False))
        if graph == "i3n401":
            second = b(1, u(2, q), u(3, k))
            third = b(2, u(4, q), u(5, first, fresh=False))
            return b(3, u(6, second, fresh=False), u(7, third, fresh=False))
        second = u(5, b(1, u(2, q), u(3, first, fresh=False)), fresh=False)
        third = b(2, u(4, v), second)
        return b(3, u(6, second, fresh=False), u(7, third, fresh=False))
