"""The map of a program that is linear in V: the matrix M (N×N) of each head with output M V, in factors.

A program has a map if it treats all channels of V alike: it mixes or weighs the rows of V, never its columns. No factor
is N×N unless the program itself forms such a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .primitives import ONE, PRIMITIVES, SCALAR
from .program import PRODUCTS, Node, Program, ProgramError, apply

# Parts of a map (N×N) of each head, in factors.


@dataclass(frozen=True)
class Part:
    """A part of a map: L Rᵀ, with `left` (B, H, rows, r) and `right` (B, H, N, r).

    Without `left`, L is the identity. Without `right`, `left` (B, H, N, 1) is the diagonal of the part.
    """

    left: Tensor | None
    right: Tensor | None


def combine(part: Part, x: Tensor) -> Part:
    """Return X times a part, for X (m × rows)."""
    if part.right is None:
        assert part.left is not None
        return Part(None, x.transpose(2, 3) * part.left)
    return Part(x if part.left is None else x @ part.left, part.right)


def weigh(part: Part, weights: Tensor | float) -> Part:
    """Return a part with its rows times `weights` (rows × 1), or all times a number."""
    if part.left is not None:
        return Part(part.left * weights, part.right)
    across = weights.transpose(2, 3) if isinstance(weights, Tensor) else weights
    assert part.right is not None
    return Part(None, part.right * across)


def apply_part(part: Part, v_BHND: Tensor) -> Tensor:
    """Return a part times values of any width."""
    if part.right is None:
        assert part.left is not None
        return part.left * v_BHND
    out = part.right.transpose(2, 3) @ v_BHND
    return out if part.left is None else part.left @ out


def without_values(part: Part) -> Part:
    """Return a part of the same form that is zero."""
    left, right = (None if x is None else torch.zeros_like(x) for x in (part.left, part.right))
    return Part(left, right)


def with_padding(part: Part, seen: Tensor) -> Part:
    """Return a part of the tokens that `seen` (N,) marks as a part of all N tokens, with zeros at the others."""

    def spread(x: Tensor) -> Tensor:
        out = x.new_zeros(*x.shape[:2], len(seen), x.shape[3])
        out[:, :, seen] = x
        return out

    if part.left is not None:
        return Part(spread(part.left), None if part.right is None else spread(part.right))
    assert part.right is not None
    return Part(None, spread(spread(part.right).transpose(2, 3)).transpose(2, 3))


def stack(images: Sequence[Part]) -> Part:
    """Return one part of a batch from the parts of its images, whose ranks may differ."""

    def joined(factors: list[Tensor]) -> Tensor | None:
        rank = max((x.shape[3] for x in factors), default=0)
        return torch.cat([F.pad(x, (0, rank - x.shape[3])) for x in factors]) if factors else None

    lefts = [part.left for part in images if part.left is not None]
    return Part(joined(lefts), joined([part.right for part in images if part.right is not None]))


# What a program's formula shows about its map: that it is nonnegative, and that its rows sum to one.
#
# Both are read off the graph and hold for all inputs. Where the formula does not show one, it is not claimed.

ALWAYS = {
    "softmax", "abs", "sigmoid", "cosigmoid", "elu1", "relu", "exp", "sqrt", "minmax", "dist", "one",
}  # fmt: skip
"""Primitives whose result is nonnegative."""
WITH_OPERANDS = {
    "scale", "l2", "l2t", "l1", "sumnorm", "recip", "softsign", "sign", "gelu", "t", "sum", "mean", "headsum", "add",
    "mul", "max", "mm", "tn", "nt", "cosine", "cat",
}  # fmt: skip
"""Primitives whose result is nonnegative if all operands are."""
ROWS_SUM_TO_ONE = {"softmax", "sumnorm"}


def nonnegative_map(program: Program) -> bool:
    """Return whether every entry of the map is nonnegative: M V ≥ 0 for all V ≥ 0."""
    return is_nonnegative(program.nodes, ("v",))


def is_nonnegative(nodes: Iterable[Node], inputs: Container[str] = ()) -> bool:
    """Return whether the last of `nodes` (operands first) is nonnegative wherever `inputs` are."""
    known: dict[Node, bool] = {}
    for node in nodes:
        each = [known[operand] for operand in node.operands]
        known[node] = (
            node.text in inputs
            or node.primitive in ALWAYS
            or (node.primitive in WITH_OPERANDS and all(each))
            or (node.primitive == "tileinv" and each[0])
            or (node.primitive == "mul" and node.operands[0] == node.operands[1])
        )
    return known[node]


def rows_sum_to_one(program: Program) -> bool:
    """Return whether M 1 = 1 by the formula: a program gives M 1 where V is a column of ones.

    An epsilon in a denominator (1e-6) is left out.
    """
    sums: dict[Node, Node | None] = {}
    try:
        for node in program.nodes:
            sums[node] = ONES if node.text == "v" else _sum_of(node, sums)
    except ProgramError:  # the text of a sum is too long
        return False
    return sums[program.root] == ONES


ONES = apply("one")
"""Stands for a column of ones of any length."""


def _sum_of(node: Node, sums: dict[Node, Node | None]) -> Node | None:
    """Return a value of V for V = 1, as the column that all its channels then are; None if it is not known."""
    mixed = [each for each in node.operands if sums[each] is not None]
    if len(mixed) != 1:
        return None
    [own] = mixed
    column = sums[own]
    assert column is not None
    others = [each for each in node.operands if each is not own]
    other = others[0] if others else None
    if node.primitive == "mean" and column == ONES:
        return ONES
    if node.primitive == "mul" and other is not None:
        return _weighed(column, other)
    if node.primitive in ("mm", "tn") and own is node.operands[1] and other is not None:
        return _combined(node.primitive, other, column)
    return None


def _weighed(column: Node, weights: Node) -> Node:
    if weights == apply("recip", column) and column.shape.cols == SCALAR.cols:
        return ONES
    return weights if column == ONES else apply("mul", column, weights)


def _combined(kind: str, matrix: Node, column: Node) -> Node:
    """Return the product of a matrix and a column."""
    if column != ONES:
        return apply(kind, matrix, column)
    if kind == "tn":
        return apply("t", apply("sum", matrix))
    return ONES if matrix.primitive in ROWS_SUM_TO_ONE else apply("t", apply("sum", apply("t", matrix)))


@dataclass(frozen=True)
class Mixed:
    """A value W = Σ parts V (rows × D), or its transpose."""

    parts: tuple[Part, ...]
    transposed: bool = False

    def each(self, change: Callable[[Part], Part]) -> Mixed:
        return replace(self, parts=tuple(change(part) for part in self.parts))


Value: TypeAlias = Tensor | Mixed


def map_parts(program: Program, q: Tensor | None, k: Tensor | None, v: Tensor) -> list[Part]:
    """Return the parts whose sum is the map of `program`, for its inputs (B, H, N, D).

    Only the shape and the type of `v` are read. Raises ProgramError: the program has no map; the error says why.
    """
    values: dict[str, Value] = {"v": Mixed((Part(torch.ones_like(v[..., :1]), None),))}
    values |= {name: x for name, x in (("q", q), ("k", k)) if x is not None}
    for node in program.nodes:
        if node.primitive:
            values[node.text] = _value(node, [values[each.text] for each in node.operands], v)
    out = values[program.text]
    if isinstance(out, Tensor):
        raise ProgramError("it does not read V")
    return list(out.parts)


@lru_cache(maxsize=4096)
def why_no_map(program: Program) -> str:
    """Return the reason why a program has no map, or an empty text if it has one."""
    x = torch.zeros(1, 1, 3, 2, device="cpu")
    try:
        map_parts(program, x, x, x)
    except ProgramError as error:
        return str(error)
    return ""


def _value(node: Node, operands: list[Value], v: Tensor) -> Value:
    known = [each for each in operands if isinstance(each, Tensor)]
    if len(known) == len(operands):
        return PRIMITIVES[node.primitive].run(*(known or [v]))
    rule = RULES.get(node.primitive)
    if rule is None:
        raise _refusal(node, REASONS.get(node.primitive, "is not linear in V"))
    return rule(node, operands, v)


def _refusal(node: Node, reason: str) -> ProgramError:
    text = node.text if len(node.text) <= 60 else f"{node.text[:57]}..."
    return ProgramError(f"{text} {reason}")


def _of_one(operands: list[Value]) -> Mixed:
    [only] = operands
    assert isinstance(only, Mixed)
    return only


def _transpose(node: Node, operands: list[Value], v: Tensor) -> Mixed:
    mixed = _of_one(operands)
    return replace(mixed, transposed=not mixed.transposed)


def _negative(node: Node, operands: list[Value], v: Tensor) -> Mixed:
    return _of_one(operands).each(lambda part: weigh(part, -1.0))


def _scaled(node: Node, operands: list[Value], v: Tensor) -> Mixed:
    columns = node.shape.cols.at(v.shape[2], v.shape[3])
    return _of_one(operands).each(lambda part: weigh(part, columns**-0.5))


def _gathered(node: Node, operands: list[Value], v: Tensor) -> Mixed:
    """Return the sum or the mean over rows."""
    mixed = _of_one(operands)
    if mixed.transposed:
        raise _refusal(node, "adds the channels of V")
    rows = node.operands[0].shape.rows.at(v.shape[2], v.shape[3])
    weights = v.new_full((*v.shape[:2], 1, rows), 1 / rows if node.primitive == "mean" else 1.0)
    return mixed.each(lambda part: combine(part, weights))


def _added(node: Node, operands: list[Value], v: Tensor) -> Mixed:
    left, right = operands
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        raise _refusal(node, "adds a value that does not come from V")
    if left.transposed != right.transposed:
        raise _refusal(node, "adds rows of V to channels of V")
    if node.primitive == "sub":
        right = right.each(lambda part: weigh(part, -1.0))
    both = [
        _repeated(each, operand, node, v) for each, operand in zip((left, right), node.operands, strict=True)
    ]
    return replace(left, parts=both[0].parts + both[1].parts)


def _repeated(mixed: Mixed, operand: Node, node: Node, v: Tensor) -> Mixed:
    """Return a value with its only row repeated, where `node` has more rows."""
    shapes = [each.transposed if mixed.transposed else each for each in (operand.shape, node.shape)]
    if shapes[0].rows == shapes[1].rows:
        return mixed
    ones = v.new_ones(*v.shape[:2], shapes[1].rows.at(v.shape[2], v.shape[3]), 1)
    return mixed.each(lambda part: combine(part, ones))


def _multiplied(node: Node, operands: list[Value], v: Tensor) -> Mixed:
    first = int(not isinstance(operands[0], Mixed))
    mixed, weights = operands[first], operands[1 - first]
    assert isinstance(mixed, Mixed)
    if isinstance(weights, Mixed):
        raise _refusal(node, "multiplies values of V with each other")
    own, other = node.operands[first].shape, node.operands[1 - first]
    shape = other.shape.transposed if mixed.transposed else other.shape
    if mixed.transposed:
        own, weights = own.transposed, weights.transpose(2, 3)
    elif other.primitive == "tileinv":  # equal columns
        weights, shape = weights[..., :1], replace(shape, cols=ONE)
    if shape.cols != ONE:
        raise _refusal(node, "weighs the channels of V, each in another way")
    if own.rows == ONE:
        return mixed.each(lambda part: combine(part, weights))
    return mixed.each(lambda part: weigh(part, weights))


def _product(node: Node, operands: list[Value], v: Tensor) -> Mixed:
    flips = PRODUCTS[node.primitive]
    left, right = operands
    if isinstance(left, Mixed) and isinstance(right, Mixed):
        raise _refusal(node, "multiplies values of V with each other")
    if isinstance(right, Mixed):
        assert isinstance(left, Tensor)
        if right.transposed != flips[1]:
            raise _refusal(node, "mixes the channels of V")
        x = left.transpose(2, 3) if flips[0] else left
        return Mixed(right.parts).each(lambda part: combine(part, x))
    assert isinstance(left, Mixed)
    if left.transposed == flips[0]:
        raise _refusal(node, "mixes the channels of V")
    x = right if flips[1] else right.transpose(2, 3)
    return Mixed(left.parts, transposed=True).each(lambda part: combine(part, x))


def _like_a_column(node: Node, operands: list[Value], v: Tensor) -> Value:
    """Return 1 / (x + 1e-8), as wide as a value of V."""
    column = operands[0]
    if isinstance(column, Mixed):
        raise _refusal(node, "is not linear in V")
    width = node.shape.cols.at(v.shape[2], v.shape[3])
    return PRIMITIVES["tileinv"].run(column, v.new_empty(1, 1, 1, width))


RULES: Mapping[str, Callable[[Node, list[Value], Tensor], Value]] = {
    "t": _transpose, "neg": _negative, "scale": _scaled, "sum": _gathered, "mean": _gathered, "add": _added,
    "sub": _added, "mul": _multiplied, "mm": _product, "tn": _product, "nt": _product, "tileinv": _like_a_column,
}  # fmt: skip
"""What primitives make of a value of V."""
REASONS = {"headsum": "adds the heads of V", "cat": "puts other columns beside those of V"}
"""Why other primitives have no rule, where they are linear in V."""
