"""What happens to jobs happens to a run in the middle of its training; its result is that of an undisturbed one."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from graftvit.launch.slurm.folder import Attempt, JobFolder
from support.runs.patience import until
from support.slurm.cluster_runs import (
    ALONE,
    ClusterRun,
    assert_undisturbed,
    cluster_run,
    held,
    interrupt,
    tasks_of,
    wait_for_the_end,
)
from support.slurm.slurm_cluster import SlurmCluster
from support.slurm.slurm_processes import marked

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
StartCluster = Callable[..., SlurmCluster]
EARLY = 10
"""Records of the log after which something happens, of about 50."""


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
    assert (first.log_start or 0) < (second.log_start or 0)
    assert (third.outcome, third.world_size, len(third.nodes)) == ("finished", 4, 2)
    assert first.why.startswith(
        f"rank 2 on {cluster.nodes[1]} was killed (signal 9); starts again after 1 s, "
    )
    assert f"after: {first.why}" in run.graftvit("jobs", str(run.folder))
    assert f"graftvit: {first.why}" in (run.jobs.folder / "logs" / f"{job}_0_log.err").read_text()
    assert_undisturbed(run, ranks=4)


def failed(run: ClusterRun, job: str) -> Attempt:
    """The only attempt of a job that is not tried again."""
    until(lambda: state_of(run, job).startswith("FAILED"), lambda: f"the failure\n{run.logs()}", every=0.5)
    (only,) = run.jobs.attempts()
    assert (only.outcome, only.retried) == ("failed", False)
    return only


def test_an_error_of_the_user_is_not_tried_again(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = cluster_run(cluster, tmp_path)
    with held(cluster) as until_it_is_gone:
        job = run.submit("--restart_wait", "1", *until_it_is_gone)
        (tmp_path / "teacher").rename(tmp_path / "gone")
    only, status = failed(run, job), run.shown()
    assert "teacher" in only.why
    assert (status["state"], status["error_rank"]) == ("failed", run.jobs.failures(only.name)[0].rank)
    said = f"last words of rank {status['error_rank']}:\n  {status['error'].splitlines()[0]}"
    assert said in run.graftvit("jobs", str(run.folder))
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
    only = failed(run, job)
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


def test_a_cell_of_an_array_goes_on_alone(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = sleepy(tmp_path, cluster)
    run.graftvit("submit", run.recipe(), *ALONE, "--restart_wait", "0", "--sweep", "seed=0..1")
    cells = [JobFolder(run.folder / "cells" / f"seed={seed}") for seed in (0, 1)]
    for cell in cells:
        until(cell.attempts, lambda cell=cell: f"the start of {cell.folder}")  # type: ignore[misc]
    (lost,) = cells[0].attempts()
    kill_rank(cluster.run("squeue", "-h", "-j", lost.job_id, "-o", "%A").strip(), 0)  # 125 for 123_4
    until(lambda: len(cells[0].attempts()) == 2, lambda: f"the restart\n{run.logs()}", every=0.5)
    assert [one.retried for one in cells[0].attempts()] == [True, False]
    assert cells[0].attempts()[1].job_id == lost.job_id
    assert len(cells[1].attempts()) == 1
    cluster.run("scancel", lost.job_id.partition("_")[0])
    wait_for_the_end(cluster)


def preempt(run: ClusterRun) -> None:
    """A job of a higher partition that needs all nodes, for a moment."""
    nodes = str(len(run.cluster.nodes))
    run.cluster.run("sbatch", "-p", "high", "-N", nodes, "--ntasks-per-node=1", "--cpus-per-task=8",
                    "-o", "/dev/null", "--wrap", "sleep 1")  # fmt: skip


def meet_the_time_limit(run: ClusterRun, job: str, started: float) -> None:
    """A limit is whole minutes, and Slurm looks every 30 s: the tasks stand still until it has signaled."""
    minutes = math.ceil((time.monotonic() - started + 30) / 60)
    run.cluster.run("scontrol", "update", f"jobid={job}", f"timelimit={minutes}")
    tasks = tasks_of(job)
    assert len(tasks) == 2
    for task in tasks:
        os.kill(task, signal.SIGSTOP)
    until(lambda: run.jobs.attempts()[0].outcome, "Slurm signaling, and continuing, the tasks")
    run.wait_for_attempt(2)
    run.cluster.run("scontrol", "update", f"jobid={job}", "timelimit=60")


def test_four_events_in_one_run(start_cluster: StartCluster, tmp_path: Path) -> None:
    """Its time limit, a job of a higher partition, the death of the node with the batch script, and `scancel`."""
    run = cluster_run(start_cluster(user_signal=True, grace=6), tmp_path)
    started = time.monotonic()
    job = run.submit("--signal_delay", "60")
    run.wait_for_lines(EARLY)
    meet_the_time_limit(run, job, started)
    run.wait_for_lines(EARLY + 6)
    preempt(run)
    run.wait_for_attempt(3)
    run.wait_for_lines(EARLY + 12)
    dead = run.jobs.attempts()[2].nodes[0]
    run.cluster.kill_node(dead)
    run.wait_for_attempt(4)
    run.wait_for_lines(EARLY + 18)
    run.cluster.run("scancel", job)
    wait_for_the_end(run.cluster)
    limited, preempted, lost, cancelled = run.jobs.attempts()
    assert (limited.outcome, limited.signal) == ("requeued", "SIGUSR2 (time limit)")
    assert preempted.outcome == "requeued"
    assert preempted.signal.startswith("SIGUSR2")
    assert "preempted" in preempted.signal
    assert lost.outcome is None  # the first rank went with its node
    assert dead not in cancelled.nodes
    assert cancelled.before == f"node failure: {dead}"
    assert cancelled.signal == "SIGTERM (cancelled)"
    run.graftvit("jobs", "resume", str(run.folder))
    assert run.finish()[-1].outcome == "finished"
    assert_undisturbed(run)


def test_four_other_events_in_one_run(
    start_cluster: StartCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A requeue, a preemption without the signal that the job asked for, the death of another node, an interrupt."""
    run = cluster_run(start_cluster(user_signal=False, grace=6), tmp_path)
    job = run.submit()
    run.wait_for_lines(EARLY)
    run.cluster.run("scontrol", "requeue", job)
    run.wait_for_attempt(2)
    run.wait_for_lines(EARLY + 6)
    preempt(run)
    run.wait_for_attempt(3)
    run.wait_for_lines(EARLY + 12)
    dead = run.jobs.attempts()[2].nodes[1]
    run.cluster.kill_node(dead)
    run.wait_for_attempt(4)
    run.wait_for_lines(EARLY + 18)
    interrupt(run, job, monkeypatch)
    attempts = run.finish()
    requeued, preempted, lost, interrupted, last = attempts
    starts = [(one.job_id, one.restart, one.world_size, len(one.nodes)) for one in attempts]
    assert starts == [(job, number, 2, 2) for number in range(5)]
    assert requeued.signal == "SIGTERM (requeued)"
    assert preempted.signal.startswith("SIGTERM")
    assert "preempted" in preempted.signal
    assert preempted.outcome is None
    assert lost.outcome in (None, "failed")  # Slurm may end the first rank before that misses the others
    assert dead not in interrupted.nodes
    assert interrupted.before == f"node failure: {dead}" or lost.outcome == "failed"
    assert interrupted.outcome == "requeued"
    assert interrupted.signal.startswith("SIGUSR2")
    assert last.outcome == "finished"
    assert_undisturbed(run)


def test_the_orphaned_attempt_is_fenced_off(
    start_cluster: Callable[..., SlurmCluster], tmp_path: Path
) -> None:
    cluster = start_cluster(mode="ns", nodes=2)
    run = cluster_run(cluster, tmp_path, optim={"epochs": 16})
    run.submit("--nodes", "1", "--tasks_per_node", "2")
    run.wait_for_lines(12)
    (orphan,) = run.jobs.attempts()
    cluster.cut_node(orphan.nodes[0])
    before = run.lines()
    until(lambda: run.lines() > before, "the orphan writing on")
    tasks = tasks_of(orphan.job_id)
    assert len(tasks) == 2
    for task in tasks:  # stand still, lest they end before their successor has loaded
        os.kill(task, signal.SIGSTOP)
    cluster.run("scontrol", "update", f"nodename={orphan.nodes[0]}", "state=down", "reason=cut")
    run.wait_for_attempt(2)
    written = run.lines()
    until(lambda: run.lines() != written, "the successor writing")
    for task in tasks:
        os.kill(task, signal.SIGCONT)
    successor = run.finish()[1]
    others = [node for node in cluster.nodes if node not in orphan.nodes]
    assert (successor.job_id, successor.nodes) == (orphan.job_id, others)
    until(
        lambda: "has taken over the run" in "".join(one.text for one in run.jobs.failures(orphan.name)),
        lambda: f"the orphan's end: {run.jobs.failures(orphan.name)}",
    )
    assert run.jobs.attempts()[0].outcome == "failed"
    assert f"of job {orphan.job_id}" in run.jobs.failures(orphan.name)[0].text
    assert_undisturbed(run)
