"""The examples of docs/extending.md, as they stand there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from graftvit.launch.fields import leaf_of
from graftvit.models.conversion import convert
from graftvit.models.errors import ConfigError, TransferError
from graftvit.models.layer_plan import OPERATORS, register_operator
from graftvit.transfer.engine.build import check_settings
from graftvit.transfer.engine.dry_run import dry_run
from graftvit.transfer.engine.modes import mode_of
from graftvit.transfer.engine.train import train
from graftvit.transfer.methods import method_facts, registry
from graftvit.transfer.methods.method import describe_transfer
from graftvit.transfer.methods.method_facts import method_names
from graftvit.transfer.methods.registry import find_method, register_method
from support.runs.engine_runs import config, make_teacher, records

PAGE = Path(__file__).parents[3] / "docs" / "extending.md"


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The names of both examples; what they register is forgotten after the test."""
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(registry, "METHODS", dict(method_facts.METHODS))
    monkeypatch.setattr(method_facts, "METHODS", registry.METHODS)
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(code, names)
    yield names
    OPERATORS.pop("mean", None)


def test_the_operator_of_the_page_is_converted_to(examples: dict[str, Any]) -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2
    )
    student: Any = convert(model, "*: mean(share=0.9)")
    operator = student.blocks[1].attn.operator
    assert operator.mixed == 0.9
    assert student(torch.randn(2, 3, 32, 32)).shape == (2, 1000)
    heads = student.blocks[1].attn.project(torch.randn(1, 17, 24))
    torch.testing.assert_close(operator.matrix(heads) @ heads.v, operator(heads))
    with pytest.raises(ConfigError, match="already"):
        register_operator("mean", examples["MeanAttention"])


def test_the_method_of_the_page_trains(examples: dict[str, Any], tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    settings = config(tmp_path / "run", teacher, transfer={"method": "probabilities"}, optim={"max_steps": 1})
    assert dry_run(settings, 1, here=True).footprint.student
    assert train(settings).finished
    assert "train_probabilities" in records(tmp_path / "run")[-1]
    wrong = config(tmp_path / "run", teacher, transfer={"method": "probabilities", "temperature": 2.0})
    with pytest.raises(
        ConfigError, match=r"temperature=2.0 changes nothing with transfer.method=probabilities"
    ):
        check_settings(mode_of(wrong))
    assert "probabilities" in leaf_of("transfer.method").valid()
    assert describe_transfer({"method": "probabilities"})[0][1].endswith("between the class probabilities")
    with pytest.raises(ConfigError, match="already"):
        register_method(find_method("distill"))


def test_the_method_of_the_page_is_refused_where_the_classes_are_others(
    examples: dict[str, Any], tmp_path: Path
) -> None:
    teacher = make_teacher(tmp_path / "teacher", classes=7)
    settings = config(tmp_path / "run", teacher, transfer={"method": "probabilities"}, optim={"max_steps": 1})
    with pytest.raises(
        TransferError, match="method=probabilities needs one set of classes, and the teacher has 7"
    ):
        dry_run(settings, 1, here=True)


def test_every_name_of_the_table_is_a_method() -> None:
    assert [find_method(name).name for name in method_names()] == list(method_names())
    with pytest.raises(ConfigError, match="'distil'"):
        find_method("distil")
