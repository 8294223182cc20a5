"""The page of a search: its front, formulas whose code equals the programs, its lineage and what was refused."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from graftvit.launch.cli import main
from graftvit.models.programs.program import parse_program
from graftvit.transfer.analysis.search_report import ancestors, line_of_descent, write_report
from graftvit.transfer.search.program_search import Evaluation, front, run_search
from support.runs.search_runs import search, silent


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Evaluation]]:
    folder = tmp_path_factory.mktemp("search")
    return folder, run_search(search(folder, population=12), 4, silent)


def test_the_code_of_the_page_computes_its_programs(done: tuple[Path, list[Evaluation]]) -> None:
    folder, found = done
    page = write_report(folder).read_text()
    code = [html.unescape(each) for each in re.findall(r"<pre><code>(.*?)</code></pre>", page, re.S)]
    programs = [parse_program(each.program) for each in front(found)]
    assert len(code) == len(programs) > 0
    q, k, v = torch.randn(3, 2, 3, 7, 4, dtype=torch.float64)
    for text, program in zip(code, programs, strict=True):
        space: dict[str, Any] = {}
        exec(text, space)
        torch.testing.assert_close(
            space["attention"](q, k, v), program(q=q, k=k, v=v), rtol=1e-12, atol=1e-12
        )
    formulas = re.findall(r"<math.*?</math>", page, re.S)
    assert len(formulas) == len(programs)
    assert all(ElementTree.fromstring(each).tag == "math" for each in formulas)


def test_the_page_counts_what_was_refused(done: tuple[Path, list[Evaluation]]) -> None:
    folder, found = done
    page = write_report(folder).read_text()
    for name in {each.refused for each in found if each.refused}:
        count = sum(each.refused == name for each in found)
        assert re.search(rf"<td>{name}</td><td class=\"number\">{count}</td>", page), name
    assert all(name in page for name in ("softmax", "elu + 1", "attnzero_105"))
    assert "<script" not in page


def test_lineage_leads_to_drawn_programs(done: tuple[Path, list[Evaluation]]) -> None:
    _, found = done
    for each in front(found):
        line, everyone = line_of_descent(each, found), ancestors(each, found)
        assert line[0] == everyone[0] == each
        assert line[-1].parents == ()
        assert [one.generation for one in line] == sorted((one.generation for one in line), reverse=True)
        texts = {one.program for one in everyone}
        assert {one.program for one in line} <= texts
        assert all(set(one.parents) <= texts for one in everyone)


def test_the_command_writes_the_page(
    done: tuple[Path, list[Evaluation]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["programs", "search", "report", str(done[0])]) == 0
    assert f"report: {done[0] / 'report.html'}" in capsys.readouterr().out
    assert main(["programs", "search", "report", str(tmp_path)]) == 2
    assert (
        f"{tmp_path} has no search: give the --output_dir of `graftvit programs search`"
        in capsys.readouterr().err
    )
    search(tmp_path).claim()
    assert main(["programs", "search", "report", str(tmp_path)]) == 2
    assert "no generation of the search" in capsys.readouterr().err
