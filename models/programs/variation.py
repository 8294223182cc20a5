"""Variation of programs: exchange a value by another of the same shape, which keeps a program well typed."""

from __future__ import annotations

from random import Random

from .drawing import RULES, draw_value
from .primitives import PRIMITIVES
from .program import INPUTS, Node, Program, ProgramError, apply

DEPTH = 2
"""Levels of a value that is drawn again."""
TRIES = 1_000


def mutate(program: Program, random: Random) -> Program:
    """Return a program with one value drawn again, computed by another primitive, or replaced by one of its operands.

    It reads Q, K and V and differs from `program`. Raises ProgramError: none was found.
    """
    for _ in range(TRIES):
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
    for _ in range(TRIES):
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
        return draw_value(random, old.shape, random.randint(0, DEPTH))
    raise ProgramError(f"no rule draws {old.shape}")


def _exchanged(node: Node, old: Node, new: Node) -> Node:
    if node == old:
        return new
    if not node.operands:
        return node
    return apply(node.primitive, *(_exchanged(each, old, new) for each in node.operands))
