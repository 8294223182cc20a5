"""`graftvit list operators`, as typed."""

from __future__ import annotations

import inspect

import pytest
from graftvit.launch.cli import main
from graftvit.models.attention.base import Geometry, LayerShape
from graftvit.models.layer_plan import OPERATORS, Choice, create_operator, options_of
from graftvit.models.plan_syntax import parse_plan


def test_every_operator_is_listed_with_its_traits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "operators", "--grid", "4", "16"]) == 0
    head, *lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert "MACs 16x16" in head
    rows = {line.split()[0]: line.split() for line in lines}
    assert list(rows) == list(OPERATORS)
    for name, row in rows.items():
        operator = create_operator(Choice(name), LayerShape(12, 64, Geometry(1, (4, 4))))
        traits = operator.traits
        assert row[1:4] == [
            "yes" if holds else "no" for holds in (traits.linear_in_v, traits.needs_grid, traits.bias)
        ]
        assert int(row[4].replace(",", "")) == sum(parameter.numel() for parameter in operator.parameters())
        assert all(f"{option}=" in " ".join(row) for option in options_of(name))
        if traits.linear_cost:
            assert int(row[7]) <= int(row[5]), "against softmax, linear cost falls"


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_explained_as_a_plan_writes_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "operators", name]) == 0
    said = capsys.readouterr().out
    operator = OPERATORS[name]
    assert str(inspect.getdoc(getattr(operator, "func", operator))).splitlines()[0] in said
    plan = said.split("in a plan: ")[1].strip().strip("'")
    (choice,) = parse_plan(plan, 1)
    assert choice.operator == name
    create_operator(choice, LayerShape(2, 8, Geometry(1, (4, 4))))


def test_a_found_program_is_shown_with_its_formula(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "operators", "attnzero_105"]) == 0
    said = capsys.readouterr().out
    assert "code: mul(l2(mm(l2(q) zscore(tn(minmax(v) elu1(k))))) q)" in said
    assert "'*: attnzero_105(local_size=3)'" in said


def test_mistakes_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "operators", "linaer"]) == 2
    assert "unknown operator 'linaer'; did you mean 'linear'" in capsys.readouterr().err
    assert main(["list", "operators", "--grid", "0"]) == 2
    assert "--grid: give a whole number, 1 or more" in capsys.readouterr().err
