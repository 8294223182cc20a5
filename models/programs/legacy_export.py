"""Programs as genotypes of AttnZero's code: the importer, read backwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .legacy import GRAPHS, MAX_CHAIN, Genotype
from .legacy_import import ELEMENTWISE, LAST, MATRIX, OF_MATRICES, VECTOR, import_genotype
from .polynomial import ONE
from .program import INPUTS, Node, Program, ProgramError, Q, apply

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
        for number, inner in _unary(typed):
            if chain[:1] == (number,) == (1,):  # two transposes
                continue
            yield from self._chain(source, inner, (number, *chain), found)

    def _join(self, target: str, typed: Typed, found: Found) -> Iterator[Found]:
        left, right = self.steps[target].split(".")
        for number, first, second in _binary(typed):
            known = Found(found.values, found.chains, {**found.joins, target: number})
            for half in self.value(left, first, known):
                yield from self.value(right, second, half)


def _unary(typed: Typed) -> Iterator[tuple[int, Typed]]:
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


def _binary(typed: Typed) -> Iterator[tuple[int, Typed, Typed]]:
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
