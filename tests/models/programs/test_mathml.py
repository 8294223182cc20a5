"""MathML of programs: an element tree for every primitive, whose text is the formula."""

from __future__ import annotations

from random import Random
from xml.etree import ElementTree

import pytest
from graftvit.models.programs.drawing import draw_program
from graftvit.models.programs.program import FOUND, mathml, parse_program


def words(text: str) -> str:
    return "".join(ElementTree.fromstring(mathml(parse_program(text))).itertext())


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("mm(softmax(nt(scale(q) k)) v)", "O=softmax(QcK⊤)V"),
        ("mul(add(q k) neg(v))", "O=(K+Q)⊙(−V)"),
        ("mm(q tn(elu1(k) v))", "O=Q(φ(K)⊤V)"),
        ("abs(recip(l2(q)))", "O=|1normc(Q)+10−6|"),
        ("sqrt(cosigmoid(q))", "O=max(σ¯(Q),0)"),
    ],
)
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
