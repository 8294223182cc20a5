"""What a program's formula shows about its map: that it is nonnegative, and that its rows sum to one.

Both are read off the graph and hold for all inputs. Where the formula does not show one, it is not claimed.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

from .polynomial import SCALAR
from .program import Node, Program, ProgramError, apply

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
