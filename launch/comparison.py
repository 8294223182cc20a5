"""Read a comparison from a YAML file with a section `compare`."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from ..checkpoints.files import is_file
from ..models.errors import ConfigError, JsonDict
from .load_config import Setting, load_config, load_stages, read_recipe

if TYPE_CHECKING:
    from ..transfer.analysis.compare.compare import Comparison
    from ..transfer.analysis.compare.comparison_cells import CompareConfig
    from ..transfer.attnbench.bench_rows import Row
    from ..transfer.attnbench.bench_run import Bench
    from ..transfer.config import RunConfig


# Read the benchmark of a recipe, and rows: those of a file, or those that come with the package.


def load_bench(source: str | Path, overrides: Iterable[Setting] = ()) -> Bench:
    """Load the benchmark of a recipe or YAML file. Raises ConfigError: it has no valid section `attnbench`."""
    from ..transfer.attnbench.bench_run import Bench, BenchConfig

    values = read_recipe(source).attnbench
    if values is None:
        raise ConfigError(
            f"{source} has no section 'attnbench'; add attnbench: {{backbones: {{...}}, data: {{...}}}}, or take the "
            f"recipe attnbench_digits"
        )
    try:
        settings = BenchConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["attnbench", *map(str, first["loc"])])
        raise ConfigError(f"{source}: {key} is {first['input']!r}: {first['msg']}") from error
    bench = Bench(str(source), load_config(source, overrides), settings)
    for backbone in settings.backbones:
        for data in settings.data:
            bench.run_config(backbone, data)
    return bench


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
    from ..transfer.analysis.compare.compare import Comparison
    from ..transfer.analysis.compare.comparison_cells import check_stages
    from ..transfer.engine.stages import Stage

    given = list(overrides)
    compare = _compare(read_recipe(source).compare, str(source))
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
        return Comparison([Stage(stage.name, _settled(stage.config)) for stage in stages], compare)
    folder = stages[0].config.output_dir / "teacher"
    teacher = load_config(_beside(compare.teacher_recipe, Path(source)), _taken_over(given, folder))
    found = {"source": f"local-dir:{folder / 'student'}"}
    stages = [
        Stage(
            stage.name,
            _settled(
                stage.config.model_copy(update={"teacher": stage.config.teacher.model_copy(update=found)}),
                teacher,
            ),
        )
        for stage in stages
    ]
    return Comparison(stages, compare, teacher)


def _settled(config: RunConfig, made: RunConfig | None = None) -> RunConfig:
    """Return the settings of a stage with its student's architecture, size and pooling.

    `made` is the run that makes the teacher, which may not be there yet.
    """
    from ..transfer.engine.build import find_start, settle
    from ..transfer.engine.modes import mode_of
    from ..transfer.engine.students import settle_student
    from ..transfer.mode_facts import TEACHER

    if made is None or config.starting_source != TEACHER:
        return settle(config, find_start(mode_of(config)))
    return config.model_copy(update={"student": settle_student(config.student, _settled(made).student)})


def _beside(recipe: str, source: Path) -> str | Path:
    """Return the recipe of the teacher: a file beside the file that names it, as for `base:`, or a recipe's name."""
    path = source.parent / recipe
    return path if is_file(path) and path != source and source.is_file() else recipe


def _taken_over(given: Iterable[Setting], folder: Path) -> list[Setting]:
    """Return the given settings that also hold for the teacher's run, and the settings of its folder and display."""
    kept = [setting for setting in given if setting.key in FOR_THE_TEACHER]
    return [
        *kept,
        Setting("output_dir", str(folder), "output_dir"),
        Setting("engine.progress", False, "engine.progress"),
    ]


def _compare(values: JsonDict | None, label: str) -> CompareConfig:
    from ..transfer.analysis.compare.comparison_cells import CompareConfig

    if values is None:
        raise ConfigError(
            f"{label} has no section 'compare'; add compare: {{plans: {{linear: '*: linear', ...}}}}, or take the "
            "recipe digits_compare"
        )
    try:
        return CompareConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["compare", *map(str, first["loc"])])
        raise ConfigError(
            f"{label}: {key} is {first['input']!r}: {first['msg']}; valid keys are "
            f"{', '.join(CompareConfig.model_fields)}"
        ) from error
