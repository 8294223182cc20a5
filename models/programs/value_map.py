"""The map of a program that is linear in V: the matrix M (N×N) of each head with output M V, in factors.

A program has a map if it treats all channels of V alike: it mixes or weighs the rows of V, never its columns. No factor
is N×N unless the program itself forms such a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from .map_parts import Part, combine, weigh
from .polynomial import ONE
from .primitives import PRIMITIVES
from .program import PRODUCTS, Node, Program, ProgramError


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
