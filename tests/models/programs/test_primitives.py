"""Every primitive computes its formula, image by image and head by head, as numpy computes it."""

from __future__ import annotations

from collections.abc import Callable
from math import erf

import numpy as np
import pytest
import torch
from graftvit.models.programs.primitives import ONE, PRIMITIVES, SCALAR, D, N, Shape
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
TOKENS, WIDTH, HEADS = 7, 4, 3


def norm(x: Array, axis: int) -> Array:
    return x / np.maximum(np.sqrt((x**2).sum(axis, keepdims=True)), 1e-12)


def soft(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


A_HEAD: dict[str, Callable[..., Array]] = {
    "softmax": soft,
    "log": lambda x: np.log(np.maximum(x, 0) + 1e-9),
    "abslog": lambda x: np.log(np.where(x == 0, 1, np.abs(x))),
    "abs": np.abs,
    "softsign": lambda x: x / (1 + np.abs(x)),
    "recip": lambda x: 1 / (x + 1e-6),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "logsoftmax": lambda x: np.log(soft(x)),
    "sqrt": lambda x: np.sqrt(np.maximum(x, 0)),
    "neg": lambda x: -x,
    "sign": np.sign,
    "scale": lambda x: x / np.sqrt(x.shape[-1]),
    "elu1": lambda x: np.where(x > 0, x + 1, np.exp(x)),
    "relu": lambda x: np.maximum(x, 0),
    "exp": np.exp,
    "cosigmoid": lambda x: 1 / (1 + np.exp(x)),
    "gelu": lambda x: x * (1 + np.vectorize(erf)(x / np.sqrt(2))) / 2,
    "l2": lambda x: norm(x, -1),
    "l2t": lambda x: norm(x, -2),
    "l1": lambda x: x / np.abs(x).sum(-1, keepdims=True),
    "sumnorm": lambda x: x / x.sum(-1, keepdims=True),
    "layernorm": lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5),
    "t": lambda x: x.T,
    "sum": lambda x: x.sum(0, keepdims=True),
    "mean": lambda x: x.mean(0, keepdims=True),
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "max": np.maximum,
    "mm": lambda a, b: a @ b,
    "tn": lambda a, b: a.T @ b,
    "nt": lambda a, b: a @ b.T,
    "dist": lambda a, b: np.sqrt(((a - b + 1e-6) ** 2).sum(-1, keepdims=True)),
    "cat": lambda a, b: np.concatenate([a, b], -1),
    "tileinv": lambda a, b: np.repeat(1 / (a + 1e-8), b.shape[1], 1),
    "one": lambda x: np.ones((1, 1)),
}
"""Of one head."""
AN_IMAGE: dict[str, Callable[..., Array]] = {
    "zscore": lambda x: (x - x.mean()) / x.std(ddof=1),
    "minmax": lambda x: (x - x.min()) / (x.max() - x.min() + 1e-9),
    "headsum": lambda x: np.broadcast_to(x.sum(0), x.shape),
    "cosine": lambda a, b: np.full((HEADS, 1, 1), (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum())),
}
"""Of all heads of an image, (H, rows, cols)."""
SECOND = {"mm": Shape(D, N), "tileinv": Shape(N, D), "cat": Shape(N, ONE)}
FIRST = {"tileinv": Shape(N, ONE)}


def draw(shape: Shape, seed: int) -> Tensor:
    size = (2, HEADS, shape.rows.at(TOKENS, WIDTH), shape.cols.at(TOKENS, WIDTH))
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, :, 0, 0] = 0  # where a guard shows
    return x


def test_every_primitive_has_a_reference() -> None:
    assert set(A_HEAD) | set(AN_IMAGE) == set(PRIMITIVES)
    assert {name for name, row in PRIMITIVES.items() if row.mixes_heads} == set(AN_IMAGE)


@pytest.mark.parametrize("name", PRIMITIVES)
def test_a_primitive_is_its_formula(name: str) -> None:
    row = PRIMITIVES[name]
    shapes = [FIRST.get(name, Shape(N, D)), SECOND.get(name, Shape(N, D))][: row.arity]
    operands = [draw(shape, seed) for seed, shape in enumerate(shapes)]
    given = operands or [draw(Shape(N, D), 0)]
    out = row.run(*given)
    arrays = [x.numpy() for x in given]
    if name in A_HEAD:
        images = [[A_HEAD[name](*(x[b, h] for x in arrays)) for h in range(HEADS)] for b in range(2)]
    else:
        images = [AN_IMAGE[name](*(x[b] for x in arrays)) for b in range(2)]
    torch.testing.assert_close(out, torch.tensor(np.array(images)), rtol=1e-9, atol=1e-9)
    shape = row.shape(*shapes)
    assert shape is not None
    assert out.shape[2:] == (shape.rows.at(TOKENS, WIDTH), shape.cols.at(TOKENS, WIDTH))
    if row.commutes:
        assert torch.equal(out, row.run(*operands[::-1]))


@pytest.mark.parametrize("name", PRIMITIVES)
def test_gradients_are_finite_at_zero_and_where_all_is_equal(name: str) -> None:
    row = PRIMITIVES[name]
    shapes = [FIRST.get(name, Shape(N, D)), SECOND.get(name, Shape(N, D))][: row.arity]
    if not shapes or name in ("sumnorm", "dist"):  # a number; 0 / 0; a root that an epsilon keeps off zero
        return
    fill = 0.5 if name == "tileinv" else 0.0
    operands = [torch.full_like(draw(shape, 0), fill).requires_grad_() for shape in shapes]
    for gradient in torch.autograd.grad(row.run(*operands).sum(), operands, allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


def test_products_cost_what_they_multiply() -> None:
    left, right = Shape(N, D), Shape(N, D)
    assert str(PRIMITIVES["tn"].products(left, right)) == "N D^2"
    assert str(PRIMITIVES["nt"].products(left, right)) == "N^2 D"
    assert str(PRIMITIVES["mm"].products(left, Shape(D, ONE))) == "N D"
    assert PRIMITIVES["mm"].shape(left, right) is None
    assert PRIMITIVES["zscore"].shape(SCALAR) is None
    assert str(PRIMITIVES["cat"].shape(left, Shape(N, ONE))) == "N×D + 1"
