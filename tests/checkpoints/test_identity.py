"""What a teacher is: its numbers, and the code that computes it."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.provenance import collect_identity, identify
from graftvit.models.conversion import convert
from graftvit.models.layer_plan import OPERATORS, register_operator
from support.runs.engine_runs import make_teacher

OPERATOR = """
from graftvit.models.attention.softmax import UniformAttention

class Mine(UniformAttention):
    share = 1.0
"""


def test_the_code_of_operators_belongs_to_a_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftvit.checkpoints.provenance.version", lambda name: "2.0")
    plain = load_pretrained(f"local-dir:{make_teacher(tmp_path / 'teacher')}", identified=True)
    assert collect_identity(plain)["library"] == "timm 2.0"
    linear = replace(plain, model=convert(plain.model, "*: linear"))
    assert collect_identity(linear)["library"] == "timm 2.0, graftvit 2.0"
    file = tmp_path / "operators_of_mine.py"
    file.write_text(OPERATOR)
    monkeypatch.syspath_prepend(str(tmp_path))
    register_operator("mine", importlib.import_module("operators_of_mine").Mine)
    try:
        own = replace(plain, model=convert(plain.model, "1: mine"))
    finally:
        OPERATORS.pop("mine")
    before, name = collect_identity(own)["library"], identify(own)
    assert before.startswith("timm 2.0, graftvit 2.0, operators_of_mine.py ")
    file.write_text(OPERATOR.replace("1.0", "0.9"))
    assert collect_identity(own)["library"] != before, "a cache is filled again"
    assert identify(own) == name, "a run resumes"
    file.unlink()
    assert identify(own) == name, "code that is gone"
