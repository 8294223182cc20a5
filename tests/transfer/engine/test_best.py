"""Which number picks `best`, and a run that ends when it gets no better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from graftvit.checkpoints import load
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.state import read_state
from graftvit.launch.cli import main
from graftvit.launch.plan_text import describe_plan
from graftvit.models.errors import ConfigError
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine import loop
from graftvit.transfer.engine.build import build
from graftvit.transfer.engine.modes import Criterion
from graftvit.transfer.engine.train import train
from support.files.image_folders import class_folder, flat_folder
from support.runs.engine_runs import config, differences, records, resume_cut, state


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folder(tmp_path_factory.mktemp("images"), train=6, validation=4)


def short(folder: Path, images: Path, teacher: Path | None = None, **sections: Any) -> Any:
    data = {"dataset": "", "data_path": str(images), "batch_size": 6, "train_samples": None}
    optim = {"ema": None, "epochs": 3} | sections.pop("optim", {})
    return config(folder, teacher, data=data | sections.pop("data", {}), optim=optim, **sections)


def converted(teacher: Path) -> dict[str, Any]:
    return {"model": f"local-dir:{teacher}", "model_args": {}, "plan": "*: linear", "drop_path": 0.0}


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
        ("knn of pretraining", "knn_top1", False),
    ],
)
def test_the_metric_is_logged_and_picks_the_best(
    metric: str, key: str, less: bool, images: Path, teacher: Path, tmp_path: Path
) -> None:
    how = {"engine": {"metric": metric.split()[0]}}
    if pretrain := metric.endswith("pretraining"):
        run = short(tmp_path, images, mode="pretrain", **how)
    else:
        run = short(tmp_path, images, teacher, transfer={"method": "feature"}, **how)
    assert f"the state with the {'smallest' if less else 'largest'} test_{key}\n" in describe_plan(run)
    result = train(run)
    evaluated = [record for record in records(tmp_path) if "n_parameters" in record]
    values = [record[f"test_{key}"] for record in evaluated]
    assert len(values) == 3
    assert position(tmp_path)["best"] == (min if less else max)(values)
    assert position(tmp_path)["best_metric"] == key
    assert result.metrics[f"best_{key}"] == position(tmp_path)["best"]
    assert all(("test_top1" in record) != pretrain for record in evaluated)


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
        made = load_pretrained(f"{folder}#best").provenance
        assert (made["picked"], made["step"]) == (metric, position(folder)["step"])
        assert "picked" not in load_pretrained(str(folder)).provenance
    assert steps == {"top1": 1, "loss": 2}


def test_a_stop_and_a_resume_keep_the_best(teacher: Path, tmp_path: Path) -> None:
    images = flat_folder(tmp_path / "images", validation=6)
    how = {"mode": "align", "student": converted(teacher), "optim": {"epochs": 3, "ema": 0.9}}
    resume_cut(lambda folder: short(folder, images, teacher, **how), tmp_path)
    whole, cut = ({**position(tmp_path / name), "run_id": ""} for name in ("whole", "cut"))
    assert whole == cut
    assert state(tmp_path / "whole", "best").keys() == state(tmp_path / "cut", "best").keys()


def test_another_metric_begins_anew(images: Path, teacher: Path, tmp_path: Path) -> None:
    for epochs, metric in ((1, "top1"), (2, "loss")):
        train(short(tmp_path, images, teacher, optim={"epochs": epochs}, engine={"metric": metric}))
        assert position(tmp_path)["best_metric"] == metric
    assert position(tmp_path)["best"] < 10, "no accuracy is compared with a loss"


PRETRAIN = {"mode": "pretrain"}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"engine": {"metric": "distance"}}, "metric=distance needs a teacher, and mode=scratch has none"),
        ({**PRETRAIN, "engine": {"metric": "top1"}}, "engine.metric=top1 needs labels and a head"),
        ({**PRETRAIN, "data": "flat", "engine": {"metric": "knn"}}, "metric=knn needs test images"),
        ({**PRETRAIN, "data": "split", "engine": {"metric": "probe"}}, "metric=probe needs labels"),
        ({"engine": {"patience": 2}, "data": None}, "engine.patience needs evaluations with a metric"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    sections: dict[str, Any], words: str, images: Path, tmp_path: Path
) -> None:
    places = {"flat": flat_folder(tmp_path / "flat"), "split": flat_folder(tmp_path / "split", validation=3)}
    where = sections.get("data", "")
    data = {"val_split": None} if where is None else {"data_path": str(places[where])} if where else {}
    run = short(tmp_path / "run", images, **sections | {"data": data})
    for refused in (build, describe_plan, train):
        with pytest.raises(ConfigError, match=words):
            refused(run)


@pytest.mark.parametrize("metric", ["knn", "probe", "distance"])
def test_evaluate_gives_what_the_run_logged(metric: str, images: Path, teacher: Path, tmp_path: Path) -> None:
    """Of the student that it leaves, from the folder alone."""
    how = {"mode": "align", "student": converted(teacher), "engine": {"metric": metric}}
    train(short(tmp_path / "run", images, teacher, **how))
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
    scores = next(iter(json.loads((tmp_path / "x.json").read_text()).values()))  # random weights may follow
    found = {f"test_{key}": value for key, value in scores.items() if not key.endswith("_interval")}
    logged = [record for record in records(tmp_path / "run") if "n_parameters" in record][-1]
    assert found == pytest.approx({k: v for k, v in logged.items() if k.startswith("test_")}, rel=1e-5)


def test_more_or_less_is_better() -> None:
    assert Criterion("top1", "top1").better(2.0, 1.0)
    assert not Criterion("loss", "top1").better(2.0, 1.0)
    assert Criterion("cka", "distance").better(0.5, None)
    assert not Criterion("top1", "top1").better(1.0, 1.0)


def test_a_run_keeps_its_newest_states(tmp_path: Path) -> None:
    run = config(tmp_path / "run", engine={"keep_states": 2, "save_every": 3}, optim={"max_steps": 9})
    assert train(run).finished
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert names == ["step-00000006.safetensors", "step-00000009.safetensors"]
    assert load(tmp_path / "run" / "checkpoints" / names[0]).num_classes == 10


SCORES = (10.0, 30.0, 20.0, 30.0, 25.0, 40.0, 5.0, 5.0, 5.0)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations of a run that give `SCORES`."""
    runs: list[loop.Loop] = []
    evaluate = loop.Loop._evaluate

    def noted(self: loop.Loop, record: dict[str, float]) -> bool:
        runs[:] = [self]
        return evaluate(self, record)

    scores = lambda *_: {"test_top1": SCORES[runs[0].position.epoch], "test_loss": 1.0}  # noqa: E731
    monkeypatch.setattr(loop, "score", scores)
    monkeypatch.setattr(loop.Loop, "_evaluate", noted)


def patient(folder: Path, patience: int | None) -> RunConfig:
    return config(
        folder, engine={"patience": patience}, optim={"epochs": 9, "ema": None}, data={"train_samples": 32}
    )


@pytest.mark.usefixtures("scored")
@pytest.mark.parametrize(
    ("patience", "epochs", "best"), [(1, 3, 30.0), (2, 4, 30.0), (3, 5, 30.0), (4, 9, 40.0)]
)
def test_a_run_ends_after_so_many_evaluations_that_are_no_better(
    tmp_path: Path, patience: int, epochs: int, best: float, caplog: pytest.LogCaptureFixture
) -> None:
    result = train(patient(tmp_path / "run", patience))
    assert result.finished
    assert result.metrics["best_top1"] == best
    found = [record["test_top1"] for record in records(tmp_path / "run") if "test_top1" in record]
    assert found == list(SCORES[:epochs])
    said = f"{patience} evaluation{'s' * (patience > 1)} without a better value"
    assert (said in caplog.text) == (epochs < 9)
    assert (tmp_path / "run" / "student").is_dir()


@pytest.mark.usefixtures("scored")
def test_a_run_that_ended_early_is_continued_with_more_patience(tmp_path: Path) -> None:
    train(patient(tmp_path / "cut", 1))
    assert train(patient(tmp_path / "cut", 1)).steps == 6  # still ended
    assert train(patient(tmp_path / "cut", 4)).metrics["best_top1"] == 40.0
    train(patient(tmp_path / "whole", 4))
    assert differences(tmp_path / "whole", tmp_path / "cut") == []
