"""A search folder from somebody else: each damage is one sentence, and nothing loops, waits or fills the memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graftvit.launch.cli import main
from graftvit.transfer.analysis.search_report import ancestors, line_of_descent
from graftvit.transfer.search.program_search import Evaluation, run_search
from safetensors.torch import load_file, save_file
from support.files.irregular_files import irregular, never_waiting
from support.runs.limits import limited_memory, limited_work
from support.runs.search_runs import search, silent

SETTINGS, LAYERS, CELL = "settings.json", "layers.safetensors", "cells/001-000/cell.json"
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    run_search(search(folder), 2, silent)
    return folder


def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the sentence with which the report of a folder is refused."""
    with never_waiting(2), limited_work(15), limited_memory(2 << 30):
        code = main(["programs", "search", "report", str(folder)])
    said = capsys.readouterr().err
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith("graftvit: error: ")
    return said


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def parents_in_a_cycle(folder: Path) -> None:
    one, two = (folder / f"cells/001-00{slot}/cell.json" for slot in (0, 1))
    texts = [json.loads(path.read_text())["program"] for path in (one, two)]
    for path, parent in zip((one, two), reversed(texts), strict=True):
        rewrite(path, parents=[parent], mismatch=0.001, errors=[0.001], cost=1, refused="")


RECORDS: dict[str, Callable[[Path], None]] = {
    "parents in a cycle": parents_in_a_cycle,
    "a parent that is not there": lambda folder: rewrite(folder / CELL, parents=["mm(q k)"]),
    "its own parent": lambda folder: rewrite(folder / CELL, parents=["q"], program="q"),
    "no number": lambda folder: rewrite(folder / CELL, mismatch=float("nan"), refused=""),
    "infinite": lambda folder: rewrite(folder / CELL, errors=[float("inf")], mismatch=0.1, refused=""),
    "more errors than teachers": lambda folder: rewrite(folder / CELL, errors=[0.1] * 3, mismatch=0.1, refused=""),
    "no program": lambda folder: rewrite(folder / CELL, program="import os"),
    "a cost below 0": lambda folder: rewrite(folder / CELL, cost=-1),
    "an endless cost": lambda folder: rewrite(folder / CELL, cost=10**400),
    "another generation": lambda folder: rewrite(folder / CELL, generation=10**9),
    "too deep": lambda folder: (folder / CELL).write_text(DEEP) and None,
    "no list of parents": lambda folder: rewrite(folder / CELL, parents=3),
}  # fmt: skip


@pytest.mark.parametrize("how", RECORDS)
def test_a_record(how: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "search"))
    RECORDS[how](folder)
    for cell in folder.glob("cells/*"):  # somebody who writes records can digest them, too
        there = search(folder).claim()
        try:
            found = json.loads((cell / "cell.json").read_text())
            found["settings"] = there._digest(int(cell.name[:3]), found["program"])
            (cell / "cell.json").write_text(json.dumps(found))
        except (RecursionError, TypeError):
            continue
    assert "cells/001-00" in refused(folder, capsys)


@pytest.mark.parametrize(
    "changes",
    [{"population": -1}, {"population": 0}, {"population": "many"}, {"population": 1.5}, {"proxy": "eval"},
     {"seed": None}, {"teacher": []}],
)  # fmt: skip
def test_settings(
    changes: dict[str, Any], good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "search"))
    rewrite(folder / SETTINGS, **changes)
    assert SETTINGS in refused(folder, capsys)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "socket"])
@pytest.mark.parametrize("name", [SETTINGS, LAYERS, CELL])
def test_what_is_no_regular_file(
    name: str, kind: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "search"))
    (folder / name).unlink()
    irregular(kind, folder / name)
    assert name in refused(folder, capsys)


def without(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


TENSORS: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "nothing": lambda tensors: {},
    "a part is missing": without("0.0.v"),
    "no layer 0": lambda tensors: {name.replace("0.0.", "0.7."): each for name, each in tensors.items()},
    "no teacher 0": lambda tensors: {f"-1{name[1:]}": each for name, each in tensors.items()},
    "a scalar": lambda tensors: tensors | {"0.0.q": torch.tensor(1.0)},
    "no images": lambda tensors: {name: each[:0] for name, each in tensors.items()},
    "whole numbers": lambda tensors: {name: each.long() for name, each in tensors.items()},
    "half the bits": lambda tensors: tensors | {"0.0.q": tensors["0.0.q"].half()},
    "other sizes": lambda tensors: tensors | {"0.0.k": tensors["0.0.k"][:, :1].clone()},
    "an output of other tokens": lambda tensors: tensors | {"0.0.out": tensors["0.0.out"][:, :, :3].clone()},
    "a name": lambda tensors: tensors | {"weight": torch.zeros(1)},
}


@pytest.mark.parametrize("how", TENSORS)
def test_recorded_layers(how: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "search"))
    tensors = TENSORS[how](load_file(folder / LAYERS))
    save_file({name: each.contiguous() for name, each in tensors.items()}, folder / LAYERS)
    assert LAYERS in refused(folder, capsys)


def test_the_lineage_of_a_program_that_came_twice_ends() -> None:
    """A generation may draw a program again where it finds no new one."""
    done = [
        Evaluation("", None, 0, "q", ()),
        Evaluation("", None, 1, "k", ("q",)),
        Evaluation("", None, 2, "q", ("k",)),
    ]
    with limited_work(20):
        assert [one.program for one in line_of_descent(done[2], done)] == ["q", "k", "q"]
        assert len(ancestors(done[2], done)) == 2
