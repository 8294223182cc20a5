"""A run on labelled images with no split to evaluate on."""

from __future__ import annotations

from pathlib import Path

from graftvit.transfer.engine.train import train
from support.files.image_folders import class_folder
from support.runs.engine_runs import config, records


def test_a_run_without_a_validation_split_trains_and_leaves_its_last_student(tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "photos", validation=0)
    data = {"dataset": "", "data_path": str(folder), "val_split": None, "train_samples": None, "mixup": 0.0}
    result = train(config(tmp_path / "run", data=data))
    assert result.finished
    assert not [key for record in records(tmp_path / "run") for key in record if key.startswith("test_")]
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()
    assert not (tmp_path / "run" / "checkpoints" / "best.safetensors").exists()
