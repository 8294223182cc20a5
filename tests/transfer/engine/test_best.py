"""`engine.metric` says which number picks `best`; the log has it under its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from graftvit.checkpoints.pretrained import load_teacher
from graftvit.checkpoints.state import read_state
from graftvit.launch.cli import main
from graftvit.launch.plan_text import describe_plan
from graftvit.models.errors import ConfigError
from graftvit.transfer.engine import loop
from graftvit.transfer.engine.best import Criterion
from graftvit.transfer.engine.build import build
from graftvit.transfer.engine.train import train
from support.files.image_folders import class_folder, flat_folder
from support.runs.engine_runs import config, differences, records, state


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folder(tmp_path_factory.mktemp("images"), train=6, validation=4)


def short(folder: Path, images: Path, teacher: Path | None = None, **sections: Any) -> Any:
    data = {
        "dataset": "",
        "data_path": str(images),
        "batch_size": 6,
        "train_samples": None,
        **sections.pop("data", {}),
    }
    given = sections.pop("optim", {})
    optim = {"ema": None, **({} if "max_steps" in given else {"epochs": 3}), **given}
    return config(folder, teacher, data=data, optim=optim, **sections)


def position(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_state(folder / "checkpoints" / "best.safetensors").meta["position"]
    return found


@pytest.mark.parametrize(
    ("metric", "key", "less"),
    [
        ("auto", "top1", False),
        ("top1", "top1", False),
        ("loss", "loss", True),
        ("knn", "knn_top1", False),
        ("probe", "probe_top1", False),
        ("distance", "relative_error", True),
    ],
)
def test_the_metric_is_logged_and_picks_the_best(
    metric: str, key: str, less: bool, images: Path, teacher: Path, tmp_path: Path
) -> None:
    run = short(tmp_path, images, teacher, transfer={"method": "feature"}, engine={"metric": metric})
    assert f"the state with the {'smallest' if less else 'largest'} test_{key}\n" in describe_plan(run)
    result = train(run)
    values = [record[f"test_{key}"] for record in records(tmp_path) if "n_parameters" in record]
    assert len(values) == 3
    assert position(tmp_path)["best"] == (min if less else max)(values)
    assert position(tmp_path)["best_metric"] == key
    assert result.metrics[f"best_{key}"] == position(tmp_path)["best"]
    assert all("test_top1" in record for record in records(tmp_path) if "n_parameters" in record)


def test_it_changes_which_state_is_the_best(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By accuracy the first epoch is the best, by loss the second."""
    steps = {}
    for metric in ("top1", "loss"):
        numbers = iter([{"test_top1": 90.0, "test_loss": 0.5}, {"test_top1": 80.0, "test_loss": 0.2}])
        monkeypatch.setattr(loop, "score", lambda *_, numbers=numbers: next(numbers))
        folder = tmp_path / metric
        train(short(folder, images, engine={"metric": metric}, optim={"epochs": 2}))
        steps[metric] = position(folder)["epoch"]
        made = load_teacher(f"{folder}#best").provenance
        assert (made["picked"], made["step"]) == (metric, position(folder)["step"])
        assert "picked" not in load_teacher(str(folder)).provenance
    assert steps == {"top1": 1, "loss": 2}


def test_a_stop_and_a_resume_keep_the_best(teacher: Path, tmp_path: Path) -> None:
    images = flat_folder(tmp_path / "images", validation=6)
    student = {"model": f"local-dir:{teacher}", "model_args": {}, "plan": "*: linear", "drop_path": 0.0}

    def run(name: str, epochs: int) -> None:
        made = short(
            tmp_path / name,
            images,
            teacher,
            mode="align",
            student=student,
            optim={"epochs": epochs, "ema": 0.9},
        )
        train(made)

    run("whole", 3)
    whole = state(tmp_path / "whole", "best")
    run("parts", 3)
    (
        tmp_path / "parts" / "checkpoints" / "last.safetensors"
    ).unlink()  # as if it had been killed in its last epoch
    run("parts", 3)
    assert position(tmp_path / "parts") == position(tmp_path / "whole") | {
        "run_id": position(tmp_path / "parts")["run_id"]
    }
    assert whole.keys() == state(tmp_path / "parts", "best").keys()
    assert differences(tmp_path / "whole", tmp_path / "parts") == []


def test_another_metric_begins_anew(images: Path, teacher: Path, tmp_path: Path) -> None:
    train(short(tmp_path, images, teacher, optim={"max_steps": 2}))
    assert position(tmp_path)["best_metric"] == "top1"
    train(short(tmp_path, images, teacher, optim={"max_steps": 4}, engine={"metric": "loss"}))
    assert position(tmp_path)["best_metric"] == "loss"
    assert position(tmp_path)["best"] < 10, "no accuracy is compared with a loss"


def test_pretraining_can_be_followed_by_its_neighbors(images: Path, tmp_path: Path) -> None:
    run = short(tmp_path, images, mode="pretrain", engine={"metric": "knn"})
    train(run)
    assert position(tmp_path)["best_metric"] == "knn_top1"
    assert 0 <= position(tmp_path)["best"] <= 100


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"engine": {"metric": "distance"}},
            "engine.metric=distance needs a teacher, and mode=scratch has none",
        ),
        ({"mode": "pretrain", "engine": {"metric": "top1"}}, "engine.metric=top1 needs labels and a head"),
        (
            {"mode": "pretrain", "data": {"data_path": "flat"}, "engine": {"metric": "knn"}},
            "metric=knn needs test images",
        ),
        (
            {"mode": "pretrain", "data": {"data_path": "split"}, "engine": {"metric": "probe"}},
            "metric=probe needs labels",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(
    sections: dict[str, Any], words: str, images: Path, tmp_path: Path
) -> None:
    places = {"flat": flat_folder(tmp_path / "flat"), "split": flat_folder(tmp_path / "split", validation=3)}
    if "data" in sections:
        sections = sections | {"data": {"data_path": str(places[sections["data"]["data_path"]])}}
    with pytest.raises(ConfigError, match=words):
        build(short(tmp_path / "run", images, **sections))
    with pytest.raises(ConfigError, match=words):
        describe_plan(short(tmp_path / "run", images, **sections))


@pytest.mark.parametrize("metric", ["knn", "probe", "distance"])
def test_evaluate_gives_what_the_run_logged(metric: str, images: Path, teacher: Path, tmp_path: Path) -> None:
    """Of the student that it leaves, from the folder alone."""
    student = {"model": f"local-dir:{teacher}", "model_args": {}, "plan": "*: linear", "drop_path": 0.0}
    train(short(tmp_path / "run", images, teacher, mode="align", student=student, engine={"metric": metric}))
    words = [
        "evaluate",
        f"local-dir:{tmp_path / 'run' / 'student'}",
        "--metrics",
        metric,
        "--data_path",
        str(images),
    ]
    words += ["--against", f"local-dir:{teacher}"] if metric == "distance" else []
    assert main([*words, "--workers", "0", "--device", "cpu", "--json", str(tmp_path / "x.json")]) == 0
    found = next(iter(json.loads((tmp_path / "x.json").read_text()).values()))  # random weights may follow
    logged = [record for record in records(tmp_path / "run") if "n_parameters" in record][-1]
    assert {
        f"test_{key}": value for key, value in found.items() if not key.endswith("_interval")
    } == pytest.approx({key: value for key, value in logged.items() if key.startswith("test_")}, rel=1e-5)


def test_more_or_less_is_better() -> None:
    assert Criterion("top1", "top1").better(2.0, 1.0)
    assert not Criterion("loss", "top1").better(2.0, 1.0)
    assert Criterion("cka", "distance").better(0.5, None)
    assert not Criterion("top1", "top1").better(1.0, 1.0)
