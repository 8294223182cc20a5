"""What a comparison compares: the section `compare:` of a YAML file, and a cell for each student and image size."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor, nn

from ....checkpoints.files import digest, safe_name
from ....models.conversion import ConvertedAttention, converted_layers, sharing_copy
from ....models.errors import ConfigError, did_you_mean
from ....models.families import family_of, sites
from ....models.host import AttentionHost
from ....models.hosting import Call, watch_layer
from ...cells import State, cell_state, load_record, pick_named
from ...config import RunConfig
from ...engine.stages import Stage
from ...engine.students import input_size
from ...setting import Section, dump_decisive

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


# What is known of a cell; `cells/<cell>/cell.json` keeps it.


@dataclass(frozen=True)
class Score:
    """On the test images after a stage; `zero-shot` is before the first. Percent; seconds of training alone."""

    stage: str
    top1: float
    top5: float
    loss: float
    seconds: float = 0.0
    steps: int = 0
    deviation: float | None = None
    """Of a mean over seeds: the sample standard deviation of the top-1."""
    samples: int | None = None
    """Test images; None if unknown."""


@dataclass(frozen=True)
class Speed:
    """A model at an image size. Seconds are of one call; those of softmax were timed in turn with it."""

    size: int
    batch: int
    """Images in the batches of throughput and memory."""
    tokens: int
    """Of a pyramid, the tokens of its first stage."""
    latency: float
    """Of one image, the median."""
    latency_low: float
    latency_high: float
    softmax_latency: float
    throughput: float
    """Images a second in batches."""
    softmax_throughput: float
    peak_bytes: int
    """Above the weights, for a batch."""
    macs: int
    """Of one image, by the operators' own account."""
    counted_macs: int
    """Of one image, by torch's counter."""
    multiplications: int
    """Of one image, as `graftvit benchmark energy` counts."""
    additions: int


@dataclass(frozen=True)
class Record:
    """A cell that is done, or that failed with `error`."""

    name: str
    plan: str | None
    size: int
    settings: str
    """A digest of all settings that its accuracy depends on."""
    machine: str
    load: float
    error: str | None = None
    linear: bool = False
    """Every layer costs linearly in the tokens."""
    parameters: int = 0
    new_parameters: int = 0
    scores: list[Score] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)
    layer_errors: dict[str, dict[int, float]] = field(default_factory=dict)
    """By stage and layer: relative error of the layer's output on the teacher's inputs."""
    teacher: str = ""
    """The digest of the teachers' identities; empty without a teacher."""
    converted: bool | None = None
    """Whether the plan changed a layer; None of the teacher and of a cell that failed."""
    seed: int | None = None
    """Of its runs, where the comparison has several; None for the teacher, and for a mean."""
    seeds: int = 1
    """The number of cells that its numbers are means of."""

    @property
    def is_unconverted(self) -> bool:
        """Whether this is a student whose plan keeps every layer: `softmax` does so in plain vision transformers."""
        return self.converted is False

    @property
    def folder(self) -> str:
        """The name of the cell's folder."""
        return folder_of(self.name, self.size, self.seed)

    @property
    def speed(self) -> Speed | None:
        """The speed at the image size of the training."""
        return next((speed for speed in self.speeds if speed.size == self.size), None)

    def score(self, stage: str) -> Score | None:
        """Return the score of a stage; None where the cell has none."""
        return next((score for score in self.scores if score.stage == stage), None)

    @property
    def seconds(self) -> float:
        """Seconds of training, all stages."""
        return sum(score.seconds for score in self.scores)

    @property
    def final(self) -> Score | None:
        return self.scores[-1] if self.scores else None


# A comparison: its cells, what they depend on, and how far they are.

SET_BY_CELLS = {"student.plan", "engine.evaluate_start", "engine.evaluate_teacher"}
"""Settings for which each cell has a value of its own."""


@dataclass(frozen=True)
class Comparison:
    """One teacher, the stages that every student goes through, and the plans."""

    stages: Sequence[Stage]
    compare: CompareConfig
    teacher: RunConfig | None = None
    """The run that makes the teacher, where one does."""

    @property
    def folder(self) -> Path:
        return self.stages[0].config.output_dir

    @property
    def config(self) -> RunConfig:
        return self.stages[0].config

    @property
    def has_teacher(self) -> bool:
        return self.config.teacher.source is not None

    def cells(self) -> list[Cell]:
        """Return all cells in the order of the table. Raises ConfigError: a name or a size is not valid."""
        sizes = self.compare.img_size or (_side(self.config),)
        return list_cells(self.compare.plans, sizes, teacher=self.has_teacher, seeds=self.compare.seeds)

    def stages_of(self, cell: Cell) -> list[Stage]:
        """Return the stages that a cell goes through, with its seed."""
        names = self.compare.stages.get(cell.name, [stage.name for stage in self.stages])
        seed = {} if cell.seed is None else {"seed": cell.seed}
        return [
            Stage(stage.name, stage.config.model_copy(update=seed))
            for stage in self.stages
            if stage.name in names
        ]

    def cell_folder(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.folder

    def record(self, cell: Cell) -> Record | None:
        """Return what is known of a cell that is done or failed."""
        return load_record(Record, self.cell_folder(cell))

    def records(self) -> list[Record]:
        """Return the records of all cells that are done or failed, in the order of the table."""
        found = (self.record(cell) for cell in self.cells())
        return [record for record in found if record is not None]

    def state(self, cell: Cell) -> State:
        """Return how far a cell is. Raises ConfigError: it was measured with other settings."""
        return cell_state(self.cell_folder(cell), self.digest(cell))

    def digest(self, cell: Cell) -> str:
        """Return the digest of all settings that the cell's numbers depend on."""
        path = set() if self.teacher is None else {"teacher.source"}
        stages = [dump_decisive(stage.config, SET_BY_CELLS | path) for stage in self.stages_of(cell)]
        made = None if self.teacher is None else dump_decisive(self.teacher)
        measured = self.compare.model_dump(
            mode="json", exclude={"plans", "img_size", "stages", "seeds", "teacher_recipe"}
        )
        return digest([stages, made, measured, cell.plan, cell.size])

    @property
    def device(self) -> torch.device:
        """Where speed is measured."""
        auto = self.config.engine.device == "auto" and torch.cuda.is_available()
        return torch.device("cuda" if auto else "cpu")


def _side(config: RunConfig) -> int:
    _, height, width = input_size(config.student)
    if height != width:
        raise ConfigError(f"student.img_size is {height}x{width}; a comparison takes square images")
    return height


# Means over the cells of a student that differ in their seed alone.


def mean_over_seeds(records: Sequence[Record]) -> list[Record]:
    """Return one record for each name and image size, with the means over seeds; failed cells stay by themselves."""
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        groups.setdefault((record.name, record.size), []).append(record)
    found = []
    for group in groups.values():
        done = [record for record in group if record.error is None]
        if len(done) > 1:
            found.append(_mean(done))
        else:
            found += done
        found += [record for record in group if record.error is not None]
    return found


def _mean(group: Sequence[Record]) -> Record:
    """Return the mean of finished records; speeds are those of the first that has any."""
    first = group[0]
    names = [score.stage for score in first.scores]
    return replace(
        first,
        seed=None,
        seeds=len(group),
        scores=[_mean_score([each for r in group if (each := r.score(name)) is not None]) for name in names],
        speeds=next((record.speeds for record in group if record.speeds), []),
        layer_errors={
            stage: {
                layer: statistics.fmean(record.layer_errors[stage][layer] for record in group)
                for layer in layers
            }
            for stage, layers in first.layer_errors.items()
        },
    )


def _mean_score(scores: Sequence[Score]) -> Score:
    top1 = [score.top1 for score in scores]
    return replace(
        scores[0],
        top1=statistics.fmean(top1),
        top5=statistics.fmean(score.top5 for score in scores),
        loss=statistics.fmean(score.loss for score in scores),
        seconds=statistics.fmean(score.seconds for score in scores),
        deviation=statistics.stdev(top1) if len(top1) > 1 else None,
    )


# How far each converted layer is from its teacher's, on what the teacher's layer sees.


@torch.no_grad()
def layer_errors(teacher: nn.Module, student: nn.Module, batches: Sequence[Tensor]) -> dict[int, float]:
    """Return the relative error of the output of each converted layer, ‖out − target‖ / ‖target‖ over all batches.

    Both outputs are per head and before the projection; the inputs are the teacher's at every layer. The images
    are normalized as the teacher's. Both models are run in eval mode.
    """
    layers, teacher = converted_layers(student), sharing_copy(teacher)  # a pyramid's layers get hosts
    squares: dict[int, list[Tensor]] = {index: [] for index in layers}
    teacher.eval()
    student.eval()
    places = sites(teacher)
    hooks = [
        watch_layer(teacher, places[index], partial(_compare, layer, squares[index]))
        for index, layer in layers.items()
    ]
    try:
        for images in batches:
            family_of(teacher).features(teacher, images)
    finally:
        for hook in hooks:
            hook.remove()
    totals = {index: torch.stack(found).sum(0) for index, found in squares.items()}
    return {index: float((total[0] / total[1]).sqrt()) for index, total in totals.items()}


def _compare(layer: ConvertedAttention, squares: list[Tensor], native: AttentionHost, call: Call) -> None:
    """Add the squares of the difference and of the teacher's output, over what the teacher's layer is given."""
    target = native.attend(native.heads_of(*call.inputs, **call.keywords))
    out = layer.operator(layer.heads_of(*call.inputs, **call.keywords))
    squares.append(torch.stack([each.double().square().sum() for each in (out - target, target)]))
