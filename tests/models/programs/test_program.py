"""Programs: canonical text, identity, cost, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graftvit.models.plan_syntax import MAX_VALUE, parse_plan, plan_text
from graftvit.models.programs.program import MAX_TEXT, ProgramError, parse_program

SOFTMAX = "mm(softmax(nt(scale(q) k)) v)"
LINEAR = "mul(mm(elu1(q) tn(elu1(k) v)) recip(nt(elu1(q) sum(elu1(k)))))"


def test_programs_compute_the_formulas_that_they_spell() -> None:
    q, k, v = torch.randn(3, 2, 3, 11, 8, dtype=torch.float64)
    torch.testing.assert_close(parse_program(SOFTMAX)(q=q, k=k, v=v), F.scaled_dot_product_attention(q, k, v))
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(2, 3)
    dense = weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(parse_program(LINEAR)(q=q, k=k, v=v), dense)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
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
    ],
)
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


@pytest.mark.parametrize(
    ("text", "reason"),
    [
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
    ],
)
def test_mistakes_are_named(text: str, reason: str) -> None:
    with pytest.raises(ProgramError) as caught:
        parse_program(text)
    assert reason in str(caught.value)
