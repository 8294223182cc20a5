"""Genotypes as programs: follow the dimensions through AttnZero's operators, for any batch, heads, N and D.

A tensor of that code is a value of a program in one of four layouts: a matrix (B, H, rows, cols), a vector
(B, H, rows), a number of each head (B, H), or a constant without batch and heads. Where a result depends on the sizes,
on the batch or on memory that is overwritten, there is no program, and the error says why.

The program gives the numbers of that code for one image. Two cases are left out: a NaN of 0 / 0 or inf - inf that a
score or a sign turns into 0 later, and the cosine of a tensor of zeros with itself, which is 0 and not 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .legacy import Genotype, walk
from .map_traits import is_nonnegative
from .polynomial import ONE
from .program import K, Node, Program, ProgramError, Q, V, apply, walk_operands

MATRIX, VECTOR, A_HEAD = 4, 3, 2
"""The number of dimensions of a layout."""
ELEMENTWISE = {
    3: "log", 4: "abslog", 5: "abs", 7: "softsign", 8: "recip", 9: "sigmoid", 11: "sqrt", 12: "neg", 13: "minmax",
    14: "sign", 16: "elu1", 19: "relu", 21: "exp", 26: "cosigmoid",
}  # fmt: skip
"""Unary operators that are the same in every layout, with their primitives."""
LAST = {2: "softmax", 10: "logsoftmax", 25: "l2", 27: "sumnorm"}
"""Those along the last dimension."""
OF_MATRICES = {1: "t", 15: "scale", 20: "l2t"}


@dataclass
class Memory:
    """What one or more tensors of AttnZero's code hold; `spoiled_by` is an operator that left no value in it."""

    node: Node
    spoiled_by: int | None = None


@dataclass(frozen=True)
class Value:
    """A tensor of AttnZero's code; in a constant, `dims` counts dimensions of size 1."""

    memory: Memory
    dims: int = MATRIX
    constant: bool = False
    flipped: bool = False
    """It is the transpose of what the memory holds."""

    @property
    def node(self) -> Node:
        if self.memory.spoiled_by is not None:
            raise ProgramError(
                f"no program: unary operator {self.memory.spoiled_by} overwrites a value that is read again"
            )
        return apply("t", self.memory.node) if self.flipped else self.memory.node

    def holding(self, node: Node, dims: int | None = None) -> Value:
        """Return another tensor, in memory of its own."""
        return Value(Memory(node), self.dims if dims is None else dims, self.constant)

    @property
    def layout(self) -> str:
        if self.constant:
            return f"a constant of {self.dims} dimensions"
        return {MATRIX: "a matrix", VECTOR: "a vector", A_HEAD: "a number of each head"}[self.dims]


def import_genotype(genotype: Genotype) -> Program:
    """Return the program that computes what the genotype computes for one image, where that is defined.

    Raises ProgramError: it has no form that holds for all sizes; the error says why.
    """
    inputs = {name: Value(Memory(node)) for name, node in (("q", Q), ("k", K), ("v", V))}
    out = walk(genotype, inputs, lambda value: value.holding(value.node), _unary, _binary)
    if out.dims != MATRIX:
        raise ProgramError(f"no program: the output is {out.layout}")
    return Program(out.node)


def _unary(number: int, value: Value) -> Value:
    if number == 0:
        return value
    if number == 1 and value.dims == MATRIX:
        return replace(value, flipped=not value.flipped)
    if number in (6, 14) and _may_hold_nan(value.node):
        raise ProgramError(
            f"no program: unary operator {number} turns into 0 what is NaN in that code, the log of a negative number"
        )
    changed = _changed(number, value)
    if changed is None:
        raise ProgramError(f"no program: unary operator {number} of {value.layout} {REASONS[number]}")
    return _overwrite(number, value, changed) if number in OVERWRITES else changed


def _may_hold_nan(node: Node) -> bool:
    logs = (each for each in walk_operands(node) if each.primitive == "log")
    return not all(is_nonnegative(walk_operands(log.operands[0])) for log in logs)


def _changed(number: int, value: Value) -> Value | None:
    if number in ELEMENTWISE:
        return value.holding(apply(ELEMENTWISE[number], value.node))
    if number == 6 and value.dims > A_HEAD and not value.constant:
        return value.holding(apply("zscore", value.node))
    if value.constant:
        return _of_a_constant(number, value)
    if number == 18 and value.dims < MATRIX:
        return replace(value, dims=value.dims + 1)
    return {MATRIX: _of_a_matrix, VECTOR: _of_a_vector}.get(value.dims, _of_nothing)(number, value)


OVERWRITES = (4, 11, 27)


def _overwrite(number: int, value: Value, changed: Value) -> Value:
    """Change the memory of the operand of an operator, which other tensors may share; return its result."""
    if number == 27:  # the result is the memory
        value.memory.node = apply("t", changed.node) if value.flipped else changed.node
        return value
    if number == 11:
        value.memory.node = apply("relu", value.memory.node)
    else:
        value.memory.spoiled_by = number
    return changed


REASONS = {
    1: "exchanges other dimensions than rows and columns",
    6: "has no deviation",
    15: "raises",
    17: "sums over other things than tokens",
    18: "adds a fifth dimension",
    20: "normalizes over heads",
    22: "puts a dimension before the batch, which mixes images and heads",
    23: "takes the dimension of the heads away, where later operators expect it",
    24: "has a width of 192, whatever the model",
} | dict.fromkeys(LAST, "runs over heads, or over nothing")


def _of_a_matrix(number: int, value: Value) -> Value | None:
    if number in LAST or number in OF_MATRICES:
        return value.holding(apply((LAST | OF_MATRICES)[number], value.node))
    if number == 17:
        return value.holding(apply("t", apply("sum", value.node)), VECTOR)
    return None


def _of_a_vector(number: int, value: Value) -> Value | None:
    if number in LAST:
        return value.holding(apply("t", apply(LAST[number], apply("t", value.node))))
    return value.holding(apply("sum", value.node), A_HEAD) if number == 17 else None


def _of_nothing(number: int, value: Value) -> None:
    return None


def _of_a_constant(number: int, value: Value) -> Value | None:
    if number in LAST and (number != 27 or value.dims):
        return value.holding(apply(LAST[number], value.node))
    if number in OF_MATRICES and value.dims == MATRIX:
        return value.holding(apply(OF_MATRICES[number], value.node))
    if number in (18, 22) and value.dims < MATRIX:
        return replace(value, dims=value.dims + 1)
    return value.holding(value.node, value.dims - 1) if number == 17 and value.dims >= VECTOR else None


def _binary(number: int, left: Value, right: Value) -> Value:
    both, dims = (left.node, right.node), (left.dims, right.dims)
    if number in (0, 2):
        if _line_up(left, right):
            node = apply("add" if number == 0 else "mul", *both)
            return Value(Memory(node), max(dims), left.constant and right.constant)
    elif number == 4:
        if left.constant == right.constant and min(dims) > 0:
            return Value(Memory(apply("one")), 0, True)
    elif number == 8:
        if (
            not left.constant
            and not right.constant
            and dims == (VECTOR, A_HEAD)
            and left.node.shape.rows == ONE
        ):
            return Value(Memory(apply("mul", left.node, apply("headsum", right.node))), A_HEAD)
    elif number == 1 and (left.constant or right.constant):
        if _line_up(left, right) and max(dims) == MATRIX and left.constant != right.constant:
            return Value(Memory(apply("dist", *both)), VECTOR)
    elif not left.constant and not right.constant:
        found = _join(number, left, right)
        if found is not None:
            return found
    raise ProgramError(
        f"no program: binary operator {number} of {left.layout} {left.node.shape} and {right.layout} "
        f"{right.node.shape} raises, or works for some sizes alone"
    )


def _line_up(left: Value, right: Value) -> bool:
    if left.constant or right.constant:
        small, other = (left, right) if left.constant else (right, left)
        return other.constant or small.dims <= other.dims
    return left.dims == right.dims


def _join(number: int, left: Value, right: Value) -> Value | None:
    a, b = left.node, right.node
    kinds = left.dims, right.dims
    if number == 7 and kinds == (MATRIX, VECTOR):
        return Value(Memory(_contraction(a, b)), VECTOR)
    if kinds == (VECTOR, VECTOR) and number in (1, 9):
        node = apply("dist" if number == 1 else "cat", apply("t", a), apply("t", b))
        return Value(Memory(node), A_HEAD) if number == 1 else Value(Memory(apply("t", node)), VECTOR)
    if kinds != (MATRIX, MATRIX) or number == 7:
        return None
    if number in (5, 6):
        kind = "tn" if a.shape.rows == b.shape.rows else "nt"
        return Value(Memory(apply(kind, *((a, b) if number == 5 else (b, a)))))
    node = apply({1: "dist", 3: "mm", 9: "cat"}[number], a, b)
    return Value(Memory(node), VECTOR if number == 1 else MATRIX)


def _contraction(a: Node, b: Node) -> Node:
    """Return Σ_c a_rc b_c, where a size of 1 repeats."""
    if a.shape.cols != b.shape.rows and b.shape.rows == ONE:
        return apply("mul", apply("t", apply("sum", apply("t", a))), b)
    if a.shape.cols != b.shape.rows and a.shape.cols == ONE:
        return apply("mul", a, apply("sum", b))
    return apply("mm", a, b)
