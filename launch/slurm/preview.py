"""What `--dry_run` prints: the plan and the script, also of what would be refused, which it says at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...models.errors import ConfigError, GraftError
from .batch import Launch, script
from .checks import check_commands
from .requests import Plan
from .resume import Unfinished, check_again, launch_again, plan_again
from .settings import ClusterConfig
from .submission import check, launch_of
from .submit import test_only


@dataclass(frozen=True)
class Preview:
    """What would be submitted."""

    text: str
    problem: GraftError | None = None
    """Why it would be refused."""


def preview(plan: Plan, config: ClusterConfig, *, unchecked: bool = False) -> Preview:
    """The plan, the cells, and the script as sbatch would get it. Nothing is written or queued.

    Raises ConfigError: there is no Slurm here to make a script for.
    """
    if config.cluster == "slurm":
        check_commands()
    problem = _problem(lambda: check(plan, config, unchecked=unchecked))
    parts = [] if unchecked else _plans(plan, config)
    if plan.first is not None:
        parts.append(f"a job of its own makes the teacher first, in {plan.first.output_dir}\n")
    cells = len(plan.requests) if plan.sweep is None else len(plan.sweep.cells)
    if left_out := cells - len(plan.requests):
        parts.append(f"left out: {left_out} of {cells} cells, which have finished\n")
    if len(plan.requests) > 1:
        names = "".join(f"  {request.output_dir.name}\n" for request in plan.requests)
        parts.append(f"{len(plan.requests)} cells, {config.array_parallelism} at a time:\n{names}")
    return _with_script(parts, launch_of(plan, config), problem, unchecked=unchecked)


def preview_again(unfinished: Unfinished, config: ClusterConfig, *, unchecked: bool = False) -> Preview:
    """As `preview`, of `graftvit resume`."""
    if config.cluster == "slurm":
        check_commands()
    problem, parts = None, []
    if not unchecked:
        problem = _problem(lambda: check_again(unfinished, config))
        try:
            parts = list(filter(None, [plan_again(unfinished, config)]))
        except GraftError as error:
            problem = problem or error
    teacher = [] if unfinished.first is None else [unfinished.first.output_dir]
    parts.append("".join(f"again: {run}\n" for run in [*teacher, *unfinished.submissions]))
    return _with_script(parts, launch_again(unfinished, config), problem, unchecked=unchecked)


def _with_script(parts: list[str], launch: Launch, problem: GraftError | None, *, unchecked: bool) -> Preview:
    config = launch.config
    if config.cluster != "slurm":
        last = f"--cluster {config.cluster}: {config.tasks} processes on this machine\n"
        return Preview("\n".join([*parts, last]), problem)
    if problem is None and not unchecked:
        try:
            parts += [f"{waits}\n" for waits in [test_only(launch)] if waits]
        except ConfigError as error:
            problem = error
    return Preview("\n".join([*parts, f"{script(launch).rstrip()}\n"]), problem)


def _plans(plan: Plan, config: ClusterConfig) -> list[str]:
    """None where data or teacher cannot be read, which the problem tells."""
    from ..plan import describe_plan  # loads torch

    try:
        return [describe_plan(run, config.world_size) for run in plan.configs]
    except GraftError:
        return []


def _problem(step: Callable[[], object]) -> GraftError | None:
    try:
        step()
    except GraftError as error:
        return error
    return None
