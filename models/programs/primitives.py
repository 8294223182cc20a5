"""The table of primitives by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Polynomials in N (tokens) and D (head width): the sizes of a program's matrices, and its cost.

Powers = tuple[int, int]
"""The exponents of N and D."""


@dataclass(frozen=True)
class Polynomial:
    """Σ c N^i D^j with whole c > 0; `terms` are ((i, j), c), the highest powers first."""

    terms: tuple[tuple[Powers, int], ...] = ()

    def __add__(self, other: Polynomial) -> Polynomial:
        return _collect([*self.terms, *other.terms])

    def __mul__(self, other: Polynomial) -> Polynomial:
        return _collect([((i + k, j + m), a * b) for (i, j), a in self.terms for (k, m), b in other.terms])

    def at(self, tokens: int, width: int) -> int:
        """Return the value for N = `tokens` and D = `width`."""
        return sum(count * tokens**i * width**j for (i, j), count in self.terms)

    @property
    def order(self) -> int:
        """Return the highest power of N."""
        return max((i for (i, _), _ in self.terms), default=0)

    def __str__(self) -> str:
        return " + ".join(_term(powers, count) for powers, count in self.terms) or "0"


def _collect(terms: list[tuple[Powers, int]]) -> Polynomial:
    counts: Counter[Powers] = Counter()
    for powers, count in terms:
        counts[powers] += count
    return Polynomial(tuple(sorted(counts.items(), reverse=True)))


def _term(powers: Powers, count: int) -> str:
    names = [
        f"{name}^{power}" if power > 1 else name for name, power in zip("ND", powers, strict=True) if power
    ]
    return " ".join([*([str(count)] if count != 1 or not names else []), *names])


NOTHING = Polynomial()
ONE = Polynomial((((0, 0), 1),))
N = Polynomial((((1, 0), 1),))
D = Polynomial((((0, 1), 1),))


@dataclass(frozen=True)
class Shape:
    """The shape of a value: a matrix of `rows` by `cols` for each image and head."""

    rows: Polynomial
    cols: Polynomial

    @property
    def entries(self) -> Polynomial:
        return self.rows * self.cols

    @property
    def transposed(self) -> Shape:
        return Shape(self.cols, self.rows)

    def __str__(self) -> str:
        return f"{self.rows}×{self.cols}"


TOKENS = Shape(N, D)
"""The shape of Q, K, V and of a program's output."""
SCALAR = Shape(ONE, ONE)


# What a primitive of attention programs states about itself.


def no_products(*shapes: Shape) -> Polynomial:
    """Return the multiply-adds of a primitive without matrix products."""
    return NOTHING


@dataclass(frozen=True)
class Primitive:
    """A row of the table of primitives. Values are (B, H, rows, cols)."""

    name: str
    arity: int
    shape: Callable[..., Shape | None]
    """The shape of the result for the shapes of the operands; None where the primitive is not defined."""
    run: Callable[..., Tensor]
    """The result. A primitive without operands takes any input of the program, for its batch, heads and type."""
    code: str
    """PyTorch, with `{0}` and `{1}` for the names of the operands."""
    latex: str
    """LaTeX, with `#1` and `#2` for the operands."""
    infix: bool = False
    """The LaTeX is not delimited: an operand that is not delimited either stands in parentheses."""
    products: Callable[..., Polynomial] = no_products
    """The multiply-adds of matrix products for the shapes of the operands."""
    mixes_heads: bool = False
    """The result of a head depends on other heads of the image."""
    commutes: bool = False


# Primitives of two operands and of none: products with an explicit kind, sums, distances, and the number one.
#
# Elementwise primitives broadcast rows or columns of size 1. Products name what they contract: `mm` A B, `tn`
# Aᵀ B, `nt` A Bᵀ. AttnZero's code chooses between them by the sizes that it meets.


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


# Primitives of one operand: elementwise functions, normalizations along an axis, statistics of an image, shapes.
#
# The epsilons are those of AttnZero's code. A statistic is taken over all heads and entries of one image, where that
# code takes it over the batch as well. Where that code gives NaN (logarithms of negative numbers), a primitive is
# continued by a constant.

IMAGE = (1, 2, 3)
"""The dimensions of a statistic: everything but the batch."""


def same(shape: Shape) -> Shape:
    return shape


def rows_summed(shape: Shape) -> Shape:
    return Shape(ONE, shape.cols)


def more_than_a_number(shape: Shape) -> Shape | None:
    return None if shape == SCALAR else shape


def zero_safe_log(x: Tensor) -> Tensor:
    return torch.where(x == 0, 1, x.abs()).log()


def zero_safe_root(x: Tensor) -> Tensor:
    """Return √max(x, 0), whose gradient is 0 and not infinite where x ≤ 0."""
    return torch.where(x > 0, x, 1).sqrt() * (x > 0)


def zscore(x: Tensor) -> Tensor:
    """Return (x − mean) / std with the unbiased deviation; 0 where all entries are equal."""
    count = x[0].numel()
    variance, mean = torch.var_mean(x, IMAGE, correction=min(1, count - 1), keepdim=True)
    return (x - mean) / variance.clamp_min(torch.finfo(x.dtype).tiny).sqrt()


def minmax(x: Tensor) -> Tensor:
    low, high = x.amin(IMAGE, keepdim=True), x.amax(IMAGE, keepdim=True)
    return (x - low) / (high - low + 1e-9)


def _elementwise(
    name: str, run: Callable[[Tensor], Tensor], code: str, latex: str, infix: bool = False
) -> Primitive:
    return Primitive(name, 1, same, run, code, latex, infix)


def _function(name: str, run: Callable[[Tensor], Tensor], code: str, word: str) -> Primitive:
    return _elementwise(name, run, code, rf"\operatorname{{{word}}}\left(#1\right)")


UNARY = [
    _function("softmax", lambda x: x.softmax(-1), "{0}.softmax(-1)", "softmax"),
    _function("log", lambda x: (x.clamp_min(0) + 1e-9).log(), "({0}.clamp_min(0) + 1e-9).log()", "log"),
    _function("abslog", zero_safe_log, "torch.where({0} == 0, 1, {0}.abs()).log()", "abslog"),
    _elementwise("abs", torch.abs, "{0}.abs()", r"\left|#1\right|"),
    _function("softsign", F.softsign, "F.softsign({0})", "softsign"),
    _elementwise("recip", lambda x: 1 / (x + 1e-6), "1 / ({0} + 1e-6)", r"\frac{1}{#1 + 10^{-6}}"),
    _elementwise("sigmoid", torch.sigmoid, "{0}.sigmoid()", r"\sigma\left(#1\right)"),
    _function("logsoftmax", lambda x: x.log_softmax(-1), "{0}.log_softmax(-1)", "logsoftmax"),
    _elementwise(
        "sqrt",
        zero_safe_root,
        "torch.where({0} > 0, {0}, 1).sqrt() * ({0} > 0)",
        r"\sqrt{\max\left(#1, 0\right)}",
    ),
    _elementwise("neg", torch.neg, "-{0}", "-#1", infix=True),
    _function("sign", torch.sign, "{0}.sign()", "sign"),
    _elementwise(
        "scale", lambda x: x * x.shape[-1] ** -0.5, "{0} * {0}.shape[-1] ** -0.5", r"\frac{#1}{\sqrt{c}}"
    ),
    _elementwise("elu1", lambda x: F.elu(x) + 1, "F.elu({0}) + 1", r"\phi\left(#1\right)"),
    _function("relu", F.relu, "F.relu({0})", "relu"),
    _function("exp", torch.exp, "{0}.exp()", "exp"),
    _elementwise("cosigmoid", lambda x: 1 - x.sigmoid(), "1 - {0}.sigmoid()", r"\bar{\sigma}\left(#1\right)"),
    _function("gelu", F.gelu, "F.gelu({0})", "gelu"),
    _function("l2", lambda x: F.normalize(x, dim=-1), "F.normalize({0}, dim=-1)", "norm_{c}"),
    _function("l2t", lambda x: F.normalize(x, dim=-2), "F.normalize({0}, dim=-2)", "norm_{r}"),
    _function("l1", lambda x: F.normalize(x, p=1, dim=-1), "F.normalize({0}, p=1, dim=-1)", "norm_{1}"),
    _function("sumnorm", lambda x: x / x.sum(-1, keepdim=True), "{0} / {0}.sum(-1, keepdim=True)", "share"),
    _function(
        "layernorm", lambda x: F.layer_norm(x, x.shape[-1:]), "F.layer_norm({0}, {0}.shape[-1:])", "layernorm"
    ),
    Primitive(
        "zscore",
        1,
        more_than_a_number,
        zscore,
        "({0} - {0}.mean((1, 2, 3), keepdim=True)) / {0}.var((1, 2, 3), correction=min(1, {0}[0].numel() - 1), "
        "keepdim=True).clamp_min(torch.finfo({0}.dtype).tiny).sqrt()",
        r"\operatorname{Z}\left(#1\right)",
        mixes_heads=True,
    ),
    Primitive(
        "minmax",
        1,
        same,
        minmax,
        "({0} - {0}.amin((1, 2, 3), keepdim=True)) / ({0}.amax((1, 2, 3), keepdim=True) - "
        "{0}.amin((1, 2, 3), keepdim=True) + 1e-9)",
        r"\operatorname{minmax}\left(#1\right)",
        mixes_heads=True,
    ),
    Primitive(
        "t",
        1,
        lambda shape: shape.transposed,
        lambda x: x.transpose(2, 3),
        "{0}.transpose(2, 3)",
        r"{#1}^{\top}",
        infix=True,
    ),
    Primitive(
        "sum",
        1,
        rows_summed,
        lambda x: x.sum(2, keepdim=True),
        "{0}.sum(2, keepdim=True)",
        r"\operatorname{sum}\left(#1\right)",
    ),
    Primitive(
        "mean",
        1,
        rows_summed,
        lambda x: x.mean(2, keepdim=True),
        "{0}.mean(2, keepdim=True)",
        r"\operatorname{mean}\left(#1\right)",
    ),
    Primitive(
        "headsum",
        1,
        same,
        lambda x: x.sum(1, keepdim=True).expand_as(x),
        "{0}.sum(1, keepdim=True).expand_as({0})",
        r"\operatorname{headsum}\left(#1\right)",
        mixes_heads=True,
    ),
]


PRIMITIVES: dict[str, Primitive] = {row.name: row for row in [*NULLARY, *UNARY, *BINARY]}
