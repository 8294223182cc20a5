"""Primitives of two operands and of none: products with an explicit kind, sums, distances, and the number one.

Elementwise primitives broadcast rows or columns of size 1. Products name what they contract: `mm` A B, `tn` Aᵀ B, `nt`
A Bᵀ. AttnZero's code chooses between them by the sizes that it meets.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .polynomial import ONE, SCALAR, Polynomial, Shape
from .primitive import Primitive


def broadcast(left: Shape, right: Shape) -> Shape | None:
    rows, cols = _joined(left.rows, right.rows), _joined(left.cols, right.cols)
    return None if rows is None or cols is None else Shape(rows, cols)


def _joined(left: Polynomial, right: Polynomial) -> Polynomial | None:
    if left == right or right == ONE:
        return left
    return right if left == ONE else None


def product(left: Shape, right: Shape) -> Shape | None:
    return Shape(left.rows, right.cols) if left.cols == right.rows else None


def product_cost(left: Shape, right: Shape) -> Polynomial:
    return left.rows * left.cols * right.cols


def product_tn(left: Shape, right: Shape) -> Shape | None:
    return product(left.transposed, right)


def product_nt(left: Shape, right: Shape) -> Shape | None:
    return product(left, right.transposed)


def cost_tn(left: Shape, right: Shape) -> Polynomial:
    return product_cost(left.transposed, right)


def cost_nt(left: Shape, right: Shape) -> Polynomial:
    return product_cost(left, right.transposed)


def side_by_side(left: Shape, right: Shape) -> Shape | None:
    return Shape(left.rows, left.cols + right.cols) if left.rows == right.rows else None


def row_distances(left: Shape, right: Shape) -> Shape | None:
    both = broadcast(left, right)
    return None if both is None else Shape(both.rows, ONE)


def number_of_equals(left: Shape, right: Shape) -> Shape | None:
    return SCALAR if left == right else None


def as_wide(left: Shape, right: Shape) -> Shape | None:
    return Shape(left.rows, right.cols) if left.cols == ONE else None


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine of two images as vectors of all heads and entries, (B, H, 1, 1)."""
    cosines = F.cosine_similarity(a.flatten(1), b.flatten(1))
    return cosines[:, None, None, None].expand(-1, a.shape[1], 1, 1)


def tile_inverse(x: Tensor, like: Tensor) -> Tensor:
    """Return 1 / (x + 1e-8) in as many columns as `like` has; AttnZero's code always takes 192."""
    return (1 / (x + 1e-8)).expand(-1, -1, -1, like.shape[3])


def row_distance(a: Tensor, b: Tensor) -> Tensor:
    return F.pairwise_distance(a, b)[..., None]


def _call(word: str) -> str:
    return rf"\operatorname{{{word}}}\left(#1, #2\right)"


BINARY = [
    Primitive("add", 2, broadcast, torch.add, "{0} + {1}", "#1 + #2", infix=True, commutes=True),
    Primitive("sub", 2, broadcast, torch.sub, "{0} - {1}", "#1 - #2", infix=True),
    Primitive("mul", 2, broadcast, torch.mul, "{0} * {1}", r"#1 \odot #2", infix=True, commutes=True),
    Primitive("max", 2, broadcast, torch.maximum, "torch.maximum({0}, {1})", _call("max"), commutes=True),
    Primitive("mm", 2, product, torch.matmul, "{0} @ {1}", "#1 \\, #2", infix=True, products=product_cost),
    Primitive(
        "tn",
        2,
        product_tn,
        lambda a, b: a.transpose(2, 3) @ b,
        "{0}.transpose(2, 3) @ {1}",
        r"{#1}^{\top} #2",
        infix=True,
        products=cost_tn,
    ),
    Primitive(
        "nt",
        2,
        product_nt,
        lambda a, b: a @ b.transpose(2, 3),
        "{0} @ {1}.transpose(2, 3)",
        r"#1 \, {#2}^{\top}",
        infix=True,
        products=cost_nt,
    ),
    Primitive(
        "dist",
        2,
        row_distances,
        row_distance,
        "F.pairwise_distance({0}, {1})[..., None]",
        _call("dist"),
    ),
    Primitive(
        "cosine",
        2,
        number_of_equals,
        cosine,
        "F.cosine_similarity({0}.flatten(1), {1}.flatten(1))[:, None, None, None].expand(-1, {0}.shape[1], 1, 1)",
        _call("cos"),
        mixes_heads=True,
        commutes=True,
    ),
    Primitive(
        "cat",
        2,
        side_by_side,
        lambda a, b: torch.cat((a, b), -1),
        "torch.cat(({0}, {1}), -1)",
        r"\left[#1 \; #2\right]",
    ),
    Primitive(
        "tileinv",
        2,
        as_wide,
        tile_inverse,
        "(1 / ({0} + 1e-8)).expand(-1, -1, -1, {1}.shape[3])",
        _call("tileinv"),
    ),
]
NULLARY = [
    Primitive(
        "one", 0, lambda: SCALAR, lambda like: like.new_ones(*like.shape[:2], 1, 1),
        "{0}.new_ones(*{0}.shape[:2], 1, 1)", "1",
    ),
]  # fmt: skip
