"""A tiny comparison on digits for tests: a YAML file, and what a cell wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from support.runs.engine_runs import ARCHITECTURE, ARGUMENTS, make_teacher


def write_config(folder: Path, plans: dict[str, str], **compare: Any) -> Path:
    """The path of `compare.yaml`, with a teacher beside it and two short stages."""
    teacher = make_teacher(folder / "given-teacher")
    config = {
        "output_dir": str(folder / "out"),
        "teacher": {"source": f"local-dir:{teacher}"},
        "student": {"model": ARCHITECTURE, "model_args": ARGUMENTS, "img_size": 8, "global_pool": "token",
                    "init": "teacher"},
        "data": {"dataset": "digits", "batch_size": 32, "eval_batch_size": 256, "workers": 0, "train_samples": 130,
                 "aa": "none", "hflip": 0.0, "crop_scale": [0.8, 1.0]},
        "optim": {"epochs": 2, "lr": 1e-3, "warmup_epochs": 0.5},
        "engine": {"device": "cpu", "trackers": [], "eval_every": 1, "save_every": 2},
        "stages": [
            {"name": "align", "mode": "align"},
            {"name": "task", "mode": "transfer", "transfer": {"method": "logits", "weight": 1.0}},
        ],
        "compare": {"plans": plans, "batch_size": 4, "repeats": 2, "error_batches": 1, **compare},
    }  # fmt: skip
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def write_config_with_teacher(folder: Path, name: str) -> Path:
    """The same, whose teacher the recipe `name` beside it makes first, in one epoch."""
    path = write_config(folder, {"linear": "*: linear"})
    whole = yaml.safe_load(path.read_text())
    del whole["teacher"]
    whole["optim"]["epochs"] = 1
    whole["compare"]["teacher_recipe"] = name
    path.write_text(yaml.safe_dump(whole))
    teacher = {"mode": "scratch", "optim": {"epochs": 1, "lr": 1e-3, "warmup_epochs": 0}}
    teacher |= {key: whole[key] for key in ("data", "engine")}
    teacher["student"] = {key: value for key, value in whole["student"].items() if key != "init"}
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(yaml.safe_dump(teacher))
    return path


def cell(folder: Path, name: str) -> dict[str, Any]:
    """The record of a cell as it is on the disk."""
    record: dict[str, Any] = json.loads((folder / "out" / "cells" / name / "cell.json").read_text())
    return record
