"""Drawn programs: well typed, of every kind, reproducible, and independent of the batch."""

from __future__ import annotations

import random

import pytest
import torch
from graftvit.models.programs.drawing import RULES, draw_program
from graftvit.models.programs.primitives import PRIMITIVES
from graftvit.models.programs.program import Program, ProgramError, latex, parse_program, torch_code
from torch import Tensor

FEW, MANY = 200, 10_000


def drawn(count: int, seed: int) -> list[Program]:
    source = random.Random(seed)
    return [draw_program(source) for _ in range(count)]


def inputs(batch: int = 3) -> dict[str, Tensor]:
    x = torch.randn(3, batch, 2, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return dict(zip("qkv", x.unbind(0), strict=True))


def test_rules_are_well_typed_and_reach_every_primitive() -> None:
    for shape, rules in RULES.items():
        assert all(PRIMITIVES[rule.name].shape(*rule.operands) == shape for rule in rules)
    assert {rule.name for rules in RULES.values() for rule in rules} == set(PRIMITIVES)


def test_draws_run_read_all_inputs_and_are_those_of_the_seed() -> None:
    programs = drawn(FEW, 0)
    assert programs == drawn(FEW, 0)
    assert programs != drawn(FEW, 1)
    assert len(set(programs)) > 0.95 * FEW
    for program in programs:
        assert program.inputs == ("q", "k", "v")
        assert parse_program(program.text) == program, "its text is the canonical one"
        assert program(**inputs()).shape == (3, 2, 6, 4)


def test_a_depth_without_programs_is_refused() -> None:
    with pytest.raises(ProgramError, match="no program of depth 0 reads Q, K and V"):
        draw_program(random.Random(0), depth=0)


def test_printed_code_and_formulas_are_those_of_drawn_programs() -> None:
    formulas = {}
    for program in drawn(FEW, 2):
        space: dict[str, object] = {}
        exec(torch_code(program), space)
        attention = space["attention"]
        assert callable(attention)
        torch.testing.assert_close(
            attention(**inputs()), program(**inputs()), rtol=1e-9, atol=1e-9, equal_nan=True
        )
        text = latex(program)
        assert text.count("{") == text.count("}")
        assert text.count(r"\left") == text.count(r"\right")
        assert formulas.setdefault(text, program) == program, "programs differ, and so do their formulas"


def alone_and_together(count: int, seed: int) -> int:
    """Compare images alone with the batch; return how many programs were compared on finite numbers."""
    compared, whole = 0, inputs()
    for program in drawn(count, seed):
        out = program(**whole)
        alone = torch.cat([program(**{name: x[i : i + 1] for name, x in whole.items()}) for i in range(3)])
        torch.testing.assert_close(alone, out, rtol=1e-6, atol=1e-9, equal_nan=True, msg=program.text)
        compared += bool(out.isfinite().all())
    return compared


def test_no_image_sees_another() -> None:
    assert alone_and_together(FEW, 3) > 0.9 * FEW


@pytest.mark.slow
def test_no_image_sees_another_in_ten_thousand_programs() -> None:
    assert alone_and_together(MANY, 4) > 0.9 * MANY
