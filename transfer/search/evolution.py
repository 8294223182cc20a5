"""Evolution of programs in generations, of which each is a pure function of the seed and of earlier evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Annotated

from pydantic import Field

from ...models.programs.drawing import cross, draw_program, mutate
from ...models.programs.program import Program, parse_program
from ..cells.records import Ending, Whole

RECENT = 2
"""Generations whose programs can be parents, beside the front."""
CROSSED = 0.3
"""The part of children of two parents; each child is also mutated."""
CONTEST = 4
"""Candidates for a parent, of which the best is taken."""
TRIES = 50
Error = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Evaluation(Ending):
    """The record of one evaluation."""

    generation: Whole = 0
    program: str = ""
    parents: tuple[str, ...] = ()
    refused: str = ""
    """The check that refused the program; empty if it was measured."""
    reason: str = ""
    mismatch: Error | None = None
    """Of the teacher's attention (`matching.mismatch`), the mean over teachers; None if it was refused."""
    cost: Whole = 0
    """Multiply-adds and entries of all layers, for one image."""
    errors: tuple[Error, ...] = ()
    """The mismatch with each teacher."""

    @property
    def objectives(self) -> tuple[float, ...]:
        """Return what a front compares beside the cost."""
        return self.errors or (math.inf if self.mismatch is None else self.mismatch,)


@dataclass(frozen=True)
class Child:
    """A program to evaluate, and the texts of those that it comes from."""

    program: Program
    parents: tuple[str, ...] = ()


def propose(
    seed: int, generation: int, count: int, earlier: Sequence[Evaluation], *, at_random: bool = False
) -> list[Child]:
    """Return the programs of a generation, all of which are new.

    The first generation is drawn. Later ones are children of the front and of the last generations. `at_random` draws
    every generation, for comparison.
    """
    seen = {each.program for each in earlier}
    children: list[Child] = []
    parents = _parents(generation, earlier)
    for slot in range(count):
        random = Random(f"{seed}/{generation}/{slot}")
        child = Child(draw_program(random))
        for _ in range(TRIES):
            if parents and not at_random:
                child = _child(parents, random)
            elif child.program.text in seen:
                child = Child(draw_program(random))
            if child.program.text not in seen:
                break
        seen.add(child.program.text)
        children.append(child)
    return children


def front(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Return the evaluations that no other one beats in cost and the mismatch with each teacher, the cheapest first."""
    best: list[Evaluation] = []
    measured = [each for each in evaluations if each.mismatch is not None]
    for each in sorted(measured, key=lambda one: (one.cost, one.mismatch, one.program)):
        if not any(_covers(one, each) for one in best):
            best.append(each)
    return best


def hypervolume(evaluations: Sequence[Evaluation], cost: int) -> float:
    """Return the part of the area below mismatch 1 and log(`cost`) that is dominated, from cost 1 on.

    With several teachers, it is the area of their mean mismatch.
    """
    volume, edge = 0.0, math.log(cost)
    for each in reversed(front([replace(each, errors=()) for each in evaluations])):
        left = math.log(max(1, each.cost))
        if left < edge and _of(each) < 1:
            volume += (edge - left) * (1 - _of(each))
            edge = left
    return volume / math.log(cost)


def _of(evaluation: Evaluation) -> float:
    return math.inf if evaluation.mismatch is None else evaluation.mismatch


def _covers(one: Evaluation, other: Evaluation) -> bool:
    """Return whether a program of no more cost has no larger mismatch with any teacher."""
    return all(mine <= its for mine, its in zip(one.objectives, other.objectives, strict=True))


def _parents(generation: int, earlier: Sequence[Evaluation]) -> list[Evaluation]:
    recent = [
        each for each in earlier if each.generation >= generation - RECENT and each.mismatch is not None
    ]
    return list(dict.fromkeys([*front(earlier), *recent]))


def _child(parents: Sequence[Evaluation], random: Random) -> Child:
    first = _parent(parents, random)
    program = parse_program(first.program)
    texts: tuple[str, ...] = (first.program,)
    if random.random() < CROSSED:
        second = _parent(parents, random)
        program = cross(program, parse_program(second.program), random)
        texts = (first.program, second.program)
    return Child(mutate(program, random), texts)


def _parent(parents: Sequence[Evaluation], random: Random) -> Evaluation:
    """Return the best of a few candidates, by cost and the mismatch with one of the teachers, weighed at random."""
    weight = random.random()
    rivals = [random.choice(parents) for _ in range(CONTEST)]
    teachers = len(rivals[0].objectives)
    teacher = random.randrange(teachers) if teachers > 1 else 0

    def score(one: Evaluation) -> float:
        error = max(one.objectives[teacher], 1e-6)
        return weight * math.log(error) + (1 - weight) * math.log(one.cost + 1)

    return min(rivals, key=score)
