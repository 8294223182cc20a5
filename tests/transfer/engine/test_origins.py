"""What a run knows of the weights it came from: the teacher's commit and license, in config, states and students."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from graftvit.checkpoints.pretrained import Teacher, load_teacher, load_weights
from graftvit.checkpoints.report import LoadReport
from graftvit.models.errors import CheckpointError, ConfigError
from graftvit.models.plain_yaml import parse_yaml
from graftvit.transfer.engine import build as building
from graftvit.transfer.engine.resume_check import check_same_teacher
from graftvit.transfer.engine.train import train
from support.runs.engine_runs import config, state

COMMIT, MOVED = "c" * 40, "d" * 40


class Hub:
    """Gives the local teacher as if it came from a hub whose main branch stands at `head`."""

    def __init__(self) -> None:
        self.head = COMMIT
        self.asked: list[str | None] = []

    def load(self, source: str, *, revision: str | None = None, **how: Any) -> Teacher:
        self.asked.append(revision)
        commit = revision if revision and len(revision) == 40 else self.head
        return replace(load_teacher(source, **how), revision=commit, license="cc-by-nc-4.0")

    def start(self, *given: Any, revision: str | None, **how: Any) -> LoadReport:
        return replace(load_weights(*given, **how), revision=revision, license="cc-by-nc-4.0")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(building, "load_pretrained", hub.load)
    monkeypatch.setattr(building, "load_weights", hub.start)
    return hub


def test_the_commit_is_recorded_and_loaded_again(tmp_path: Path, teacher: Path, hub: Hub) -> None:
    run = config(tmp_path, teacher, optim={"max_steps": 3})
    train(run)
    written = parse_yaml((tmp_path / "config.yaml").read_text())
    assert written["teacher"]["revision"] == COMMIT
    hub.head = MOVED
    train(config(tmp_path, teacher, optim={"max_steps": 4}))
    assert hub.asked == [None, COMMIT]
    # the run's own config.yaml continues it too, and then the first command again; another commit does not
    again = run.model_validate(written | {"optim": written["optim"] | {"max_steps": 5}})
    assert train(again).steps == 5
    assert train(config(tmp_path, teacher, optim={"max_steps": 6})).steps == 6
    assert hub.asked[2:] == [COMMIT, COMMIT]
    with pytest.raises(ConfigError, match=r"teacher\.revision='d{40}', but the run .* was started with None"):
        train(config(tmp_path, teacher, optim={"max_steps": 7}).model_copy(
            update={"teacher": run.teacher.model_copy(update={"revision": MOVED})}))  # fmt: skip
    assert state(tmp_path)


@pytest.mark.parametrize("mode", ["transfer", "finetune"])
def test_students_say_what_they_learned_from(tmp_path: Path, teacher: Path, hub: Hub, mode: str) -> None:
    result = train(config(tmp_path, teacher, mode=mode, optim={"epochs": 1}))
    for folder, part in (("student", "student"), ("student_ema", "ema")):
        saved = json.loads((tmp_path / folder / "config.json").read_text())
        made = saved["graftvit"]
        assert made["part"] == part
        assert made["teacher"]["revision"] == COMMIT
        assert made["recipe"]["mode"] == mode
        assert "output_dir" not in made["recipe"]
        prefix = "test_ema_" if part == "ema" else "test_"
        assert (made["init"] or {}).get("revision") == (COMMIT if mode == "finetune" else None)
        assert made["results"]["top1"] == result.metrics[f"{prefix}top1"]
        assert saved["pretrained_cfg"]["license"] == "cc-by-nc-4.0"
        assert load_teacher(str(tmp_path / folder)).license == "cc-by-nc-4.0"
    (tmp_path / "student" / "config.json").unlink()  # as a run that was stopped has none
    stopped = load_teacher(str(tmp_path))
    assert stopped.license == "cc-by-nc-4.0"
    assert stopped.provenance["teacher"]["revision"] == COMMIT


def test_processes_that_loaded_different_commits_stop() -> None:
    origins = [{"teacher": {"revision": commit}, "init": None} for commit in (COMMIT, MOVED)]
    check_same_teacher(origins[:1] * 2)
    with pytest.raises(CheckpointError, match=r"different weights from the hub .*give teacher\.revision"):
        check_same_teacher(origins)
