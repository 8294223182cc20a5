"""The commands and the lines of docs/photographs.md as printed, on images of two classes."""

from __future__ import annotations

import re
import shlex
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
    write_classes(tmp_path / "photos", ["cat", "dog"])
    shell, python = re.findall(r"```(?:sh|python)\n(.+?)```", PAGE.read_text(), re.DOTALL)
    for line in shell.splitlines():
        words = shlex.split(line, comments=True)[1:]
        if words:
            typed(*words, *SMALL.get(words[0], []))
    for path in ("look.png", "seen/index.html", "phone/model.onnx", "student/modeling_graftvit.py"):
        assert (tmp_path / path).is_file()
    exec(python, {})
    assert (tmp_path / "student.onnx").is_file()
    assert (tmp_path / "runs/python/modeling_graftvit.py").is_file()
