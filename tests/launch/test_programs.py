"""`graftvit programs`, as typed."""

from __future__ import annotations

import pytest
from graftvit.launch.cli import main
from graftvit.models.programs.program import FOUND
from graftvit.models.programs.program_checks import CHECKS


def test_draws_are_counted_with_the_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["programs", "draw", "--count", "12", "--seed", "0"]) == 0
    said = capsys.readouterr().out
    head, table = said.split("\n\n", 1)
    assert head.startswith("12 programs drawn with seed 0: 12 do not raise (100.0 %), ")
    passed = int(head.split("%), ")[1].split()[0])
    lines = table.splitlines()
    refused = {line.split()[0]: int(line.split()[1]) for line in lines[1 : 1 + len(CHECKS)]}
    assert list(refused) == [each.name for each in CHECKS]
    assert sum(refused.values()) + passed == 12
    assert len([line for line in lines[1 + len(CHECKS) :] if line]) == passed
    assert main(["programs", "draw", "--count", "12", "--seed", "0"]) == 0
    assert capsys.readouterr().out == said


def test_a_program_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["programs", "check", "attnzero_105"]) == 0
    said = capsys.readouterr().out
    assert FOUND["attnzero_105"] in said
    assert "2 N D^2 multiply-adds a head" in said
    assert "depends on other heads of the image" in said
    assert "passes all checks" in said
    assert "a map     none: minmax(v) is not linear in V" in said
    assert "def attention(q, k, v):" in said
    assert main(["programs", "check", "mul( v  q)"]) == 0
    said = capsys.readouterr().out
    assert "mul(q v)" in said
    assert "fails gradients: K gets no gradient" in said
    assert main(["programs", "check", "v"]) == 0
    assert "a map     the output of a head is M V" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["check", "mm(q k)"], "mm is not defined for N×D and N×D"),
        (["check", "attnzero_106"], "unknown program 'attnzero_106'; did you mean 'attnzero_105'"),
        (["check", "MM(q k)"], "'M' is not a name or a parenthesis; names are in lower case"),
        (["draw", "--count", "0"], "--count: give a whole number from 1 to 100,000, not '0'"),
        (["attnzero_105"], "unknown action 'attnzero_105'"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["programs", *words]) == 2
    assert reason in capsys.readouterr().err
