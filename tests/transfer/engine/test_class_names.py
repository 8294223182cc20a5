"""A run knows its classes by name: its student's, its teacher's, and those of the test images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from graftvit.models.errors import ConfigError, TransferError
from graftvit.transfer.engine.build import build
from graftvit.transfer.engine.resume_check import check_same_classes
from graftvit.transfer.engine.train import train
from support.files.image_folders import class_folder
from support.runs.engine_runs import config, make_teacher, records


def named_teacher(folder: Path, names: list[str] | None) -> Path:
    make_teacher(folder, classes=2)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(described | ({} if names is None else {"label_names": names}))
    )
    return folder


def settings(tmp_path: Path, names: list[str] | None, name: str = "run", **sections: Any) -> Any:
    root = tmp_path / "set"
    if not root.exists():
        class_folder(root, ("bee", "cat"))
    data = {"dataset": "", "data_path": str(root), "train_samples": None, "batch_size": 8, "mixup": 0.0}
    teacher = named_teacher(tmp_path / f"teacher-{name}", names)
    return config(tmp_path / name, teacher, **{"data": data, "optim": {"epochs": 1, "ema": None}, **sections})


def test_the_teachers_accuracy_goes_by_name(tmp_path: Path) -> None:
    """A teacher whose classes are in another order had the accuracy of one that takes each for the other."""
    engine = {"evaluate_teacher": True}
    scores = {
        name: train(settings(tmp_path, names, name, engine=engine)).metrics.get("teacher_top1")
        for name, names in {
            "same": ["bee", "cat"],
            "swapped": ["cat", "bee"],
            "other": ["ant", "cat"],
        }.items()
    }
    assert scores["same"] is not None
    assert scores["swapped"] == pytest.approx(100 - scores["same"])
    assert scores["other"] is None


def test_logits_of_other_classes_are_refused(tmp_path: Path) -> None:
    transfer = {"method": "logits"}
    for number, names in enumerate((["cat", "bee"], ["ant", "cat"])):
        with pytest.raises(TransferError, match=r"transfer\.method=logits.*class 0"):
            build(settings(tmp_path, names, f"run{number}", transfer=transfer))
    build(settings(tmp_path, ["bee", "cat"], "run2", transfer=transfer))
    assert build(settings(tmp_path, None, "run3", transfer=transfer)).plan.label_names == ("bee", "cat")


def test_a_head_that_is_kept_keeps_its_names(tmp_path: Path) -> None:
    """Without labels the student learns the teacher's classes, and is scored by these where the images have them."""
    sections = {"transfer": {"method": "logits", "task_weight": 0.0}}
    runs = {"same": ["bee", "cat"], "swapped": ["cat", "bee"], "other": ["ant", "cat"]}
    for name, names in runs.items():
        built = build(settings(tmp_path, names, name, **sections))
        assert built.plan.label_names == tuple(names)
        assert built.classified == (name != "other")
    scores = {}
    for name in ("same", "swapped"):
        train(settings(tmp_path, runs[name], name, **sections))
        scores[name] = records(tmp_path / name)[-1]["test_top1"]
    assert scores["swapped"] == pytest.approx(100 - scores["same"])


def test_states_without_names_go_on() -> None:
    check_same_classes({"student": {}}, ("a",), Path("run"))
    check_same_classes({"student": {"label_names": ["a"]}}, None, Path("run"))
    check_same_classes({"student": {"label_names": ["a", "b"]}}, ("a", "b"), Path("run"))
    with pytest.raises(ConfigError, match=r"3 classes.*there are 2.*'b' and 'c'"):
        check_same_classes({"student": {"label_names": ["a", "b", "c"]}}, ("a", "c"), Path("run"))
