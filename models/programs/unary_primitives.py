"""Primitives of one operand: elementwise functions, normalizations along an axis, statistics of an image, shapes.

The epsilons are those of AttnZero's code. A statistic is taken over all heads and entries of one image, where that
code takes it over the batch as well. Where that code gives NaN (logarithms of negative numbers), a primitive is
continued by a constant.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .polynomial import ONE, SCALAR, Shape
from .primitive import Primitive

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
