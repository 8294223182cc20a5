"""Draw random programs that are well typed, from the output to the inputs."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from .primitives import ONE, PRIMITIVES, SCALAR, TOKENS, D, N, Shape
from .program import INPUTS, K, Node, Program, ProgramError, Q, V, apply

CHANNELS, COLUMN, ROW = Shape(D, D), Shape(N, ONE), Shape(ONE, D)
WIDE, TALL, MAP = Shape(N, D + D), Shape(D + D, D), Shape(N, N)


class Rule(NamedTuple):
    """A primitive that gives a shape, with the shapes of its operands and how often it is drawn."""

    weight: float
    name: str
    operands: tuple[Shape, ...]


ELEMENTWISE = (
    "abs", "softsign", "sigmoid", "cosigmoid", "relu", "gelu", "elu1", "neg", "scale", "exp", "log", "abslog", "sqrt",
    "recip", "sign",
)  # fmt: skip
ALONG = ("softmax", "logsoftmax", "l2", "l2t", "l1", "sumnorm", "layernorm", "zscore", "minmax", "headsum")


def _alike(shape: Shape, names: tuple[str, ...], weight: float) -> list[Rule]:
    return [Rule(weight, name, (shape,)) for name in names]


RULES: dict[Shape, list[Rule]] = {
    TOKENS: [
        Rule(6, "mm", (TOKENS, CHANNELS)),
        Rule(2, "nt", (TOKENS, CHANNELS)),
        Rule(2, "add", (TOKENS, TOKENS)),
        Rule(2, "mul", (TOKENS, TOKENS)),
        Rule(0.5, "sub", (TOKENS, TOKENS)),
        Rule(0.5, "max", (TOKENS, TOKENS)),
        Rule(1, "mul", (TOKENS, COLUMN)),
        Rule(0.5, "add", (TOKENS, ROW)),
        Rule(0.5, "mul", (TOKENS, ROW)),
        Rule(0.2, "mul", (TOKENS, SCALAR)),
        Rule(0.2, "tileinv", (COLUMN, TOKENS)),
        Rule(0.5, "mm", (WIDE, TALL)),
        Rule(0.2, "mm", (MAP, TOKENS)),
        *_alike(TOKENS, ELEMENTWISE, 0.15),
        *_alike(TOKENS, ALONG, 0.3),
    ],
    CHANNELS: [
        Rule(8, "tn", (TOKENS, TOKENS)),
        Rule(0.5, "t", (CHANNELS,)),
        Rule(0.5, "mm", (CHANNELS, CHANNELS)),
        *_alike(CHANNELS, ELEMENTWISE, 0.1),
        *_alike(CHANNELS, ALONG, 0.3),
    ],
    COLUMN: [
        Rule(2, "nt", (TOKENS, ROW)),
        Rule(1, "dist", (TOKENS, TOKENS)),
        Rule(2, "recip", (COLUMN,)),
        *_alike(COLUMN, ELEMENTWISE, 0.1),
    ],
    ROW: [Rule(1, "mean", (TOKENS,)), Rule(1, "sum", (TOKENS,)), *_alike(ROW, ELEMENTWISE, 0.05)],
    SCALAR: [Rule(1, "cosine", (TOKENS, TOKENS)), Rule(0.5, "one", ())],
    WIDE: [Rule(1, "cat", (TOKENS, TOKENS))],
    TALL: [Rule(1, "tn", (WIDE, TOKENS))],
    MAP: [Rule(1, "nt", (TOKENS, TOKENS)), Rule(1, "softmax", (MAP,))],
}
ENDING: dict[Shape, Rule] = {
    shape: min(rules, key=lambda rule: sum(each != TOKENS for each in rule.operands))
    for shape, rules in RULES.items()
}
"""The way to end at the inputs where the depth is used up."""
DEPTH = 5
TRIES = 1_000


def draw_program(random: Random, depth: int = DEPTH) -> Program:
    """Return a program of at most about `depth` levels that reads Q, K and V.

    Raises ProgramError: none was found.
    """
    for _ in range(TRIES):
        try:
            program = Program(draw_value(random, TOKENS, depth))
        except ProgramError:  # the text is too long
            continue
        if program.inputs == INPUTS:
            return program
    raise ProgramError(f"no program of depth {depth} reads Q, K and V")


def draw_value(random: Random, shape: Shape, depth: int) -> Node:
    """Return a value of a shape that `RULES` has, of at most about `depth` levels."""
    if shape == TOKENS and (depth <= 0 or random.random() < 1 / (2 * depth)):
        return random.choice((Q, K, V))
    rules = RULES[shape]
    rule = ENDING[shape] if depth <= 0 else random.choices(rules, [each.weight for each in rules])[0]
    return apply(rule.name, *(draw_value(random, each, depth - 1) for each in rule.operands))


# Variation of programs: exchange a value by another of the same shape, which keeps a program well typed.

MUTATION_DEPTH = 2
"""Levels of a value that is drawn again."""
MUTATION_TRIES = 1_000


def mutate(program: Program, random: Random) -> Program:
    """Return a program with one value drawn again, computed by another primitive, or replaced by one of its operands.

    It reads Q, K and V and differs from `program`. Raises ProgramError: none was found.
    """
    for _ in range(MUTATION_TRIES):
        old = random.choice(program.nodes)
        try:
            found = Program(_exchanged(program.root, old, _another(old, random)))
        except ProgramError:  # too long, or no other primitive takes these operands
            continue
        if found.inputs == INPUTS and found != program:
            return found
    raise ProgramError(f"no other program is near {program.text}")


def cross(program: Program, other: Program, random: Random) -> Program:
    """Return `program` with one value exchanged by a value of `other` of the same shape; `program` if none fits."""
    for _ in range(MUTATION_TRIES):
        old, new = random.choice(program.nodes), random.choice(other.nodes)
        if old.shape != new.shape or not new.primitive:
            continue
        try:
            found = Program(_exchanged(program.root, old, new))
        except ProgramError:
            continue
        if found.inputs == INPUTS:
            return found
    return program


def _another(old: Node, random: Random) -> Node:
    """Return another value of the same shape."""
    kind = random.randrange(3)
    alike = [each for each in old.operands if each.shape == old.shape]
    if kind == 0 and alike:
        return random.choice(alike)
    if kind == 1 and old.primitive:
        shapes = [each.shape for each in old.operands]
        rows = [row for row in PRIMITIVES.values() if row.arity == len(shapes)]
        names = [row.name for row in rows if row.shape(*shapes) == old.shape]
        return apply(random.choice(names), *old.operands)
    if old.shape in RULES:
        return draw_value(random, old.shape, random.randint(0, MUTATION_DEPTH))
    raise ProgramError(f"no rule draws {old.shape}")


def _exchanged(node: Node, old: Node, new: Node) -> Node:
    if node == old:
        return new
    if not node.operands:
        return node
    return apply(node.primitive, *(_exchanged(each, old, new) for each in node.operands))
