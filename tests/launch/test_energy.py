"""`graftvit benchmark energy`: the table, the prices, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from graftvit.launch.cli import main
from support.runs.engine_runs import make_teacher

EcoFormer = "stage1: hash; stage2: hash; stage3: hash"


def cells(out: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in out.splitlines()
        if "| --" not in line
    ]


def test_the_published_row_of_pvt(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pvt_v2_b0", "--plan", EcoFormer, "--accounting", "published"]
    assert main(["benchmark", "energy", *words]) == 0
    _, first, second = cells(capsys.readouterr().out.strip())
    assert first[:2] == ["pvt_v2_b0", "as it is"]
    assert second[1:4] == [EcoFormer, "0.53539", "0.56479"]
    assert second[5] == "2.4893"


def test_prices_accounting_and_size_change_the_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f"local-dir:{make_teacher(tmp_path / 'teacher')}"
    rows = {}
    changes = {
        "": [],
        "energy": ["--multiplication_pj", "1", "--addition_pj", "1"],
        "area": ["--multiplication_area", "1e6", "--addition_area", "1e6"],
        "published": ["--accounting", "published"],
        "size": ["--img_size", "16"],
    }
    for name, words in changes.items():
        assert main(["benchmark", "energy", source, *words]) == 0
        rows[name] = cells(capsys.readouterr().out.strip())[1]
    assert rows["energy"][:5] == rows["area"][:5] == rows[""][:5]
    assert rows["energy"][6] == rows[""][6]
    assert rows["area"][5] == rows[""][5]
    assert rows["area"][6] != rows[""][6]
    assert rows["size"][4] != rows[""][4]
    assert rows["published"] != rows[""]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "SOURCE"),
        (["pvt_v2_b0", "--plan", "stage1: hsh"], "did you mean 'hash'"),
        (["pvt_v2_b0", "--addition_pj", "-1"], "--addition_pj -1.0: give a number, 0 or more"),
        (["pvt_v2_b0", "--img_size", "0"], "--img_size: give a whole number, 1 or more"),
        (["pvt_v2_b0", "--accounting", "tru"], "published"),
        (["mvitv2_tiny"], "whose operations are not known"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "energy", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
