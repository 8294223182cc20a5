"""What is submitted: the frozen files say the same as what the user wrote, and nothing impossible is frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from graftvit.launch.comparison import load_comparison
from graftvit.launch.load_config import load_config, load_stages, parse_override
from graftvit.launch.slurm import submission
from graftvit.launch.slurm.job_folder import JobFolder
from graftvit.launch.slurm.preview import preview
from graftvit.launch.slurm.requests import SubmissionPlan, plan_run
from graftvit.launch.slurm.settings import ClusterConfig
from graftvit.launch.slurm.submission import check
from graftvit.launch.slurm.sweep import load_sweep
from graftvit.models.errors import ConfigError
from support.runs.compare_runs import write_config
from support.slurm.slurm_folders import HERE, attempted, say, submitted

STAGES = {
    "output_dir": "out",
    "data": {"dataset": "digits"},
    "student": {"model": "vit_tiny_patch16_224", "init": "teacher", "plan": "*: linear"},
    "teacher": {"source": "vit_tiny_patch16_224"},
    "stages": [
        {"name": "align", "mode": "align", "optim": {"epochs": 1}},
        {"name": "task", "mode": "transfer", "optim": {"epochs": 2}},
    ],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user is."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planned(recipe: str | None, *words: str, sweep: list[str] | None = None) -> SubmissionPlan:
    plan = plan_run(recipe, [parse_override(word) for word in words], sweep or [])
    plan.write()
    return plan


def with_teacher(folder: Path, name: str) -> Path:
    """A comparison whose teacher is made by the recipe `name`, a file beside it."""
    path = write_config(folder, {"linear": "*: linear"})
    whole = yaml.safe_load(path.read_text())
    del whole["teacher"]
    student = {key: value for key, value in whole["student"].items() if key != "init"}
    recipe = {"mode": "scratch", "student": student, "data": whole["data"]}
    recipe["optim"] = {"epochs": 1, "warmup_epochs": 0}
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(yaml.safe_dump(recipe))
    whole["compare"]["teacher_recipe"] = name
    path.write_text(yaml.safe_dump(whole))
    return path


def test_a_run_is_frozen_with_all_its_settings(folder: Path) -> None:
    plan = planned("cifar10_distill", "output_dir=out", "seed=7")
    frozen = folder / "out" / "jobs" / "config.yaml"
    (request,) = plan.requests
    assert (request.words, request.output_dir) == (["train", str(frozen)], folder / "out")
    assert load_config(frozen) == load_config("cifar10_distill", ["seed=7", f"output_dir={folder / 'out'}"])
    assert plan.configs == [load_config(frozen)]


@pytest.mark.parametrize("sweep", [[], ["seed=0..1"]])
def test_a_restart_goes_on_with_a_run_that_was_told_to_begin_anew(folder: Path, sweep: list[str]) -> None:
    words = ("digits_scratch", "output_dir=out", "engine.resume=never")
    (*_, last) = planned(*words, sweep=sweep).requests
    assert load_config(last.words[1]).engine.resume == "auto"
    (last.output_dir / "log.jsonl").touch()
    with pytest.raises(ConfigError, match="already holds a run"):
        planned(*words, sweep=sweep)


def test_stages_stay_stages(folder: Path) -> None:
    (folder / "mine.yaml").write_text(yaml.safe_dump(STAGES))
    (request,) = planned("mine.yaml", "optim.blr=0.5").requests
    expected = load_stages("mine.yaml", ["optim.blr=0.5", f"output_dir={folder / 'out'}"])
    assert load_stages(request.words[1]) == expected
    assert [stage.config.optim.epochs for stage in expected] == [1, 2]


def test_what_is_checked_of_a_sweep_is_its_first_cell(folder: Path) -> None:
    plan = planned(
        None, "output_dir=out", "dataset=folder", sweep=["data.data_path=/data/a,/data/b", "seed=3..4"]
    )
    assert [request.output_dir.name for request in plan.requests] == [
        "data_path=data-a,seed=3", "data_path=data-a,seed=4", "data_path=data-b,seed=3", "data_path=data-b,seed=4",
    ]  # fmt: skip
    (first,) = plan.configs
    assert (first.data.data_path, first.seed) == ("/data/a", 3)
    assert first == load_config(plan.requests[0].words[1])
    assert load_sweep(folder / "out") == plan.sweep


def test_cells_that_have_finished_are_left_out(folder: Path) -> None:
    def plan(*words: str) -> SubmissionPlan:
        return planned("digits_scratch", "output_dir=out", *words, sweep=["seed=0..2"])

    cells = [request.output_dir for request in plan().requests]
    attempted(cells[0], "finished")
    attempted(cells[1], "failed")
    again = plan()
    assert [request.output_dir for request in again.requests] == cells[1:]
    local = ClusterConfig(cluster="local", nodes=1, gpus_per_node=0)
    assert "left out: 1 of 3 cells, which have finished\n" in preview(again, local, unchecked=True).text
    attempted(cells[1], "finished")
    attempted(cells[2], "finished")
    with pytest.raises(ConfigError, match=r"all 3 cells of .*out have finished: `graftvit summary"):
        plan()
    longer = plan("optim.epochs=9")  # whether these can go on is for the run to say
    assert [request.output_dir for request in longer.requests] == cells


def test_a_cell_of_a_comparison_is_a_job(folder: Path) -> None:
    path = write_config(folder, {"linear": "*: linear"})
    plan = planned(str(path), "engine.device=cpu", "data.workers=1", "seed=5")
    frozen, cells = folder / "out" / "jobs" / "config.yaml", ["teacher-8", "uniform-8", "linear-8"]
    assert plan.first is None
    assert [request.output_dir for request in plan.requests] == [
        folder / "out" / "cells" / name for name in cells
    ]
    for request, name in zip(plan.requests, cells, strict=True):
        taken = ["--engine.device=cpu", "--data.workers=1"]
        assert request.words == ["compare", str(frozen), *taken, "--cell", name]
    assert same_numbers(path, frozen, "seed=5", "data.workers=1")


def same_numbers(path: Path, frozen: Path, *words: str) -> bool:
    """Whether cells of the one count as done for the other."""
    one, other = load_comparison(path, map(parse_override, words)), load_comparison(frozen)
    return [one.digest(cell) for cell in one.cells()] == [other.digest(cell) for cell in other.cells()]


@pytest.mark.parametrize("name", ["teacher.yaml", "recipes/teacher.yaml", "config.yaml"])
def test_the_teacher_is_frozen_beside_the_comparison(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = with_teacher(folder, name)
    plan = planned(str(path))
    frozen = folder / "out" / "jobs" / "config.yaml"
    assert plan.first is not None
    assert plan.first.output_dir == folder / "out" / "teacher"
    assert plan.first.words == ["compare", str(frozen), "--only", "teacher"]
    assert plan.configs == [load_comparison(path).teacher]  # the comparison has no teacher to be checked with
    assert same_numbers(path, frozen)
    if name != "config.yaml":
        (folder / name).unlink()
        (folder / "elsewhere").mkdir()
        monkeypatch.chdir(folder / "elsewhere")
        assert load_comparison(frozen).teacher == plan.configs[0]


def test_a_teacher_that_is_there_is_not_made_again(folder: Path) -> None:
    path = with_teacher(folder, "teacher.yaml")
    student = folder / "out" / "teacher" / "student"
    student.mkdir(parents=True)
    (student / "config.json").touch()
    assert plan_run(str(path), [], []).first is None


def test_an_impossible_comparison_writes_nothing(folder: Path) -> None:
    path = write_config(folder, {"linear": "0-9: linear"})
    with pytest.raises(ConfigError, match=r"compare.plans: linear at 8 px: .*9"):
        planned(str(path))
    with pytest.raises(ConfigError, match="--sweep does not go with"):
        planned(str(path), sweep=["seed=0..3"])
    assert not (folder / "out").exists()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"cluster": "local", "nodes": 2}, "--nodes is 2: --cluster local is this machine alone; give --nodes 1"),
    ({"cluster": "debug", "gpus_per_node": 2}, "this process alone, and 2 are asked for"),
    (
        {"cluster": "local", "gpus_per_node": 2},
        "a cell of a comparison is one process, and 1 x 2 are asked for",
    ),
    ({"cluster": "local"}, "--cluster local does not wait for the teacher"),
    (
        {"cluster": "local", "array_parallelism": 2},
        "--array_parallelism is 2: --cluster local starts all 3 cells at once",
    ),
]


@pytest.mark.parametrize(("resources", "sentence"), REFUSED)
def test_what_a_cluster_cannot_do_is_refused(folder: Path, resources: dict[str, Any], sentence: str) -> None:
    plan = plan_run(str(with_teacher(folder, "teacher.yaml")), [], [])
    with pytest.raises(ConfigError, match=sentence):
        check(plan, ClusterConfig(**resources))


def test_a_dry_run_tells_of_the_teacher_and_the_cells(folder: Path) -> None:
    plan = plan_run(str(with_teacher(folder, "teacher.yaml")), [], [])
    text = preview(plan, ClusterConfig(**HERE)).text
    assert f"makes the teacher first, in {folder}/out/teacher" in text
    assert "3 cells, 16 at a time:\n  teacher-8\n  uniform-8\n  linear-8\n" in text
    assert not (folder / "out").exists()


@pytest.mark.parametrize("where", ["teacher", "cells/linear-8"])
def test_what_has_a_job_is_not_submitted_again(
    folder: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_run(str(with_teacher(folder, "teacher.yaml")), [], [])
    submitted(folder / "out" / where, job_id="12_1")
    monkeypatch.setattr(submission, "check_commands", lambda: None)
    say(monkeypatch, "PENDING")
    with pytest.raises(ConfigError, match=f"{where} is job 12_1 already: .*graftvit stop {folder}/out"):
        check(plan, ClusterConfig(gpus_per_node=0), unchecked=True)
    say(monkeypatch, "PREEMPTED")
    check(plan, ClusterConfig(gpus_per_node=0), unchecked=True)
    assert JobFolder(folder / "out" / where).submission() is not None
