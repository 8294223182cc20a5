"""What `runs/x`, `#last`, `#ema` and `#best` mean: the model whose number was reported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from graftvit.checkpoints.json_lines import read_records
from graftvit.checkpoints.pretrained import load_teacher
from graftvit.launch.cli import main
from graftvit.models.errors import CheckpointError
from graftvit.transfer.data.loaders import create_eval_loader
from graftvit.transfer.engine.train import train
from graftvit.transfer.metrics.measure import evaluate
from support.runs.engine_runs import config, make_teacher

STEPS = {"max_steps": 12, "warmup_epochs": 0, "lr": 0.02, "ema": 0.5}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an average, whose best evaluation is not its last."""
    folder = tmp_path_factory.mktemp("sources")
    settings = config(
        folder / "run",
        make_teacher(folder / "teacher"),
        optim=STEPS,
        data={"train_samples": 32, "batch_size": 16},
        engine={"eval_every": 1},
    )
    train(settings)
    return folder / "run"


def records(run: Path) -> list[dict[str, float]]:
    return [record for record in read_records(run / "log.jsonl") if "test_top1" in record]


def top1(source: str) -> float:
    loaded = load_teacher(source)
    loader = create_eval_loader(config(Path("unused")).data, loaded.preprocessing)
    return evaluate({"model": loaded.model}, loader)["model"].top1


def test_each_word_is_the_model_that_the_log_scored(run: Path) -> None:
    logged = records(run)
    best = max(record["test_ema_top1"] for record in logged)
    assert len({record["test_ema_top1"] for record in logged}) > 1
    assert top1(str(run)) == top1(f"{run}#last") == top1(f"{run}#student") == logged[-1]["test_top1"]
    assert top1(f"{run}#ema") == logged[-1]["test_ema_top1"]
    assert top1(f"{run}#best") == top1(f"local-dir:{run}#best") == best


def test_a_state_gives_what_was_exported(run: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(run, tmp_path / "moved")
    for word in ("", "#last", "#ema"):
        exported = load_teacher(f"{moved}{word}")
        shutil.rmtree(moved / ("student_ema" if word == "#ema" else "student"), ignore_errors=True)
        state = load_teacher(f"{moved}{word}")
        assert state.preprocessing == exported.preprocessing
        for key, tensor in exported.model.state_dict().items():
            assert torch.equal(tensor, state.model.state_dict()[key])


def test_a_run_that_went_on_is_its_newest_state(run: Path, tmp_path: Path) -> None:
    longer = shutil.copytree(run, tmp_path / "longer")
    settings = config(
        longer,
        run.parent / "teacher",
        optim=STEPS | {"max_steps": 16},
        data={"train_samples": 32, "batch_size": 16},
        engine={"eval_every": 1},
    )
    train(settings)
    old = tmp_path / "old"
    shutil.copytree(longer, old)
    for name in ("student", "student_ema"):  # as if it had been stopped before its end
        shutil.rmtree(old / name)
        shutil.copytree(run / name, old / name)
    newest = records(longer)[-1]
    assert top1(str(old)) == newest["test_top1"]
    assert top1(f"{old}#ema") == newest["test_ema_top1"]


def test_what_is_not_there_is_said(run: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(run, tmp_path / "moved")
    (moved / "checkpoints" / "best.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no best state.*leave #best out"):
        load_teacher(f"{moved}#best")
    with pytest.raises(CheckpointError, match=r"#best is of the folder of a run"):
        load_teacher(f"{moved / 'student'}#best")


@pytest.mark.parametrize("word", ["", "#best", "#ema"])
def test_every_command_takes_the_words(
    run: Path, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f"{run}{word}"
    assert main(["checkpoint", "info", source]) == 0
    assert main(["checkpoint", "save", source, str(tmp_path / "saved")]) == 0
    assert main(["push", source, "me/student", "--license", "mit", "--confirm_license", "--dry_run"]) == 0
    assert main(["evaluate", source, "--device", "cpu", "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert "Would push to me/student" in printed
    assert f" {top1(str(tmp_path / 'saved')):.2f} [" in printed
