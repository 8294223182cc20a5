"""Read a comparison from a YAML file with a section `compare`."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ValidationError

from ..checkpoints.files import is_file
from ..models.errors import ConfigError, JsonDict
from ..transfer.setting import explain
from .load_config import Setting, load_config, load_stages, read_recipe

if TYPE_CHECKING:
    from ..transfer.analysis.compare.comparison_cells import Comparison
    from ..transfer.attnbench.bench_rows import Row
    from ..transfer.attnbench.bench_run import Bench
    from ..transfer.config import RunConfig

Model = TypeVar("Model", bound=BaseModel)


def load_bench(source: str | Path, overrides: Iterable[Setting] = ()) -> Bench:
    """Load the benchmark of a recipe or YAML file. Raises ConfigError: it has no valid section `attnbench`."""
    from ..transfer.attnbench.bench_run import Bench, BenchConfig

    remedy = "add attnbench: {backbones: {...}, data: {...}}, or take the recipe attnbench_digits"
    settings = _read_section(BenchConfig, read_recipe(source).attnbench, "attnbench", source, remedy)
    bench = Bench(str(source), load_config(source, overrides), settings)
    for backbone in settings.backbones:
        for data in settings.data:
            bench.run_config(backbone, data)
    return bench


def _read_section(
    kind: type[Model], values: JsonDict | None, name: str, source: str | Path, remedy: str
) -> Model:
    """Return the section of a recipe. Raises ConfigError: it is missing or not valid."""
    if values is None:
        raise ConfigError(f"{source} has no section {name!r}; {remedy}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain(error, kind, name)}") from error


def load_rows(source: Path) -> list[Row]:
    """Return the rows of a file, or those that come with the recipe of this name. Raises ConfigError as `read_rows`."""
    from ..transfer.attnbench.bench_rows import read_rows

    shipped = resources.files("graftvit.cfgs") / f"{source}.jsonl"
    if source.exists() or len(source.parts) != 1 or not shipped.is_file():
        return read_rows(source)
    with resources.as_file(shipped) as path:
        return read_rows(path, str(source))


FOR_THE_TEACHER = ("engine.device", "data.data_path", "data.stage", "data.workers", "data.download")
"""The settings of the comparison that also hold for the run that trains the teacher."""


def load_comparison(source: str | Path, overrides: Iterable[Setting] = ()) -> Comparison:
    """Load the comparison of a recipe or YAML file. A file without `stages:` is one stage, named by its mode.

    Raises ConfigError if the file has no section `compare` or is not valid.
    """
    from ..transfer.analysis.compare.comparison_cells import CompareConfig, Comparison, check_stages
    from ..transfer.engine.stages import Stage

    given = list(overrides)
    remedy = "add compare: {plans: {linear: '*: linear', ...}}, or take the recipe digits_compare"
    compare = _read_section(CompareConfig, read_recipe(source).compare, "compare", source, remedy)
    stages = load_stages(source, given)
    if not stages:
        config = load_config(source, given)
        stages = [Stage(config.mode, config)]
    for stage in stages:
        if not stage.config.facts.classifies:
            raise ConfigError(
                f"{source}: stage {stage.name} has mode {stage.config.mode}, which has no accuracy to compare"
            )
    check_stages(compare, [stage.name for stage in stages])
    if compare.teacher_recipe is None:
        return Comparison([Stage(stage.name, _settle(stage.config)) for stage in stages], compare)
    folder = stages[0].config.output_dir / "teacher"
    teacher = load_config(_find_recipe(compare.teacher_recipe, Path(source)), _take_over(given, folder))
    found = {"source": f"local-dir:{folder / 'student'}"}
    settled = []
    for stage in stages:
        config = stage.config.model_copy(update={"teacher": stage.config.teacher.model_copy(update=found)})
        settled.append(Stage(stage.name, _settle(config, teacher)))
    return Comparison(settled, compare, teacher)


def _settle(config: RunConfig, made: RunConfig | None = None) -> RunConfig:
    """Return the settings of a stage with its student's architecture, size and pooling.

    `made` is the run that makes the teacher, which may not be there yet.
    """
    from ..transfer.engine.build import find_start, settle
    from ..transfer.engine.modes import mode_of
    from ..transfer.engine.students import settle_student
    from ..transfer.mode_facts import TEACHER

    if made is None or config.starting_source != TEACHER:
        return settle(config, find_start(mode_of(config)))
    return config.model_copy(update={"student": settle_student(config.student, _settle(made).student)})


def _find_recipe(recipe: str, source: Path) -> str | Path:
    """Return the recipe of the teacher: a file beside the file that names it, as for `base:`, or a recipe's name."""
    path = source.parent / recipe
    return path if is_file(path) and path != source and source.is_file() else recipe


def _take_over(given: Iterable[Setting], folder: Path) -> list[Setting]:
    """Return the given settings that also hold for the teacher's run, and the settings of its folder and display."""
    kept = [setting for setting in given if setting.key in FOR_THE_TEACHER]
    return [
        *kept,
        Setting("output_dir", str(folder), "output_dir"),
        Setting("engine.progress", False, "engine.progress"),
    ]
