"""Submitting a command that is no run: its words are checked, and a folder for its jobs is chosen."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from ...models.errors import ConfigError
from ..cli import DISTRIBUTED
from ..say import say_aside
from ..submitted import SUBMITTED, check_words
from .batch import Request
from .checks import check_folder
from .files import JobFolder
from .order import ORDER_FILE, Order
from .requests import SubmissionPlan
from .settings import ClusterConfig


def plan_work(
    words: Sequence[str], folder: Path | None, config: ClusterConfig, *, unchecked: bool = False
) -> tuple[SubmissionPlan, ClusterConfig]:
    """What `graftvit submit COMMAND ...` submits, and the resources with the cores that it needs. Nothing is written.

    Raises GraftError: the command would refuse its words, or it is one process and several are asked for.
    """
    command, *rest = words
    if command not in DISTRIBUTED and config.world_size > 1:
        raise ConfigError(
            f"`graftvit {command}` is one process, and {config.nodes} x {config.tasks} are asked for: give --nodes 1 "
            "and --tasks_per_node 1, or --gpus_per_node 1"
        )
    say_aside(f"graftvit: checking the words of `graftvit {command}` ...\n")
    work = check_words(command, rest, here=not unchecked)
    if work.output is not None and config.cluster == "slurm" and not unchecked:
        _check_output(work.output, config)
    folder = (folder or _usual_folder(command, rest)).absolute()
    _refuse_run(folder)
    order = Order(list(words), None if work.output is None else str(work.output.absolute()))
    text = json.dumps({"words": order.words, "output": order.output}) + "\n"
    plan = SubmissionPlan(folder, [], {folder / "jobs" / ORDER_FILE: text}, [Request(order.words, folder)])
    return plan, config.model_copy(update={"cpus_per_task": config.cpus_per_task or 1 + work.workers})


def _refuse_run(folder: Path) -> None:
    """Raises ConfigError where the jobs of a run would be hidden."""
    submission = JobFolder(folder).submission()
    if (folder / "config.yaml").exists() or (
        submission is not None and submission.command[0] not in SUBMITTED
    ):
        raise ConfigError(f"--output_dir {folder} holds a run, with jobs of its own: give another folder")


def describe(work: SubmissionPlan) -> str:
    """The command, where its log and jobs are, and what it writes."""
    order = Order(**json.loads(next(iter(work.frozen.values()))))
    output = f"writes {order.output}\n" if order.output else ""
    return f"{order.line}\n{output}jobs and log in {work.folder}\n\n"


def _usual_folder(command: str, words: Sequence[str]) -> Path:
    """`runs/evaluate-distill` for `evaluate runs/distill`."""
    first = next((word for word in words if not word.startswith("-")), "")
    name = re.sub(r"[^\w.=-]+", "-", Path(first.partition("#")[0]).name).strip("-")
    return Path("runs", "-".join(filter(None, [command, name])))


def _check_output(output: Path, config: ClusterConfig) -> None:
    try:
        check_folder(output.absolute(), config)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--output_dir", "the output", 1)) from error
