"""What a submission into a folder that holds a run says before it is sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from graftvit.launch.cli import main
from graftvit.launch.load_config import dump_config, parse_override
from graftvit.launch.plan_text import describe_plan
from graftvit.launch.slurm import submission
from graftvit.launch.slurm.requests import plan_run
from graftvit.launch.slurm.settings import ClusterConfig
from graftvit.launch.slurm.submission import describe_again, refuse_finished
from graftvit.models.errors import ConfigError
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine.train import train
from support.runs.engine_runs import config, make_teacher
from support.slurm.slurm_folders import attempted, submitted
from support.slurm.sweep_folders import make_sweep


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)


def finished(folder: Path) -> RunConfig:
    """A run of one epoch that was submitted as job 12 and is through."""
    run = config(folder, optim={"epochs": 1})
    train(run)
    submitted(folder)
    return run


def again(run: RunConfig, *words: str, **resources: Any) -> str:
    Path("run.yaml").write_text(dump_config(run))
    plan = plan_run("run.yaml", [parse_override(word) for word in words], [])
    return describe_again(plan, ClusterConfig(**resources))


def test_what_is_resumed_and_what_differs_is_said(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    assert again(run, "optim.epochs=3", nodes=2) == (
        "resumes at epoch 2 of 3; changed: optim.epochs 1 -> 3, nodes 1 -> 2"
    )
    assert again(run, "optim.max_steps=40", "data.workers=1", partition="gpu", sbatch={"nice": 5}) == (
        "resumes at epoch 2 of a run of 40 steps; changed: data.workers 0 -> 1, optim.max_steps none -> 40, "
        "partition none -> gpu, sbatch.nice none -> 5"
    )
    assert again(run) == "has finished: nothing is left to train; nothing changed"
    longer = run.model_copy(update={"optim": run.optim.model_copy(update={"epochs": 3})})
    assert "changed: optim.epochs 1 -> 3\n" in describe_plan(longer)


def test_a_run_that_has_finished_is_not_submitted_for_nothing(tmp_path: Path) -> None:
    finished(tmp_path / "run")
    attempted(tmp_path / "run", "finished")
    plan = plan_run(str(tmp_path / "run"), [], [])
    with pytest.raises(ConfigError, match="has finished: there is nothing left to train; give more --epochs"):
        refuse_finished(plan)
    refuse_finished(plan_run(str(tmp_path / "run"), [parse_override("optim.epochs=3")], []))


def test_a_run_that_ended_without_a_last_word_is_submitted_again(tmp_path: Path) -> None:
    finished(tmp_path / "run")  # no attempt says that it finished: its student may be missing
    refuse_finished(plan_run(str(tmp_path / "run"), [], []))


def test_a_new_run_and_one_that_saved_nothing(tmp_path: Path) -> None:
    run = config(tmp_path / "run")
    assert again(run) == ""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_config(run))
    assert again(run, "seed=3") == "starts again, because nothing was saved; changed: seed 0 -> 3"


def test_the_commit_of_a_teacher_is_no_change(tmp_path: Path) -> None:
    run = config(tmp_path / "run", make_teacher(tmp_path / "teacher"))
    pinned = run.model_copy(update={"teacher": run.teacher.model_copy(update={"revision": "abc"})})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_config(pinned))
    assert again(run).endswith("nothing changed")


def test_cells_that_go_on_are_counted(tmp_path: Path) -> None:
    words = ["seed=0..1"]
    sweep = make_sweep(tmp_path / "sweep", *words)
    (sweep.cells[1].folder / "checkpoints").mkdir(parents=True)
    (sweep.cells[1].folder / "checkpoints" / "last.safetensors").touch()
    plan = plan_run("digits_scratch", [parse_override(f"output_dir={tmp_path / 'sweep'}")], words)
    assert (
        describe_again(plan, ClusterConfig())
        == f"1 of {len(plan.requests)} cells resumes from what it has saved"
    )


def test_it_is_said_before_the_job_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(tmp_path / "run")
    Path("run.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    heard: list[str] = []

    def send(launch: object) -> list[str]:
        heard.append(capsys.readouterr().err)
        return ["77"]

    monkeypatch.setattr(submission, "submit", send)
    monkeypatch.setattr(submission, "_refuse_second", lambda *_: None)
    words = ["--optim.epochs", "2", "--cluster", "local", "--gpus_per_node", "0", "--unchecked"]
    assert main(["submit", "run.yaml", *words]) == 0
    assert (
        "graftvit: resumes at epoch 2 of 2; changed: optim.epochs 1 -> 2, cluster slurm -> local" in heard[0]
    )
    assert capsys.readouterr().out.startswith("submitted job 77 in")


def test_of_stages_each_changed_setting_is_named_with_its_stage(tmp_path: Path) -> None:
    run = config(tmp_path / "run").model_dump(mode="json")
    recipe = {**run, "stages": [{"name": "one"}, {"name": "two", "optim": {"epochs": 2}}]}
    Path("run.yaml").write_text(yaml.safe_dump(recipe))
    plan_run("run.yaml", [], []).write()
    submitted(tmp_path / "run")
    (tmp_path / "run" / "1-two").mkdir()
    (tmp_path / "run" / "1-two" / "config.yaml").write_text("")

    def said(*words: str) -> str:
        plan = plan_run("run.yaml", [parse_override(word) for word in words], [])
        return describe_again(plan, ClusterConfig(nodes=2)).partition("; ")[2]

    assert said() == "changed: nodes 1 -> 2"
    recipe["stages"][1]["optim"]["epochs"] = 4
    Path("run.yaml").write_text(yaml.safe_dump(recipe))
    assert said() == "changed: two.optim.epochs 2 -> 4, nodes 1 -> 2"
    assert said("seed=7") == (
        "changed: one.seed 0 -> 7, two.optim.epochs 2 -> 4, two.seed 0 -> 7, nodes 1 -> 2"
    )
    (tmp_path / "run" / "jobs" / "config.yaml").write_text("[")
    assert said() == "changed: nodes 1 -> 2"
