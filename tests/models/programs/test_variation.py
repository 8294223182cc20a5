"""Variation: children are well typed, near their parents, and those of the seed."""

from __future__ import annotations

import random

import pytest
from graftvit.models.programs.drawing import cross, draw_program, mutate
from graftvit.models.programs.program import FOUND, LINEAR, Program, ProgramError, parse_program

LINEAR_PROGRAM, TRIAL_105 = parse_program(LINEAR), parse_program(FOUND["attnzero_105"])


def texts(program: Program) -> set[str]:
    return {node.text for node in program.nodes}


def test_mutants_are_programs_that_keep_a_part_of_their_parent() -> None:
    source = random.Random(0)
    mutants = [mutate(LINEAR_PROGRAM, source) for _ in range(200)]
    assert LINEAR_PROGRAM not in mutants
    assert len(set(mutants)) > 100
    for mutant in mutants:
        assert mutant.inputs == ("q", "k", "v")
        assert parse_program(mutant.text) == mutant
    kept = [len(texts(mutant) & texts(LINEAR_PROGRAM) - {"q", "k", "v"}) for mutant in mutants]
    assert sum(count > 0 for count in kept) > 100
    again = random.Random(0)
    assert mutants == [mutate(LINEAR_PROGRAM, again) for _ in range(200)]


def test_all_kinds_of_mutation_happen() -> None:
    source = random.Random(1)
    found = {mutate(parse_program("mm(relu(q) tn(k v))"), source).text for _ in range(500)}
    assert "mm(q tn(k v))" in found, "an operand takes the place of a value"
    assert "mm(abs(q) tn(k v))" in found, "another primitive"
    assert len(found) > 100, "values that are drawn"


def test_a_cross_has_values_of_both() -> None:
    source = random.Random(0)
    children = [cross(LINEAR_PROGRAM, TRIAL_105, source) for _ in range(100)]
    only = texts(TRIAL_105) - texts(LINEAR_PROGRAM)
    mixed = [child for child in children if texts(child) & only and texts(child) & texts(LINEAR_PROGRAM)]
    assert len(mixed) > 50
    assert all(child.inputs == ("q", "k", "v") for child in children)


def test_programs_without_a_common_shape_have_no_cross() -> None:
    bare = parse_program("q")
    assert cross(LINEAR_PROGRAM, bare, random.Random(0)) == LINEAR_PROGRAM


def test_the_longest_programs_can_be_varied() -> None:
    source = random.Random(3)
    longest = max((draw_program(source, depth=8) for _ in range(50)), key=lambda program: len(program.text))
    assert len(longest.text) > 250
    try:
        assert mutate(longest, source) != longest
    except ProgramError:
        pytest.fail("a long program has shorter neighbors")
