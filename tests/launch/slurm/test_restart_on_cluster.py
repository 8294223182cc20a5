"""Runs that lose a rank go on by themselves; those that are told to end, or that err, do not."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import yaml
from graftvit.launch.slurm.job_folder import JobFolder
from support.runs.patience import until
from support.slurm.cluster_runs import ClusterRun, assert_undisturbed, cluster_run, held, interrupt, tasks_of
from support.slurm.slurm_cluster import SlurmCluster
from support.slurm.slurm_processes import marked

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
ALONE = ("--nodes", "1", "--tasks_per_node", "1")
EARLY = 10


def kill_rank(job: str, rank: int) -> None:
    """As the kernel does where memory runs out."""
    of_rank = {process.pid for process in marked({"SLURM_JOB_ID": job, "SLURM_PROCID": str(rank)})}
    (task,) = of_rank & set(tasks_of(job))
    os.kill(task, signal.SIGKILL)


def state_of(run: ClusterRun, job: str) -> str:
    return run.cluster.run("squeue", "-h", "--states=all", "-j", job, "-o", "%T %r").strip()


def sleepy(root: Path, cluster: SlurmCluster) -> ClusterRun:
    """One process that trains on for long and saves nothing."""
    engine = {"save_every": 100_000, "eval_every": 1000}
    return cluster_run(cluster, root, optim={"epochs": 1000}, engine=engine)


def test_a_run_that_loses_a_rank_and_is_interrupted_goes_on_by_itself(
    cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = cluster_run(cluster, tmp_path)
    job = run.submit("--tasks_per_node", "2", "--restart_wait", "1")
    run.wait_for_lines(EARLY)
    kill_rank(job, 2)
    run.wait_for_attempt(2)
    run.wait_for_lines(2 * EARLY)
    interrupt(run, job, monkeypatch)
    first, second, third = run.finish()
    assert [(one.job_id, one.restart) for one in (first, second, third)] == [(job, 0), (job, 1), (job, 2)]
    assert (first.outcome, first.retried, second.outcome) == ("requeued", True, "requeued")
    assert second.signal.startswith("SIGUSR2")
    assert (third.outcome, third.world_size, len(third.nodes)) == ("finished", 4, 2)
    assert "starts again after 1 s, restart 1 of 3 in a row" in first.why
    assert f"after: {first.why}" in run.graftvit("jobs", str(run.folder))
    assert f"graftvit: {first.why}" in (run.jobs.folder / "logs" / f"{job}_0_log.err").read_text()
    assert_undisturbed(run, ranks=4)


def test_an_error_of_the_user_is_not_tried_again(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = cluster_run(cluster, tmp_path)
    with held(cluster) as until_it_is_gone:
        job = run.submit("--restart_wait", "1", *until_it_is_gone)
        (tmp_path / "teacher").rename(tmp_path / "gone")
    until(lambda: state_of(run, job).startswith("FAILED"), lambda: f"the failure\n{run.logs()}", every=0.5)
    (only,) = run.jobs.attempts()
    assert (only.outcome, only.retried) == ("failed", False)
    assert "teacher" in only.why
    assert {failure.kind for failure in run.jobs.failures(only.name)} <= {"cause", "consequence"}


def test_a_node_without_the_interpreter_is_named_and_not_tried_again(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    run, node = cluster_run(cluster, tmp_path), cluster.nodes[1]
    with held(cluster) as until_it_is_gone:
        job = run.submit("--restart_wait", "1", *until_it_is_gone)
        (start,) = run.jobs.folder.glob("launch-*/start.sh")
        gone = f'[ "$SLURMD_NODENAME" = {node} ] && exec env /no/such/python\n'
        start.write_text(start.read_text().replace("\n", f"\n{gone}", 1))
    until(lambda: state_of(run, job).startswith("FAILED"), lambda: f"the failure\n{run.logs()}", every=0.5)
    (only,) = run.jobs.attempts()
    assert (only.outcome, only.retried) == ("failed", False)
    said = f"rank 1 on {node} could not run the interpreter (exit code 127): env: "
    assert only.why.startswith(said)
    assert "/no/such/python" in only.why
    assert said in run.graftvit("jobs", str(run.folder))


def test_who_cancels_during_the_wait_is_obeyed(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = sleepy(tmp_path, cluster)
    job = run.submit(*ALONE, "--restart_wait", "12")
    run.wait_for_lines(2)
    kill_rank(job, 0)
    until(lambda: state_of(run, job) == "PENDING BeginTime", lambda: f"the wait\n{run.logs()}", every=0.1)
    cluster.run("scancel", job)
    until(lambda: state_of(run, job).startswith("CANCELLED"), lambda: state_of(run, job), every=0.1)
    with held(cluster) as nothing:  # the scheduler goes round once more
        assert nothing
    assert state_of(run, job).startswith("CANCELLED")
    assert len(run.jobs.attempts()) == 1


def test_a_run_that_saves_nothing_between_its_failures_ends(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = sleepy(tmp_path, cluster)
    job = run.submit(*ALONE, "--restart_wait", "0", "--max_restarts", "1")
    for number in (1, 2):
        run.wait_for_attempt(number)
        until(lambda: tasks_of(job), "the task")
        kill_rank(job, 0)
    until(lambda: state_of(run, job).startswith("FAILED"), lambda: f"the failure\n{run.logs()}", every=0.5)
    first, second = run.jobs.attempts()
    assert (first.retried, second.retried, second.outcome) == (True, False, "failed")
    assert (first.log_start or 0) < (second.log_start or 0)
    assert "1 restart in a row brought no new state (--max_restarts)" in second.why
    assert "--max_restarts" in run.graftvit("jobs", str(run.folder))


def test_a_stop_that_comes_with_the_failure_is_obeyed(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = sleepy(tmp_path, cluster)
    job = run.submit(*ALONE, "--restart_wait", "0")
    run.wait_for_lines(2)
    (task,) = tasks_of(job)
    os.kill(task, signal.SIGSTOP)  # it never hears of it
    run.graftvit("stop", str(run.folder))
    os.kill(task, signal.SIGKILL)
    until(lambda: state_of(run, job).startswith("FAILED"), lambda: state_of(run, job), every=0.5)
    assert len(run.jobs.attempts()) == 1


def test_a_cell_of_an_array_goes_on_alone(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = sleepy(tmp_path, cluster)
    recipe = tmp_path / "cells.yaml"
    recipe.write_text(yaml.safe_dump(run.config.model_dump(mode="json")))
    run.graftvit("submit", str(recipe), *ALONE, "--restart_wait", "0", "--sweep", "seed=0..1")
    cells = [JobFolder(run.folder / "cells" / f"seed={seed}") for seed in (0, 1)]
    for cell in cells:
        until(cell.attempts, lambda cell=cell: f"the start of {cell.folder}")  # type: ignore[misc]
    (lost,) = cells[0].attempts()
    kill_rank(raw_number(cluster, lost.job_id), 0)
    until(lambda: len(cells[0].attempts()) == 2, lambda: f"the restart\n{run.logs()}", every=0.5)
    assert [one.retried for one in cells[0].attempts()] == [True, False]
    assert cells[0].attempts()[1].job_id == lost.job_id
    assert len(cells[1].attempts()) == 1
    cluster.run("scancel", lost.job_id.partition("_")[0])
    until(lambda: not cluster.run("squeue", "-h").strip(), "the end of the array", every=0.5)


def raw_number(cluster: SlurmCluster, job: str) -> str:
    """The number of a cell among all jobs, `125` for `123_4`."""
    return cluster.run("squeue", "-h", "-j", job, "-o", "%A").strip()
