"""What a submission consists of: one run, the cells of a sweep, or those of a comparison; each frozen as YAML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...models.errors import ConfigError
from ...transfer.config import RunConfig
from ..config import Setting, dump_config, load_config, load_stages, read_recipe
from ..yaml_text import write_yaml
from .submit import Request, write_text
from .sweep import Sweep, check_folder, parse_sweep
from .sweep_cells import cell_configs

if TYPE_CHECKING:
    from ...transfer.compare.run import Comparison


@dataclass(frozen=True)
class Plan:
    """What is to be submitted to `folder`."""

    folder: Path
    configs: list[RunConfig]
    """A configuration for each kind of run, to check and to describe: the first stage of the first cell."""
    frozen: dict[Path, str]
    """Files to write before it is submitted."""
    requests: list[Request]
    first: Request | None = None
    """What the others have to wait for: the teacher of a comparison."""
    sweep: Sweep | None = None

    def write(self) -> None:
        """Freezes the configurations in the run folders. Raises WriteFailedError."""
        for path, text in self.frozen.items():
            write_text(path, text)
        if self.sweep is not None:
            self.sweep.save()


def plan_run(recipe: str | None, settings: Sequence[Setting], sweep: Sequence[str]) -> Plan:
    """What `graftvit submit RECIPE SETTINGS --sweep ...` submits; every cell is checked, nothing is written.

    Raises ConfigError: something in the recipe, the settings or the sweep is not valid.
    """
    source = None if recipe is None else read_recipe(recipe)
    if source is not None and source.compare is not None:
        if sweep:
            raise ConfigError(
                f"--sweep does not go with {recipe}, which compares plans: its cells are the sweep"
            )
        return _plan_comparison(str(recipe), settings)
    settings = [*settings, _absolute(_configs(recipe, settings)[0].output_dir)]
    if sweep:
        return _plan_sweep(recipe, settings, sweep)
    configs = _configs(recipe, settings)
    folder = configs[0].output_dir
    frozen = folder / "jobs" / "config.yaml"
    text = _frozen(recipe, settings) if source is not None and source.stages else dump_config(configs[0])
    return Plan(folder, configs[:1], {frozen: text}, [Request(["train", str(frozen)], folder)])


def _plan_sweep(recipe: str | None, settings: Sequence[Setting], words: Sequence[str]) -> Plan:
    folder = _configs(recipe, settings)[0].output_dir
    sweep = parse_sweep(words, folder)
    check_folder(sweep)
    texts = cell_configs(sweep, recipe, [setting for setting in settings if setting.key != "output_dir"])
    frozen = {cell.folder / "jobs" / "config.yaml": texts[cell.name] for cell in sweep.cells}
    requests = [
        Request(["train", str(path)], cell.folder) for path, cell in zip(frozen, sweep.cells, strict=True)
    ]
    return Plan(folder, _configs(recipe, settings)[:1], frozen, requests, sweep=sweep)


def _plan_comparison(recipe: str, settings: Sequence[Setting]) -> Plan:
    """A cell each; an array's jobs take their share by their place in it."""
    from ..comparison import load_comparison

    settings = [*settings, _absolute(load_comparison(recipe, settings).folder)]
    comparison = load_comparison(recipe, settings)
    path = comparison.folder / "jobs" / "config.yaml"
    words = ["compare", str(path), *_taken(settings)]
    requests = [Request(words, comparison.cell_folder(cell)) for cell in comparison.cells()]
    first = None
    made = comparison.teacher
    if made is not None and not (made.output_dir / "student" / "config.json").exists():
        first = Request([*words, "--only", "teacher"], made.output_dir)
    text = _frozen_comparison(comparison, recipe)
    return Plan(comparison.folder, [comparison.config], {path: text}, requests, first)


def _taken(settings: Iterable[Setting]) -> list[str]:
    """The words that the run which makes the teacher takes over, too."""
    from ..comparison import FOR_THE_TEACHER
    from .sweep_cells import as_text

    return [f"--{setting.key}={as_text(setting)}" for setting in settings if setting.key in FOR_THE_TEACHER]


def _configs(recipe: str | None, settings: Sequence[Setting]) -> list[RunConfig]:
    stages = load_stages(recipe, settings) if recipe is not None else []
    return [stage.config for stage in stages] or [load_config(recipe, settings)]


def _absolute(folder: Path) -> Setting:
    return Setting("output_dir", str(folder.absolute()), "--output_dir")


def _frozen(recipe: str | None, settings: Sequence[Setting]) -> str:
    stages = load_stages(recipe, settings)
    return write_yaml(
        {"stages": [{"name": stage.name, **stage.config.model_dump(mode="json")} for stage in stages]}
    )


def _frozen_comparison(comparison: Comparison, recipe: str) -> str:
    stages = []
    for stage in comparison.stages:
        values = stage.config.model_dump(mode="json")
        if comparison.teacher is not None:
            values["teacher"].pop("source")  # made in the folder of the comparison
        stages.append({"name": stage.name, **values})
    return write_yaml({"compare": read_recipe(recipe).compare, "stages": stages})
