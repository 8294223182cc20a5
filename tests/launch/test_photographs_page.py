"""The commands and the lines of docs/photographs.md as printed, on images of two classes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.files.data_sets import write_classes
from support.runs.typed import Typed

PAGE = Path(__file__).resolve().parents[2] / "docs" / "photographs.md"
SMALL = {"train": ["--workers", "0", "--epochs", "1"], "deploy": ["--workers", "0", "--drop", "100"]}


@pytest.mark.slow
def test_the_page_leads_from_photographs_to_files(
    tmp_path: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cat = write_classes(tmp_path / "photos", ["cat", "dog"]) / "val/cat"
    next(cat.iterdir()).rename(cat / "2.jpg")
    shell, python = re.findall(r"```(?:sh|python)\n(.+?)```", PAGE.read_text(), re.DOTALL)
    for line in shell.replace("\\\n", "").splitlines():
        match shlex.split(line, comments=True):
            case ["graftvit", command, *words]:
                typed(command, *words, *SMALL.get(command, []))
            case ["python", *words]:
                said = subprocess.check_output([sys.executable, *words], text=True)
                assert said.split()[-1] in ("cat", "dog")
            case rest:
                assert not rest
    for path in ("look.png", "seen/index.html", "phone/model.onnx", "student/modeling_graftvit.py"):
        assert (tmp_path / path).is_file()
    exec(python, {})
    assert (tmp_path / "student.onnx").is_file()
    assert (tmp_path / "runs/python/modeling_graftvit.py").is_file()
