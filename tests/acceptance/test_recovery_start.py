"""README's recipe for cheap attention: a teacher that was trained here is recovered from what `convert` makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from graftvit.launch.cli import main
from support.runs.typed import Typed

SMALL = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
SHORT = ["--device", "cpu", "--workers", "0", "--batch_size", "24", "--no-progress"]


@pytest.fixture(scope="module", params=[(), ("--global_pool", "token")], ids=["default", "token"])
def teacher(request: pytest.FixtureRequest, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student's folder of a small ViT of 48 px, trained on the photographs from scratch."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    model = ["--model", "vit_tiny_patch16_224", "--img_size", "48", "--model_args", json.dumps(SMALL)]
    length = ["--epochs", "15", "--warmup_epochs", "1", "--lr", "2e-3", "--aa", "none", "--eval_every", "15"]
    words = ["train", "--mode", "scratch", "--data_path", str(photos), "--output_dir", str(run)]
    assert main([*words, *model, *length, *SHORT, *request.param]) == 0
    return run / "student"


def evaluated(source: Path, photos: Path, file: Path) -> dict[str, Any]:
    words = ["evaluate", str(source), "--data_path", str(photos), "--device", "cpu", "--workers", "0"]
    assert main([*words, "--json", str(file)]) == 0
    (found,) = json.loads(file.read_text()).values()
    return dict(found)


def test_recovery_starts_at_the_accuracy_of_the_converted_teacher(
    teacher: Path, photos: Path, tmp_path: Path, typed: Typed
) -> None:
    typed("convert", teacher, "--plan", "*: linear", "--output_dir", tmp_path / "converted")
    wanted = evaluated(tmp_path / "converted", photos, tmp_path / "converted.json")
    run = tmp_path / "run"
    words = ["train", "recover_vit_base", "--teacher", str(teacher), "--data_path", str(photos), *SHORT]
    words += ["--num_classes", "none", "--max_steps", "1", "--output_dir", str(run)]
    plan = typed(*words, "--dry_run").out
    assert "vit_tiny_patch16_224 converted by '*: linear'" in plan
    assert "warning:" not in plan
    typed(*words)
    first = json.loads((run / "1-align" / "log.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0
    assert {key: first[f"test_{key}"] for key in ("top1", "top5")} == {
        key: wanted[key] for key in ("top1", "top5")
    }
    assert first["test_loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    assert wanted["top1"] > 100 / 6  # more than by chance
