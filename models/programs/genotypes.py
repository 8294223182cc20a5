"""Genotypes as programs: follow the dimensions through AttnZero's operators, for any batch, heads, N and D.

A tensor of that code is a value of a program in one of four layouts: a matrix (B, H, rows, cols), a vector
(B, H, rows), a number of each head (B, H), or a constant without batch and heads. Where a result depends on the sizes,
on the batch or on memory that is overwritten, there is no program, and the error says why.

The program gives the numbers of that code for one image. Two cases are left out: a NaN of 0 / 0 or inf - inf that a
score or a sign turns into 0 later, and the cosine of a tensor of zeros with itself, which is 0 and not 1.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import did_you_mean
from .primitives import ONE
from .program import INPUTS, K, Node, Program, ProgramError, Q, V, apply, walk_operands
from .value_map import is_nonnegative

# The operators of AttnZero's code by their numbers, with its numbers: mistakes and changes in place included.
#
# Statistics run over the whole tensor, the batch included (6, 13). The cosine compares a tensor with itself
# and sums over the batch (binary 4). Contractions are chosen by the sizes that they meet (binary 5, 6). Three
# functions overwrite their operand (4, 11, 27).

Unary = Callable[[Tensor], Tensor]
Binary = Callable[[Tensor, Tensor], Tensor]


def abslog(x: Tensor) -> Tensor:
    return x.masked_fill_(x == 0, 1).abs().log()


def zscore(x: Tensor) -> Tensor:
    score = (x - x.mean()) / x.std()
    return score.masked_fill_(score.isnan(), 0)  # in place keeps the order in memory


def minmax(x: Tensor) -> Tensor:
    low, high = x.min(), x.max()
    return (x - low) / (high - low + 1e-9)


def root(x: Tensor) -> Tensor:
    return x.masked_fill_(x <= 0, 0).sqrt()


def scale(x: Tensor) -> Tensor:
    if x.ndim != 4:
        raise ProgramError(f"unary operator 15 takes 4 dimensions, and there are {x.ndim}")
    return x * x.shape[-1] ** -0.5


def tile_inverse(x: Tensor) -> Tensor:
    return 1 / (x.repeat(1, 1, 192) + 1e-8)


def share(x: Tensor) -> Tensor:
    return x.div_(x.sum(-1).unsqueeze(-1))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a.reshape(a.shape[0], -1), a.reshape(b.shape[0], -1)).sum()


def contraction(tokens: str, channels: str) -> Binary:
    """Return a product that contracts the tokens where both have as many, else the channels."""

    def contract(a: Tensor, b: Tensor) -> Tensor:
        if a.ndim != 4 or b.ndim != 4:
            raise ProgramError(
                f"binary operators 5 and 6 take 4 dimensions, and there are {a.ndim} and {b.ndim}"
            )
        if a.shape[:3] == b.shape[:3]:
            return torch.einsum(tokens, a, b)
        if a.shape[:2] == b.shape[:2] and a.shape[3] == b.shape[3]:
            return torch.einsum(channels, a, b)
        raise ProgramError(
            "binary operators 5 and 6 need as many tokens or as many channels, "
            f"not {tuple(a.shape)} and {tuple(b.shape)}"
        )

    return contract


UNARY: tuple[Unary, ...] = (
    lambda x: x,
    lambda x: x.transpose(-1, -2),
    lambda x: x.softmax(-1),
    lambda x: (x + 1e-9).log(),
    abslog,
    torch.abs,
    zscore,
    F.softsign,
    lambda x: 1 / (x + 1e-6),
    torch.sigmoid,
    lambda x: x.log_softmax(-1),
    root,
    torch.neg,
    minmax,
    torch.sign,
    scale,
    lambda x: F.elu(x) + 1,
    lambda x: x.sum(2),
    lambda x: x.unsqueeze(-1),
    F.relu,
    lambda x: F.normalize(x, dim=-2),
    torch.exp,
    lambda x: x.unsqueeze(0),
    lambda x: x.sum(1),
    tile_inverse,
    lambda x: F.normalize(x, dim=-1),
    lambda x: 1 - x.sigmoid(),
    share,
)
BINARY: tuple[Binary, ...] = (
    torch.add,
    F.pairwise_distance,
    torch.mul,
    torch.matmul,
    cosine,
    contraction("bhnd,bhne->bhde", "bhnd,bhed->bhne"),
    contraction("bhnd,bhne->bhed", "bhnd,bhed->bhen"),
    lambda a, b: torch.einsum("bnsd,bnd->bns", a, b),
    lambda a, b: torch.einsum("bti,bi->bt", a, b),
    lambda a, b: torch.cat((a, b), -1),
)


# Genotypes of AttnZero's code, run as that code runs them: with its numbers, whatever they are worth.
#
# A genotype names one of eight graphs, a chain of unary operators before each operand of a binary operator, and the
# binary operators, all by number (`legacy_operators`). `legacy_import` turns a genotype into a program.

MAX_CHAIN = 16
Value = TypeVar("Value")

GRAPHS: dict[str, str] = {
    "i3n2": "a=q0 b=k1 x=a.b c=v2 d=x3 out=d.c",
    "i3n301": "a=q0 b=k1 x=a.b c=v2 e=x4 d=x3 y=d.c f=y5 out=f.e",
    "i3n302": "a=k0 b=v1 c=v2 x=a.b d=x3 y=c.d e=q4 f=y5 out=e.f",
    "i3n303": "a=k0 b=v1 x=a.b d=x3 c=q2 y=c.d e=q4 f=y5 out=e.f",
    "i3n304": "a=k0 b=v1 x=a.b d=x3 c=q2 y=c.d e=v4 f=y5 out=e.f",
    "i3n305": "a=k0 b=v1 x=a.b c=q2 d=v3 y=c.d e=x4 f=y5 out=e.f",
    "i3n401": "a=k0 b=v1 x=a.b c=q2 d=k3 y=c.d e=q4 f=x5 z=e.f g=y6 h=z7 out=g.h",
    "i3n402": "a=k0 b=v1 x=a.b c=q2 d=x3 y=c.d e=v4 f=y5 z=e.f g=f6 h=z7 out=g.h",
}
"""The graphs, step by step: `a=q0` applies unary chain 0 to Q, `x=a.b` is the next binary operator of a and b.

A chain on an input starts from a copy. A chain on an intermediate value does not, so that an operator that overwrites
its operand also changes what later steps read (i3n301, i3n402)."""
BENCH_GRAPHS = {**GRAPHS, "i3n301": "a=q0 b=k1 x=a.b c=v2 d=x3 y=d.c e=x4 f=y5 out=f.e"}
"""The same in the benchmark's copy of the code, which applies chains 3 and 4 of i3n301 in the other order."""


@dataclass(frozen=True)
class Genotype:
    """A graph, its unary chains and its binary operators.

    Raises ProgramError: the graph does not exist, or a number or a count is wrong.
    """

    graph_type: str
    unary_op: tuple[tuple[int, ...], ...]
    binary_op: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.graph_type, str) or self.graph_type not in GRAPHS:
            graph = reprlib.repr(self.graph_type)
            raise ProgramError(f"unknown graph {graph}; {did_you_mean(graph.strip(repr('')), GRAPHS)}")
        count = GRAPHS[self.graph_type].count(".")
        if (len(self.unary_op), len(self.binary_op)) != (2 * count, count):
            raise ProgramError(
                f"{self.graph_type} takes {2 * count} unary chains and {count} binary operators, and "
                f"{len(self.unary_op)} and {len(self.binary_op)} are given"
            )
        for numbers, table in ((self.binary_op, BINARY), *((chain, UNARY) for chain in self.unary_op)):
            wrong = [number for number in numbers if type(number) is not int or not 0 <= number < len(table)]
            if wrong or len(numbers) > MAX_CHAIN:
                given = reprlib.repr(list(numbers))
                raise ProgramError(
                    f"operators are up to {MAX_CHAIN} numbers from 0 to {len(table) - 1}, not {given}"
                )

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Genotype:
        """Return the genotype of a mapping with the keys of AttnZero's code.

        Raises ProgramError: a key is missing, or a value is not what the key needs.
        """
        try:
            chains = tuple(tuple(chain) for chain in given["unary_op"])
            return cls(given["graph_type"], chains, tuple(given["binary_op"]))
        except (KeyError, TypeError) as error:
            raise ProgramError(
                f"a genotype has graph_type, unary_op (lists of numbers) and binary_op (numbers): {error}"
            ) from error

    def described(self) -> dict[str, Any]:
        """Return the mapping that `read` takes."""
        chains = [list(chain) for chain in self.unary_op]
        return {"graph_type": self.graph_type, "unary_op": chains, "binary_op": list(self.binary_op)}


def walk(
    genotype: Genotype,
    inputs: Mapping[str, Value],
    copy: Callable[[Value], Value],
    unary: Callable[[int, Value], Value],
    binary: Callable[[int, Value, Value], Value],
    graphs: Mapping[str, str] = GRAPHS,
) -> Value:
    """Return the output of a genotype over values of any kind, such as tensors or nodes of programs."""
    values, joins = dict(inputs), iter(genotype.binary_op)
    for step in graphs[genotype.graph_type].split():
        target, source = step.split("=")
        if "." in source:
            left, right = source.split(".")
            values[target] = binary(next(joins), values[left], values[right])
            continue
        value = values[source[0]]
        value = copy(value) if source[0] in inputs else value
        for number in genotype.unary_op[int(source[1:])]:
            value = unary(number, value)
        values[target] = value
    return values["out"]


def run_legacy(genotype: Genotype, q: Tensor, k: Tensor, v: Tensor, *, bench: bool = False) -> Tensor:
    """Return what AttnZero's code computes from q, k and v (B, H, N, D), in whatever shape.

    `bench` takes the order of its benchmark's copy in the graph i3n301.

    Raises ProgramError: that code raises.
    """
    try:
        return walk(
            genotype,
            {"q": q, "k": k, "v": v},
            Tensor.clone,
            lambda number, x: UNARY[number](x),
            lambda number, a, b: BINARY[number](a, b),
            BENCH_GRAPHS if bench else GRAPHS,
        )
    except (RuntimeError, IndexError, ValueError) as error:
        raise ProgramError(f"{genotype.described()} cannot be computed: {error}") from error


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
class SymbolicValue:
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

    def holding(self, node: Node, dims: int | None = None) -> SymbolicValue:
        """Return another tensor, in memory of its own."""
        return SymbolicValue(Memory(node), self.dims if dims is None else dims, self.constant)

    @property
    def layout(self) -> str:
        if self.constant:
            return f"a constant of {self.dims} dimensions"
        return {MATRIX: "a matrix", VECTOR: "a vector", A_HEAD: "a number of each head"}[self.dims]


def import_genotype(genotype: Genotype) -> Program:
    """Return the program that computes what the genotype computes for one image, where that is defined.

    Raises ProgramError: it has no form that holds for all sizes; the error says why.
    """
    inputs = {name: SymbolicValue(Memory(node)) for name, node in (("q", Q), ("k", K), ("v", V))}
    out = walk(genotype, inputs, lambda value: value.holding(value.node), _unary, _binary)
    if out.dims != MATRIX:
        raise ProgramError(f"no program: the output is {out.layout}")
    return Program(out.node)


def _unary(number: int, value: SymbolicValue) -> SymbolicValue:
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


def _changed(number: int, value: SymbolicValue) -> SymbolicValue | None:
    if number in ELEMENTWISE:
        return value.holding(apply(ELEMENTWISE[number], value.node))
    if number == 6 and value.dims > A_HEAD and not value.constant:
        return value.holding(apply("zscore", value.node))
    if value.constant:
        return _of_a_constant(number, value)
    if number == 18 and value.dims < MATRIX:
        return replace(value, dims=value.dims + 1)
    return {MATRIX: _of_a_matrix, VECTOR: _of_a_vector}.get(value.dims, lambda number, value: None)(
        number, value
    )


OVERWRITES = (4, 11, 27)


def _overwrite(number: int, value: SymbolicValue, changed: SymbolicValue) -> SymbolicValue:
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


def _of_a_matrix(number: int, value: SymbolicValue) -> SymbolicValue | None:
    if number in LAST or number in OF_MATRICES:
        return value.holding(apply((LAST | OF_MATRICES)[number], value.node))
    if number == 17:
        return value.holding(apply("t", apply("sum", value.node)), VECTOR)
    return None


def _of_a_vector(number: int, value: SymbolicValue) -> SymbolicValue | None:
    if number in LAST:
        return value.holding(apply("t", apply(LAST[number], apply("t", value.node))))
    return value.holding(apply("sum", value.node), A_HEAD) if number == 17 else None


def _of_a_constant(number: int, value: SymbolicValue) -> SymbolicValue | None:
    if number in LAST and (number != 27 or value.dims):
        return value.holding(apply(LAST[number], value.node))
    if number in OF_MATRICES and value.dims == MATRIX:
        return value.holding(apply(OF_MATRICES[number], value.node))
    if number in (18, 22) and value.dims < MATRIX:
        return replace(value, dims=value.dims + 1)
    return value.holding(value.node, value.dims - 1) if number == 17 and value.dims >= VECTOR else None


def _binary(number: int, left: SymbolicValue, right: SymbolicValue) -> SymbolicValue:
    both, dims = (left.node, right.node), (left.dims, right.dims)
    if number in (0, 2):
        if _line_up(left, right):
            node = apply("add" if number == 0 else "mul", *both)
            return SymbolicValue(Memory(node), max(dims), left.constant and right.constant)
    elif number == 4:
        if left.constant == right.constant and min(dims) > 0:
            return SymbolicValue(Memory(apply("one")), 0, True)
    elif number == 8:
        if (
            not left.constant
            and not right.constant
            and dims == (VECTOR, A_HEAD)
            and left.node.shape.rows == ONE
        ):
            return SymbolicValue(Memory(apply("mul", left.node, apply("headsum", right.node))), A_HEAD)
    elif number == 1 and (left.constant or right.constant):
        if _line_up(left, right) and max(dims) == MATRIX and left.constant != right.constant:
            return SymbolicValue(Memory(apply("dist", *both)), VECTOR)
    elif not left.constant and not right.constant:
        found = _join(number, left, right)
        if found is not None:
            return found
    raise ProgramError(
        f"no program: binary operator {number} of {left.layout} {left.node.shape} and {right.layout} "
        f"{right.node.shape} raises, or works for some sizes alone"
    )


def _line_up(left: SymbolicValue, right: SymbolicValue) -> bool:
    if left.constant or right.constant:
        small, other = (left, right) if left.constant else (right, left)
        return other.constant or small.dims <= other.dims
    return left.dims == right.dims


def _join(number: int, left: SymbolicValue, right: SymbolicValue) -> SymbolicValue | None:
    a, b = left.node, right.node
    kinds = left.dims, right.dims
    if number == 7 and kinds == (MATRIX, VECTOR):
        return SymbolicValue(Memory(_contraction(a, b)), VECTOR)
    if kinds == (VECTOR, VECTOR) and number in (1, 9):
        node = apply("dist" if number == 1 else "cat", apply("t", a), apply("t", b))
        return (
            SymbolicValue(Memory(node), A_HEAD)
            if number == 1
            else SymbolicValue(Memory(apply("t", node)), VECTOR)
        )
    if kinds != (MATRIX, MATRIX) or number == 7:
        return None
    if number in (5, 6):
        kind = "tn" if a.shape.rows == b.shape.rows else "nt"
        return SymbolicValue(Memory(apply(kind, *((a, b) if number == 5 else (b, a)))))
    node = apply({1: "dist", 3: "mm", 9: "cat"}[number], a, b)
    return SymbolicValue(Memory(node), VECTOR if number == 1 else MATRIX)


def _contraction(a: Node, b: Node) -> Node:
    """Return Σ_c a_rc b_c, where a size of 1 repeats."""
    if a.shape.cols != b.shape.rows and b.shape.rows == ONE:
        return apply("mul", apply("t", apply("sum", apply("t", a))), b)
    if a.shape.cols != b.shape.rows and a.shape.cols == ONE:
        return apply("mul", a, apply("sum", b))
    return apply("mm", a, b)


# Programs as genotypes of AttnZero's code: the importer, read backwards.

NUMBERS = {name: number for number, name in (ELEMENTWISE | LAST | OF_MATRICES | {6: "zscore"}).items()}
ALONG_ROWS = set(LAST.values())
CONSTANT = 0
MAX_TRIES = 20_000

Typed = tuple[Node, int]
"""A value and the number of dimensions that it has in that code."""
ANYTHING = (Q, -1)
"""A value that does not matter: an operand of binary operator 4, which gives the number one."""


@dataclass(frozen=True)
class Found:
    """What is fixed so far: intermediate values, chains by number, binary operators by target."""

    values: Mapping[str, Typed] = field(default_factory=dict)
    chains: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    joins: Mapping[str, int] = field(default_factory=dict)


def export_program(program: Program) -> Genotype:
    """Return a genotype that `import_genotype` turns into this program, of the smallest graph that has one.

    Raises ProgramError: the search finds none.
    """
    for graph, text in GRAPHS.items():
        steps = dict(step.split("=") for step in text.split())
        search = _Search(steps)
        for found in search.value("out", (program.root, MATRIX), Found()):
            order = [target for target in steps if "." in steps[target]]
            genotype = Genotype(
                graph,
                tuple(found.chains[index] or (0,) for index in range(2 * len(order))),
                tuple(found.joins[target] for target in order),
            )
            if _imports_as(genotype, program):
                return genotype
    raise ProgramError(f"no genotype: no way is found to write as one of AttnZero's graphs: {program.text}")


def _imports_as(genotype: Genotype, program: Program) -> bool:
    try:
        return import_genotype(genotype) == program
    except ProgramError:
        return False


class _Search:
    """The ways to read values as steps of one graph, at most `MAX_TRIES` of them."""

    def __init__(self, steps: Mapping[str, str]) -> None:
        self.steps = steps
        self.tries = 0

    def value(self, target: str, typed: Typed, found: Found) -> Iterator[Found]:
        """Yield every way in which step `target`, or an input, gives this value."""
        self.tries += 1
        if target in INPUTS:
            if typed == ANYTHING or (typed[0].text == target and typed[1] == MATRIX):
                yield found
        elif target in found.values:
            if typed in (ANYTHING, found.values[target]):
                yield found
        elif self.tries <= MAX_TRIES:
            known = Found({**found.values, target: typed}, found.chains, found.joins)
            source = self.steps[target]
            yield from (
                self._join(target, typed, known) if "." in source else self._chain(source, typed, (), known)
            )

    def _chain(self, source: str, typed: Typed, chain: tuple[int, ...], found: Found) -> Iterator[Found]:
        index, name = int(source[1:]), source[0]
        if len(chain) > MAX_CHAIN:
            return
        with_chain = Found(found.values, {**found.chains, index: chain}, found.joins)
        yield from self.value(name, typed, with_chain)
        for number, inner in _unary_choices(typed):
            if chain[:1] == (number,) == (1,):  # two transposes
                continue
            yield from self._chain(source, inner, (number, *chain), found)

    def _join(self, target: str, typed: Typed, found: Found) -> Iterator[Found]:
        left, right = self.steps[target].split(".")
        for number, first, second in _binary_choices(typed):
            known = Found(found.values, found.chains, {**found.joins, target: number})
            for half in self.value(left, first, known):
                yield from self.value(right, second, half)


def _unary_choices(typed: Typed) -> Iterator[tuple[int, Typed]]:
    """Yield the unary operators that may give a value, with their operands."""
    node, dims = typed
    if dims == MATRIX and node.shape.cols == ONE:
        yield 18, (node, VECTOR)
    if dims == VECTOR and node.primitive == "t":
        [row] = node.operands
        if row.primitive == "sum":
            yield 17, (row.operands[0], MATRIX)
        if row.primitive in ALONG_ROWS:
            yield NUMBERS[row.primitive], (apply("t", row.operands[0]), VECTOR)
    if dims == MATRIX and node.primitive in ("tn", "nt"):
        yield 1, (apply("t", node), MATRIX)
    if node.primitive in NUMBERS and (dims == MATRIX or node.primitive not in _elsewhere(dims)):
        yield NUMBERS[node.primitive], (node.operands[0], dims)


def _elsewhere(dims: int) -> set[str]:
    """Return the primitives that another operator computes in this layout, or none."""
    along = {"sumnorm"} if dims == CONSTANT else ALONG_ROWS
    return along | set(OF_MATRICES.values())


def _is_constant(node: Node) -> bool:
    return node.primitive == "one" or (bool(node.operands) and all(map(_is_constant, node.operands)))


def _binary_choices(typed: Typed) -> Iterator[tuple[int, Typed, Typed]]:
    """Yield the binary operators that may give a value, with their operands."""
    node, dims = typed
    kind, operands = node.primitive, node.operands
    if typed == ANYTHING:
        yield 0, ANYTHING, ANYTHING
    if kind == "one":
        yield 4, ANYTHING, ANYTHING
    if len(operands) != 2:
        return
    a, b = operands
    if kind in ("add", "mul"):
        for left, right in ((a, b), (b, a)):
            other = CONSTANT if _is_constant(right) else dims
            yield {"add": 0, "mul": 2}[kind], (left, CONSTANT if _is_constant(left) else dims), (right, other)
    elif dims == VECTOR:
        if kind == "dist":
            yield 1, (a, MATRIX), (b, MATRIX)
        if kind == "mm":
            yield 7, (a, MATRIX), (b, VECTOR)
        if kind == "nt":
            yield 7, (a, MATRIX), (apply("t", b), VECTOR)
    elif kind in ("mm", "cat"):
        yield {"mm": 3, "cat": 9}[kind], (a, MATRIX), (b, MATRIX)
        for left, right in ((apply("t", a), b), (a, apply("t", b))) if kind == "mm" else ():
            yield 5, (left, MATRIX), (right, MATRIX)
            yield 6, (right, MATRIX), (left, MATRIX)
    elif kind in ("tn", "nt"):
        yield 5, (a, MATRIX), (b, MATRIX)
        yield 6, (b, MATRIX), (a, MATRIX)
        if kind == "tn":
            yield 3, (apply("t", a), MATRIX), (b, MATRIX)
        else:
            yield 3, (a, MATRIX), (apply("t", b), MATRIX)
