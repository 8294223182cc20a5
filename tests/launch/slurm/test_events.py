"""What the command of `on_event` is told, and that it cannot harm the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from graftvit.launch.slurm import attempt
from graftvit.launch.slurm.folder import JobFolder
from graftvit.transfer.engine.early_signals import remembering
from support.runs.engine_runs import config
from support.runs.patience import until
from support.runs.typed import Typed
from support.slurm.cluster_users import write_site
from support.slurm.slurm_folders import submitted


def told(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("broken", [False, True])
def test_a_run_tells_of_its_start_and_its_end(tmp_path: Path, typed: Typed, broken: bool) -> None:
    """A loss that is not finite is a failure."""
    heard = tmp_path / "heard"
    write_site(on_event=f"cat >> {heard}", gpus_per_node=0)
    run = config(tmp_path / "run", optim={"blr": 1e30} if broken else {})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    with remembering():  # so that the handlers of the job do not stay
        typed("submit", tmp_path / "run.yaml", "--cluster", "debug", code=1 if broken else 0)
    until(lambda: len(told(heard)) == 2, lambda: told(heard))
    first, last = sorted(told(heard), key=lambda one: float(str(one["time"])))
    assert (first["event"], last["event"]) == ("start", "failure" if broken else "finish")
    assert (first["run"], first["attempt"], first["restart"]) == (str(tmp_path / "run"), 1, 0)
    assert bool(last["why"]) == broken
    assert (tmp_path / "run" / "student" / "model.safetensors").exists() != broken
    assert broken or last["step"] == last["total_steps"] != 0


@pytest.mark.parametrize("command", ["exit 3", "no-such-program", "sleep 60"])
def test_a_command_that_fails_is_said_and_harms_nothing(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attempt, "TIMEOUT", 0.2)
    attempt.tell(submitted(tmp_path), "start", {"on_event": command})
    assert capfd.readouterr().err.startswith("graftvit: on_event (start): ")


def test_no_progress_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = tmp_path / "heard"
    monkeypatch.setattr(attempt, "POLL", 0.01)
    files = JobFolder(tmp_path)
    resources = {"on_event": f"cat >> {heard}", "event_minutes": 0}
    with attempt.stall_watch(files, resources, {"job_id": "7"}):
        until(lambda: told(heard), "the event")
        (tmp_path / "log.jsonl").write_text('{"step": 5}\n')
        until(lambda: len(told(heard)) == 2, lambda: told(heard))
    found = [(one["event"], one["step"], one["job_id"]) for one in told(heard)]
    assert found == [("stall", 0, "7"), ("stall", 5, "7")]
