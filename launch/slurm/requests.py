"""Make a submission: one run, the cells of a sweep, the cells of a comparison, or another command.

Each configuration is frozen as YAML before it is submitted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...checkpoints.atomic import write_text
from ...checkpoints.files import read_regular
from ...models.errors import ConfigError
from ...models.plain_yaml import write_yaml
from ...transfer.config import RunConfig
from ..cli import DISTRIBUTED
from ..load_config import Setting, dump_config, read_recipe
from ..say import hint, say_aside
from ..submitted import SUBMITTED, Work, check_words, command_name
from .batch import Request
from .checks import check_folder
from .job_folder import ORDER_FILE, JobFolder, Order
from .settings import ClusterConfig
from .sweep import Sweep, cell_configs, cell_settings, check_sweep, frozen_text, parse_sweep, run_configs

if TYPE_CHECKING:
    from ...transfer.analysis.compare.comparison_cells import Comparison


GOES_ON = Setting("engine.resume", "auto", "graftvit submit")
"""The resume policy of a job: its restarts resume; `never` was checked before the submission."""


@dataclass(frozen=True)
class SubmissionPlan:
    """What is to be submitted to `folder`."""

    folder: Path
    configs: list[RunConfig]
    """The run to check and describe: the first stage of the first cell, or the teacher to train."""
    frozen: dict[Path, str]
    """Files to write before it is submitted."""
    requests: list[Request]
    """Without the cells of a sweep that have finished with these very settings."""
    first: Request | None = None
    """What the others have to wait for: the teacher of a comparison."""
    sweep: Sweep | None = None
    comparison: bool = False

    def write(self) -> None:
        """Freeze the configurations in the run folders. Raises WriteFailedError."""
        for path, text in self.frozen.items():
            write_text(path, text)
        if self.sweep is not None:
            self.sweep.save()


def plan_run(
    recipe: str | None,
    settings: Sequence[Setting],
    sweep: Sequence[str],
    early: Callable[[], None] | None = None,
) -> SubmissionPlan:
    """Return what `graftvit submit RECIPE SETTINGS --sweep ...` submits; check every cell, write nothing.

    `early` is called before what is slow to check.

    Raises ConfigError: something in the recipe, the settings or the sweep is not valid.
    """
    source = None if recipe is None else read_recipe(recipe)
    if source is not None and source.compare is not None:
        if sweep:
            raise ConfigError(
                f"--sweep does not go with {recipe}, which compares plans: its cells are the sweep"
            )
        if early is not None:
            early()
        say_aside("graftvit: checking the cells of the comparison ...\n")
        return _plan_comparison(str(recipe), settings)
    settings = [*settings, _absolute(run_configs(recipe, settings)[0].output_dir)]
    if sweep:
        return _plan_sweep(recipe, settings, sweep)
    configs = run_configs(recipe, settings)
    for config in configs:
        _refuse_existing(config)
    folder, settings = configs[0].output_dir, [*settings, GOES_ON]
    frozen = folder / "jobs" / "config.yaml"
    texts = {frozen: frozen_text(recipe, settings)}
    return SubmissionPlan(folder, configs[:1], texts, [Request(["train", str(frozen)], folder)])


def _plan_sweep(recipe: str | None, settings: Sequence[Setting], words: Sequence[str]) -> SubmissionPlan:
    folder = run_configs(recipe, settings)[0].output_dir
    sweep = parse_sweep(words, folder)
    check_sweep(sweep)
    for cell in sweep.cells:
        _refuse_existing(run_configs(recipe, [*settings, _absolute(cell.folder)])[0])
    plain = [setting for setting in settings if setting.key != "output_dir"]
    first = run_configs(recipe, cell_settings(sweep.cells[0], settings))[0]
    texts = cell_configs(sweep, recipe, [*plain, GOES_ON])
    frozen = {cell.folder / "jobs" / "config.yaml": texts[cell.name] for cell in sweep.cells}
    requests = [
        Request(["train", str(path)], cell.folder)
        for (path, text), cell in zip(frozen.items(), sweep.cells, strict=True)
        if not (JobFolder(cell.folder).finished and _holds(path, text))
    ]
    if not requests:
        raise ConfigError(
            f"all {len(sweep.cells)} cells of {folder} have finished: `{hint('jobs', 'summary', folder)}`"
        )
    return SubmissionPlan(folder, [first], frozen, requests, sweep=sweep)


def _refuse_existing(config: RunConfig) -> None:
    """Raise ConfigError if the run must never resume and its folder holds a state."""
    if config.engine.resume == "never":
        from ...transfer.engine.resume_check import refuse_existing

        refuse_existing(config.output_dir)


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and read_regular(path, errors="replace") == text


def _plan_comparison(recipe: str, settings: Sequence[Setting]) -> SubmissionPlan:
    """Return a request for each cell; every cell must be possible."""
    from ...transfer.analysis.compare.compare import check_cells
    from ..load_config import load_comparison

    settings = [*settings, _absolute(load_comparison(recipe, settings).folder)]
    comparison = load_comparison(recipe, settings)
    check_cells(comparison, comparison.cells())
    path = comparison.folder / "jobs" / "config.yaml"
    words = ["compare", str(path), *_taken(settings)]
    requests = [
        Request([*words, "--cell", cell.folder], comparison.cell_folder(cell)) for cell in comparison.cells()
    ]
    first, config = None, comparison.config
    made = comparison.teacher
    if made is not None and not (made.output_dir / "student" / "config.json").exists():
        first, config = Request([*words, "--only", "teacher"], made.output_dir), made
    frozen = {path: _frozen_comparison(comparison, recipe)} | _frozen_teacher(comparison, path)
    return SubmissionPlan(comparison.folder, [config], frozen, requests, first, comparison=True)


def _taken(settings: Iterable[Setting]) -> list[str]:
    """Return the words that the run of the teacher takes over, too."""
    from ..load_config import FOR_THE_TEACHER
    from .sweep import as_text

    return [f"--{setting.key}={as_text(setting)}" for setting in settings if setting.key in FOR_THE_TEACHER]


def _absolute(folder: Path) -> Setting:
    return Setting("output_dir", str(folder.absolute()), "--output_dir")


def _frozen_comparison(comparison: Comparison, recipe: str) -> str:
    stages = []
    for stage in comparison.stages:
        values = stage.config.model_dump(mode="json")
        if comparison.teacher is not None:
            values["teacher"].pop("source")  # trained in the folder of the comparison
        stages.append({"name": stage.name, **values})
    return write_yaml({"compare": read_recipe(recipe).compare, "stages": stages})


def _frozen_teacher(comparison: Comparison, beside: Path) -> dict[Path, str]:
    """Return the recipe of the teacher if it is a user's file: under its name, beside the frozen comparison."""
    name = comparison.compare.teacher_recipe
    if comparison.teacher is None or name is None or Path(name).suffix not in (".yaml", ".yml"):
        return {}
    path = beside.parent / name
    inside = path.resolve().is_relative_to(beside.parent.resolve()) and path != beside
    return {path: dump_config(comparison.teacher)} if inside else {}


def plan_work(
    words: Sequence[str],
    folder: Path | None,
    config: ClusterConfig,
    *,
    shares: int = 1,
    unchecked: bool = False,
) -> tuple[SubmissionPlan, ClusterConfig]:
    """Return what `graftvit submit COMMAND ...` submits, and the resources with the cores that it needs. Write nothing.

    Raises GraftError: the command would refuse its words, it is one process and several are asked for, or it cannot be
    divided.
    """
    command, *rest = words
    if command not in DISTRIBUTED and config.world_size > 1:
        raise ConfigError(
            f"`graftvit {command_name(words)}` is one process, and {config.nodes} x {config.tasks} are asked for: give "
            "--nodes 1 and --tasks_per_node 1, or --gpus_per_node 1"
        )
    say_aside(f"graftvit: checking the words of `graftvit {command_name(words)}` ...\n")
    work = check_words(command, rest, here=not unchecked)
    if work.output is not None and config.cluster == "slurm" and not unchecked:
        _check_output(work.output, config)
    folder = (folder or _usual_folder(words)).absolute()
    _refuse_run(folder)
    order = Order(list(words), None if work.output is None else str(work.output.absolute()))
    text = json.dumps({"words": order.words, "output": order.output}) + "\n"
    requests = _divided(Request(order.words, folder), shares, work)
    frozen = {request.output_dir / "jobs" / ORDER_FILE: text for request in requests}
    plan = SubmissionPlan(folder, [], frozen, requests)
    return plan, config.model_copy(update={"cpus_per_task": config.cpus_per_task or 1 + work.workers})


def _divided(request: Request, shares: int, work: Work) -> list[Request]:
    """Return a request for each share. Raises ConfigError: the command cannot be divided."""
    if shares == 1:
        return [request]
    if shares < 1 or not work.divisible:
        raise ConfigError(
            f"--shares {shares}: `graftvit {command_name(request.words)}` is one job; "
            + (
                "give 1 or more"
                if work.divisible
                else "only `graftvit submit programs search` can be divided"
            )
        )
    return [
        Request([*request.words, "--share", f"{one}/{shares}"], request.output_dir / "cells" / f"share-{one}")
        for one in range(1, shares + 1)
    ]


def _refuse_run(folder: Path) -> None:
    """Raise ConfigError where the jobs of a run would be hidden."""
    submission = JobFolder(folder).submission()
    if (folder / "config.yaml").exists() or (
        submission is not None and submission.command[0] not in SUBMITTED
    ):
        raise ConfigError(f"--job_dir {folder} holds a run, with jobs of its own: give another folder")


def describe(work: SubmissionPlan) -> str:
    """Return the command, the folder of its log and jobs, and what it writes."""
    order = Order(**json.loads(next(iter(work.frozen.values()))))
    output = f"writes {order.output}\n" if order.output else ""
    return f"{order.line}\n{output}jobs and log in {work.folder}\n\n"


def _usual_folder(words: Sequence[str]) -> Path:
    """`runs/evaluate-distill` for `evaluate runs/distill`."""
    *_, command = names = command_name(words).split()
    first = next((word for word in words[len(names) :] if not word.startswith("-")), "")
    name = re.sub(r"[^\w.=-]+", "-", Path(first.partition("#")[0]).name).strip("-")
    return Path("runs", "-".join(filter(None, [command, name])))


def _check_output(output: Path, config: ClusterConfig) -> None:
    try:
        check_folder(output.absolute(), config)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--output_dir", "the output", 1)) from error
