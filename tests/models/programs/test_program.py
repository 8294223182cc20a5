"""Programs: canonical text, identity, cost, what is printed, and what is drawn."""

from __future__ import annotations

import random
from collections.abc import Callable
from random import Random
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from graftvit.models.plan_syntax import MAX_VALUE, parse_plan, plan_text
from graftvit.models.programs.drawing import RULES, cross, draw_program, mutate
from graftvit.models.programs.primitives import PRIMITIVES
from graftvit.models.programs.program import (
    FOUND,
    LINEAR,
    MAX_TEXT,
    Program,
    ProgramError,
    latex,
    mathml,
    parse_program,
    torch_code,
)
from matplotlib.mathtext import MathTextParser
from support.models.latex_reader import read_latex
from torch import Tensor

SOFTMAX = "mm(softmax(nt(scale(q) k)) v)"


def test_programs_compute_the_formulas_that_they_spell() -> None:
    q, k, v = torch.randn(3, 2, 3, 11, 8, dtype=torch.float64)
    torch.testing.assert_close(parse_program(SOFTMAX)(q=q, k=k, v=v), F.scaled_dot_product_attention(q, k, v))
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(2, 3)
    dense = weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(parse_program(LINEAR)(q=q, k=k, v=v), dense)


@pytest.mark.parametrize(("text", "canonical"), [
    (" mm( softmax(nt(scale(q)  k))v ) ", SOFTMAX),
    ("mul(v q)", "mul(q v)"),
    ("t(t(q))", "q"),
    ("mm(softmax(mm(scale(q) t(k))) v)", SOFTMAX),
    ("mm(q t(tn(k v)))", "mm(q tn(v k))"),
    ("nt(q tn(k v))", "mm(q tn(v k))"),
    ("t(t(mm(q tn(k v))))", "mm(q tn(k v))"),
    ("mm(q t(tn(relu(k) v)))", "mm(q tn(v relu(k)))"),
    ("tn(t(softmax(nt(q k))) v)", "mm(softmax(nt(q k)) v)"),
    ("sub(v q)", "sub(v q)"),
    ("mm(q t(tn(v nt(k tn(q v)))))", "mm(q tn(mm(k tn(v q)) v))"),
    ("mm(q t(tn(v nt(k relu(tn(q v))))))", "mm(q mm(nt(relu(tn(q v)) k) v))"),
])  # fmt: skip
def test_one_formula_has_one_text(text: str, canonical: str) -> None:
    program = parse_program(text)
    assert program.text == canonical
    assert parse_program(canonical) == program
    assert parse_program(canonical).hash == program.hash
    assert hash(program) == hash(parse_program(canonical))


def test_the_text_stands_in_a_plan() -> None:
    longest = LINEAR
    assert MAX_TEXT == MAX_VALUE
    while len(longest) + 9 <= MAX_TEXT:
        longest = f"add({longest} q)"
    for text in (SOFTMAX, LINEAR, longest):
        code = parse_program(text).text
        choices = parse_plan(f"*: program(code={code}, local_size=0)", 2)
        assert choices[0].options == {"code": code, "local_size": 0}
        assert parse_plan(plan_text(choices), 2) == choices


def test_equal_parts_are_computed_once() -> None:
    program = parse_program("add(mm(q tn(k v)) abs(mm(q tn(k v))))")
    product = "mm(q tn(k v))"
    assert {node.text for node in program.nodes} == {
        *"qkv",
        "tn(k v)",
        product,
        f"abs({product})",
        program.text,
    }
    assert len(program.nodes) == 7
    assert str(program.products) == "2 N D^2"
    assert str(program.entries) == "3 N D + D^2"
    assert program.order == 1


def test_cost_and_traits_are_read_off_the_graph() -> None:
    softmax, linear = parse_program(SOFTMAX), parse_program(LINEAR)
    assert (str(softmax.products), softmax.order) == ("2 N^2 D", 2)
    assert (str(linear.products), linear.order) == ("2 N D^2 + N D", 1)
    assert softmax.products.at(196, 64) == 2 * 196**2 * 64
    assert parse_program("mul(q sigmoid(v))").inputs == ("q", "v")
    assert not softmax.mixes_heads
    assert parse_program("zscore(v)").mixes_heads


@pytest.mark.parametrize(("text", "reason"), [
    ("", "a primitive, q, k or v is expected in place of its end"),
    ("q k", "'k' stands after the end of q"),
    ("abs(q", "the parenthesis of abs is not closed"),
    ("abs q", "abs takes 1 operand, not 0"),
    ("soft(q)", "unknown primitive 'soft'; did you mean"),
    ("add(q, k)", "',' is not a name or a parenthesis"),
    ("__import__(q)", "'_' is not a name or a parenthesis"),
    ("mm(q k)", "mm is not defined for N×D and N×D, in mm(q k)"),
    ("nt(q k)", "a program gives N×D, and this one gives N×N"),
    ("tn(q k)", "this one gives D×D"),
    ("zscore(one)", "zscore is not defined for 1×1"),
    ("q" * 401, "longer than 400 characters"),
])  # fmt: skip
def test_mistakes_are_named(text: str, reason: str) -> None:
    with pytest.raises(ProgramError) as caught:
        parse_program(text)
    assert reason in str(caught.value)


# What is printed of a program: code that computes the same, and LaTeX that a renderer accepts.


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


# MathML of programs: an element tree for every primitive, whose text is the formula.


def words(text: str) -> str:
    return "".join(ElementTree.fromstring(mathml(parse_program(text))).itertext())


@pytest.mark.parametrize(("text", "wanted"), [
    ("mm(softmax(nt(scale(q) k)) v)", "O=softmax(QcK⊤)V"), ("mul(add(q k) neg(v))", "O=(K+Q)⊙(−V)"),
    ("mm(q tn(elu1(k) v))", "O=Q(φ(K)⊤V)"), ("abs(recip(l2(q)))", "O=|1normc(Q)+10−6|"),
    ("sqrt(cosigmoid(q))", "O=max(σ¯(Q),0)"),
])  # fmt: skip
def test_the_formula_is_read_from_left_to_right(text: str, wanted: str) -> None:
    assert words(text) == wanted


def test_layout_is_in_the_elements() -> None:
    root = ElementTree.fromstring(mathml(parse_program("mm(softmax(nt(scale(q) k)) v)")))
    assert [element.tag for element in root.iter() if element.tag in ("mfrac", "msqrt", "msup")] == [
        "mfrac", "msqrt", "msup",
    ]  # fmt: skip


def test_every_program_has_one() -> None:
    drawn = [draw_program(Random(seed)).text for seed in range(200)]
    for text in (*drawn, *FOUND.values()):
        said = words(text)
        assert said.startswith("O=")
        assert not set(said) & set("\\{}^_")


# Drawn programs: well typed, of every kind, reproducible, and independent of the batch.


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
        found, wanted = run_code(program)(**inputs()), program(**inputs())
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9, equal_nan=True)
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


# Variation: children are well typed, near their parents, and those of the seed.


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
