"""What is printed of a program: code that computes the same, and LaTeX that a renderer accepts."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graftvit.models.programs.drawing import draw_program
from graftvit.models.programs.primitives import PRIMITIVES
from graftvit.models.programs.program import FOUND, LINEAR, Program, latex, parse_program, torch_code
from matplotlib.mathtext import MathTextParser
from support.models.latex_reader import read_latex
from torch import Tensor

OF_TOKENS = {
    "mm": "mm(q tn(k v))", "tn": "mm(q tn(k v))", "nt": "mm(softmax(nt(q k)) v)", "dist": "mul(q dist(k v))",
    "cosine": "mul(q cosine(k v))", "cat": "mm(cat(q k) tn(cat(q k) v))",
    "tileinv": "mul(q tileinv(dist(k v) v))",
    "one": "add(q one)", "t": "t(sub(t(q) t(k)))", "sum": "mul(q sum(k))", "mean": "mul(q mean(k))",
}  # fmt: skip
"""A program with each primitive that does not take and give N×D."""


def program_with(name: str) -> Program:
    arity = PRIMITIVES[name].arity
    return parse_program(OF_TOKENS.get(name, f"{name}({' '.join('qk'[:arity])})"))


def run_code(program: Program) -> Callable[..., Tensor]:
    space: dict[str, Any] = {}
    exec(torch_code(program), space)
    return space["attention"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", PRIMITIVES)
def test_printed_code_computes_the_same(name: str) -> None:
    program = program_with(name)
    assert any(node.primitive == name for node in program.nodes)
    q, k, v = torch.randn(3, 2, 3, 7, 4, dtype=torch.float64)
    q[0, 0, 0, 1] = k[0, 0, 1, 1] = 0
    wanted = program(q=q, k=k, v=v)
    torch.testing.assert_close(run_code(program)(q, k, v), wanted, rtol=1e-12, atol=1e-12)
    assert program.text in torch_code(program)


@pytest.mark.parametrize("name", PRIMITIVES)
def test_latex_is_rendered_and_tells_programs_apart(name: str) -> None:
    text = latex(program_with(name))
    MathTextParser("path").parse(f"${text.replace(chr(92) + 'top', 'T')}$")
    others = {latex(program_with(other)) for other in PRIMITIVES if other not in (name, "mm", "tn")}
    assert text not in others or name in ("mm", "tn")


def test_operands_of_infix_signs_stand_in_parentheses() -> None:
    assert latex(parse_program("mul(add(q k) v)")) == r"\left(K + Q\right) \odot V"
    assert latex(parse_program("add(mul(q k) v)")) == r"\left(K \odot Q\right) + V"
    assert latex(parse_program("sub(q sub(k v))")) == r"Q - \left(K - V\right)"
    assert latex(parse_program("neg(add(q k))")) == r"-\left(K + Q\right)"
    assert latex(parse_program("abs(add(q k))")) == r"\left|K + Q\right|"


def test_a_formula_read_back_is_the_program() -> None:
    """A reader of LaTeX, written for this test, finds no missing parenthesis and one meaning for each sign."""
    source = random.Random(6)
    programs = [parse_program(text) for text in (*FOUND.values(), LINEAR)]
    programs += [program_with(name) for name in PRIMITIVES] + [draw_program(source) for _ in range(300)]
    for program in programs:
        assert parse_program(read_latex(latex(program))) == program, latex(program)
