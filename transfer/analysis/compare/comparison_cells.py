"""What a comparison compares: the section `compare:` of a YAML file, and a cell for each student and image size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field, NonNegativeInt

from ....checkpoints.files import safe_name
from ....models.errors import ConfigError, did_you_mean
from ...cells.sharing import pick_named
from ...section import Section

TEACHER, UNIFORM = "teacher", "uniform"


class CompareConfig(Section):
    """The section `compare:` of a YAML file."""

    plans: dict[str, str] = Field(
        min_length=1, description="by name, the attention of each layer, such as {linear: '*: linear'}"
    )
    img_size: tuple[int, ...] = Field(
        (), description="sides of the images that students are trained at; student.img_size by default"
    )
    stages: dict[str, tuple[str, ...]] = Field(
        {}, description="by the name of a plan, the stages that it goes through; all by default"
    )
    seeds: tuple[NonNegativeInt, ...] = Field(
        (),
        description="seeds of the students, a cell each, whose mean is in the tables; the setting seed by default",
    )
    teacher_recipe: str | None = Field(
        None, description="recipe that trains the teacher first, in output_dir/teacher"
    )
    speed_img_size: tuple[int, ...] = Field(
        (), description="sides of the images that speed is measured at, beside those of the training"
    )
    batch_size: int = Field(64, gt=0, description="images in a batch of the throughput and peak memory")
    repeats: int = Field(7, gt=1, description="rounds of each timing")
    error_batches: int = Field(2, gt=0, description="test batches that the layers' errors are measured on")


@dataclass(frozen=True)
class Cell:
    """One row of the table: a student by its plan, or the teacher as it is, which has none."""

    name: str
    plan: str | None
    size: int
    """Side of the images in pixels."""
    seed: int | None = None
    """Of its runs; None for the teacher, and for that of the recipe."""

    @property
    def folder(self) -> str:
        return folder_of(self.name, self.size, self.seed)

    def __str__(self) -> str:
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"{self.name}, {self.size} px{seed}: {self.plan or 'as it is'}"


def folder_of(name: str, size: int, seed: int | None) -> str:
    """Return the name of a cell's folder. Raises ConfigError: the name of its plan is no part of a path."""
    safe_name(name, "compare.plans")
    return f"{name}-{size}" if seed is None else f"{name}-{size}-seed{seed}"


def list_cells(
    plans: Mapping[str, str], sizes: Sequence[int], *, teacher: bool, seeds: Sequence[int] = ()
) -> list[Cell]:
    """Return all cells: at each size the teacher where there is one, uniform attention, then the plans.

    Each student has a cell for every seed.

    Raises ConfigError: a name is taken or is not valid, or a seed is there twice.
    """
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"compare.seeds is {list(seeds)}: give each seed once")
    for name in plans:
        if name in (TEACHER, UNIFORM):
            raise ConfigError(
                f"compare.plans: {name!r} is there without being asked for; choose another name"
            )
        folder_of(name, 0, None)
    everyone: dict[str, str | None] = {TEACHER: None} if teacher else {}
    everyone |= {UNIFORM: "*: uniform", **plans}
    return [
        Cell(name, plan, size, seed)
        for size in sizes
        for name, plan in everyone.items()
        for seed in (seeds if seeds and name != TEACHER else [None])
    ]


def check_stages(compare: CompareConfig, stages: Sequence[str]) -> None:
    """Raise ConfigError: `compare.stages` names a plan or a stage that is not there, or leaves a plan none."""
    for name, own in compare.stages.items():
        if name not in (plans := (UNIFORM, *compare.plans)):
            raise ConfigError(f"compare.stages: there is no plan {name!r}; {did_you_mean(name, plans)}")
        for stage in own:
            if stage not in stages:
                raise ConfigError(
                    f"compare.stages.{name}: there is no stage {stage!r}; {did_you_mean(stage, stages)}"
                )
        if not own:
            raise ConfigError(
                f"compare.stages.{name} is empty: name one stage or more of {', '.join(stages)}"
            )


def only_named(cells: Sequence[Cell], names: Sequence[str] | None, origin: str = "--only") -> list[Cell]:
    """Return the cells of these names, or with these folders; all for None. Raises ConfigError: one is not there."""
    return pick_named(cells, names, lambda cell: (cell.name, cell.folder), origin)
