"""Print what `--dry_run` shows: the plan and the script, also of a submission that would be refused, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...models.errors import GraftError, counted
from .batch import Launch, script
from .checks import check_commands
from .requests import SubmissionPlan
from .settings import ClusterConfig
from .stopping import Unfinished, check_again, launch_again, plan_again
from .submission import check_cluster, check_runs, launch_of


@dataclass(frozen=True)
class Preview:
    """What would be submitted."""

    text: str
    problem: GraftError | None = None
    """Why it would be refused."""


def preview(plan: SubmissionPlan, config: ClusterConfig, *, unchecked: bool = False) -> Preview:
    """Return the plan, the cells, and the script as sbatch would get it. Write and queue nothing.

    Raises ConfigError: there is no Slurm here to make a script for.
    """
    if config.cluster == "slurm":
        check_commands()
    waits, problem = _checked(lambda: check_cluster(plan, config, unchecked=unchecked))
    parts = list[str]()
    if problem is None and not unchecked:  # do not run slow checks if the answer is known
        parts, problem = _plans(plan, config)
    if plan.first is not None:
        parts.append(f"a job of its own makes the teacher first, in {plan.first.output_dir}\n")
    cells = len(plan.requests) if plan.sweep is None else len(plan.sweep.cells)
    if left_out := cells - len(plan.requests):
        parts.append(f"left out: {left_out} of {cells} cells, which have finished\n")
    if len(plan.requests) > 1:
        names = "".join(f"  {request.output_dir.name}\n" for request in plan.requests)
        parts.append(f"{len(plan.requests)} cells, {config.array_parallelism} at a time:\n{names}")
    return _with_script(parts, launch_of(plan, config), problem, waits)


def preview_again(unfinished: Unfinished, config: ClusterConfig, *, unchecked: bool = False) -> Preview:
    """Do the same as `preview`, for `graftvit jobs resume`."""
    if config.cluster == "slurm":
        check_commands()
    waits, problem, parts = "", None, list[str]()
    if not unchecked:
        waits, problem = _checked(lambda: check_again(unfinished, config))
    if problem is None and not unchecked:
        text, problem = _checked(lambda: plan_again(unfinished, config))
        parts = [text] if text else []
    teacher = [] if unfinished.first is None else [unfinished.first.output_dir]
    parts.append("".join(f"again: {run}\n" for run in [*teacher, *unfinished.submissions]))
    return _with_script(parts, launch_again(unfinished, config), problem, waits)


def _with_script(parts: list[str], launch: Launch, problem: GraftError | None, waits: str) -> Preview:
    config = launch.config
    if config.cluster != "slurm":
        last = f"--cluster {config.cluster}: {counted(config.tasks, 'process')} on this machine\n"
        return Preview("\n".join([*parts, last]), problem)
    said = [f"{waits}\n"] if waits else []
    return Preview("\n".join([*parts, *said, f"{script(launch).rstrip()}\n"]), problem)


def _plans(plan: SubmissionPlan, config: ClusterConfig) -> tuple[list[str], GraftError | None]:
    """Return the plans, and why the runs would be refused; no plans if data or teacher cannot be read."""
    try:
        return check_runs(plan, config), None
    except GraftError as error:
        problem = error
    from ..plan_text import describe_plan

    try:
        return [describe_plan(run, config.world_size) for run in plan.configs], problem
    except GraftError:
        return [], problem


def _checked(step: Callable[[], str]) -> tuple[str, GraftError | None]:
    """Return the text of `step`, or why it refuses."""
    try:
        return step(), None
    except GraftError as error:
        return "", error
