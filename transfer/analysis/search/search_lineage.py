"""The ancestors of the programs of a front."""

from __future__ import annotations

from collections.abc import Sequence

from ...search.evolution import Evaluation


def ancestors(program: Evaluation, done: Sequence[Evaluation]) -> list[Evaluation]:
    """Return the program and all that it comes from, the newest generation first."""
    by_text = _first_of_each(done)
    found: dict[str, Evaluation] = {}
    waiting = [program]
    while waiting:
        each = waiting.pop(0)
        if each.program not in found:
            found[each.program] = each
            waiting += [by_text[parent] for parent in each.parents]
    return sorted(found.values(), key=lambda one: (-one.generation, one.program))


def line_of_descent(program: Evaluation, done: Sequence[Evaluation]) -> list[Evaluation]:
    """Return the program, its first parent, the first parent of that, and so on to a drawn program."""
    by_text = _first_of_each(done)
    line = [program]
    while line[-1].parents:
        line.append(by_text[line[-1].parents[0]])
    return line


def _first_of_each(done: Sequence[Evaluation]) -> dict[str, Evaluation]:
    """Return the first evaluation of each program: its parents are older, also where it was drawn again later."""
    return {each.program: each for each in reversed(done)}
