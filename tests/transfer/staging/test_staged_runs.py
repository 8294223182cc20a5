"""Runs that read a node's own copy: the same result, and they may go on with or without it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from graftvit.launch.cli import main
from graftvit.models.errors import ConfigError
from graftvit.models.plain_yaml import parse_yaml
from graftvit.transfer.config import RunConfig
from graftvit.transfer.data import loaders
from graftvit.transfer.engine import fit_operators as together
from graftvit.transfer.engine.loop import Loop
from graftvit.transfer.engine.train import train
from graftvit.transfer.staging import stage as copying
from support.files.image_folders import class_folder
from support.runs.engine_runs import config, differences, make_teacher


def run(root: Path, name: str, stage: str | None, **engine: Any) -> RunConfig:
    if not (root / "images").exists():
        class_folder(root / "images", train=24)
        make_teacher(root / "teacher", classes=2)
    data = {"dataset": "", "data_path": str(root / "images"), "train_samples": None, "batch_size": 8}
    return config(root / name, root / "teacher", data={**data, "stage": stage}, engine=engine)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that data sets are opened at."""
    found: list[str] = []
    real = loaders.open_dataset

    def noted(data: Any, *arguments: Any, **keywords: Any) -> Any:
        found.append(str(data.data_path))
        return real(data, *arguments, **keywords)

    monkeypatch.setattr(loaders, "open_dataset", noted)
    return found


@pytest.mark.parametrize(("before", "after"), [("$DISK", None), (None, "$DISK"), ("$DISK", "$DISK/other")])
def test_a_run_goes_on_with_or_without_its_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str], before: str | None, after: str | None
) -> None:
    monkeypatch.setenv("DISK", str(tmp_path / "disk"))
    train(run(tmp_path, "plain", None))
    opened.clear()
    real = Loop._step

    def stopping(self: Loop, batches: Any) -> None:
        if self.position.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", stopping)
        assert train(run(tmp_path, "cut", before)).signal == signal.SIGTERM
    kept = parse_yaml((tmp_path / "cut" / "config.yaml").read_text())["data"]
    assert (kept["data_path"], kept["stage"]) == (str(tmp_path / "images"), before)
    assert all(path.startswith(str(tmp_path / "disk")) == (before is not None) for path in opened)
    opened.clear()
    assert train(run(tmp_path, "cut", after)).finished
    assert all(path.startswith(str(tmp_path / "disk")) == (after is not None) for path in opened)
    assert differences(tmp_path / "plain", tmp_path / "cut") == []


def test_a_variable_that_is_not_set_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="NO_SUCH_DISK is not set on"):
        train(run(tmp_path, "run", "$NO_SUCH_DISK"))


def test_a_signal_while_it_copies_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = copying._copy

    def stopped(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR2)
        real(*arguments)

    monkeypatch.setattr(copying, "_copy", stopped)
    result = train(run(tmp_path, "run", str(tmp_path / "disk")))
    assert (result.signal, result.finished, result.steps) == (signal.SIGUSR2, False, 0)
    assert not list((tmp_path / "disk").glob("*/images-*"))


def test_evaluation_takes_a_copy_where_it_is_asked_for_and_not_because_the_run_had_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DISK", str(tmp_path / "disk"))
    train(run(tmp_path, "run", "$DISK"))
    monkeypatch.delenv("DISK")
    monkeypatch.setattr("graftvit.launch.evaluation.create_eval_loader", loaders.create_eval_loader)
    shown = []
    for words in ([], ["--stage", str(tmp_path / "elsewhere")]):
        opened.clear()
        assert main(["evaluate", str(tmp_path / "run"), "--device", "cpu", *words]) == 0
        shown.append(capsys.readouterr().out)
        assert all(path.startswith(str(tmp_path / "elsewhere")) == bool(words) for path in opened)
        assert opened
    assert shown[0] == shown[1]


def test_one_process_of_a_node_copies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ranks 0 and 2 are on one node, ranks 1 and 3 on another."""
    names = ["n1", "n2", "n1", "n2"]
    data = run(tmp_path, "run", str(tmp_path / "disk")).data
    for rank, first in enumerate([0, 1, 0, 1]):
        made = [data.model_copy(update={"data_path": f"/disk/of/{name}"}) for name in names]
        answers = iter([[("host", name) for name in names], [None] * 4, made])
        monkeypatch.setattr(together, "gather", lambda item, group, answers=answers: next(answers))
        monkeypatch.setattr(together, "raise_together", lambda error, group, answers=answers: next(answers))
        monkeypatch.setattr(together.dist, "get_rank", lambda rank=rank: rank)
        copied: list[int] = []
        monkeypatch.setattr(
            together, "_try", lambda config, stopped, rank=rank, copied=copied: (copied.append(rank), None)
        )
        found = together._on_each_node(data, None, lambda: False)  # type: ignore[arg-type]
        assert found.data_path == f"/disk/of/{names[rank]}"
        assert copied == ([rank] if rank == first else [])
