"""Read the benchmark of a recipe, and rows: those of a file, or those that come with the package."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from ..models.errors import ConfigError
from .load_config import Setting, load_config, read_recipe

if TYPE_CHECKING:
    from ..transfer.attnbench.bench_rows import Row
    from ..transfer.attnbench.bench_run import Bench


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
