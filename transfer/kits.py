"""Kits for published numbers: the claim, what it costs to reproduce, a small surrogate, a row of a finished run."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, TypeAlias

from pydantic import Field, ValidationError, field_validator
from scipy import stats

from ..checkpoints.files import digest, read_regular
from ..checkpoints.provenance import Pretrained
from ..models.cost import attention_macs, other_macs
from ..models.errors import ConfigError, Json, JsonDict, counted, did_you_mean
from ..models.plain_yaml import MAX_BYTES, YamlError, parse_yaml
from .bench_rows import Point, Row
from .bench_run import environment
from .config import RunConfig
from .engine.resume_check import differences
from .engine.stages import Stage, chain
from .setting import Section, dump_decisive, explain

V100_HOURS = 32 * (7 + 11 / 60)
"""What MAE's authors report for fine-tuning ViT-B: 7 h 11 min on 32 V100 (FINETUNE.md of its code)."""
V100_WORK = 17.56 * 100 * 3
"""The work of that: billions of multiply-adds of an image, times epochs, times passes."""
SAME_WEIGHTS = 0.1
"""Points of top-1 by which two evaluations of the same weights may differ: machines round differently."""
OWN_OF_A_RUN = {
    "seed", "imports", "teacher.source", "teacher.compile", "teacher.shard", "student.compile",
    "student.grad_checkpointing", "data.dataset", "data.train_split", "data.val_split", "data.val_samples",
    "data.image_column", "data.label_column", "data.classes", "data.batch_size", "data.eval_batch_size",
    "optim.accum_iter",
}  # fmt: skip
"""Settings that a run of a recipe may have for itself: where images and weights are, and how a batch is divided."""


class Published(Section):
    """The number of a paper."""

    top1: Annotated[float, Field(gt=0, lt=100, description="top-1 in percent")]
    beside: str = Field(description="what the paper compares it with")
    source: str = Field(min_length=1, description="paper, table and data set")
    tolerance: float = Field(gt=0, description="points by which a reproduction may differ")
    because: str = Field(min_length=1, description="why as much as that")
    data: str = Field("imagenet-1k", description="data set, in a row")
    images: int = Field(50_000, gt=0, description="images that it is measured on")


class Contrast(Section):
    """Two students of a surrogate, of which the claim has the first above the second."""

    higher: str = Field(description="name of a student")
    lower: str = Field(description="name of a student")
    says: str = Field(description="what is shown if it is above")


Student: TypeAlias = tuple[str, int | None]
"""The name of a student of a surrogate, and its seed; None for a teacher, and for one run alone."""


class Surrogate(Section):
    """A small experiment that has something of the claim."""

    command: str = Field(
        pattern=r"^(demo$|compare [^-]|programs bench run )",
        description="words of a command that takes --output_dir: demo, compare RECIPE ..., programs bench run ...",
    )
    minutes: float = Field(gt=0, description="minutes on one CPU core")
    contrasts: tuple[Contrast, ...] = Field(min_length=1, description="what it is judged by")
    limits: str = Field(min_length=1, description="what of the claim it can show")

    @field_validator("command")
    @classmethod
    def _check_quotes(cls, command: str) -> str:
        shlex.split(command)
        return command


class Kit(Section):
    """A published number with all that it takes to reproduce it."""

    claim: str = Field(min_length=1, description="the claim in a sentence")
    recipes: tuple[str, ...] = Field(
        min_length=1, description="recipes of its runs; of several, the ensemble counts"
    )
    published: Published = Field(description="the number")
    work: tuple[tuple[float, float, float], ...] = Field(
        min_length=1, description="billions of multiply-adds of an image, epochs, passes"
    )
    surrogate: Surrogate = Field(description="the small experiment")

    @property
    def gpu_hours(self) -> float:
        """Return hours of a V100, if it does as many multiply-adds an hour as in MAE's fine-tuning of ViT-B.

        Small models keep a GPU less busy, so theirs are a lower bound.
        """
        return V100_HOURS * sum(math.prod(each) for each in self.work) / V100_WORK


def load_kits(path: Path | None = None) -> dict[str, Kit]:
    """Return the kits of a file, or those of the package. Raises ConfigError: the file is not valid."""
    packaged = resources.files(__package__) / "kits.yaml"
    text = (
        packaged.read_text("utf-8")
        if path is None
        else read_regular(path, limit=MAX_BYTES, refusal=ConfigError)
    )
    try:
        content = parse_yaml(text)
    except YamlError as error:
        raise ConfigError(f"{path}: not valid YAML, {error}") from error
    if not isinstance(content, dict) or not all(isinstance(kit, dict) for kit in content.values()):
        raise ConfigError(f"{path} has no kits: give each a name and its keys, as docs/reproduce.md shows")
    return {str(name): _read_kit(str(name), kit, path) for name, kit in content.items()}


def _read_kit(name: str, content: Json, path: Path | None) -> Kit:
    try:
        return Kit.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, Kit, name)}") from error


# What a surrogate shows: the sign of a difference within seeds, with its interval.


@dataclass(frozen=True)
class Verdict:
    """The differences of a contrast, seed by seed, in points."""

    contrast: Contrast
    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.differences)

    @property
    def half(self) -> float:
        """Half of the 95 % interval of the mean, by Student's t."""
        count = len(self.differences)
        error = statistics.stdev(self.differences) / math.sqrt(count)
        return float(stats.t.ppf(0.975, count - 1)) * error

    @property
    def outcome(self) -> str:
        """Return whether the interval is on the claimed side of zero, on the other one, or on both."""
        if self.mean - self.half > 0:
            return "shown"
        return "contradicted" if self.mean + self.half < 0 else "not settled"

    def __str__(self) -> str:
        low, high = (f"{self.mean + sign * self.half:+.1f}" for sign in (-1, 1))
        return (
            f"{self.outcome}: {self.contrast.says}; {self.contrast.higher} - {self.contrast.lower} is {self.mean:+.1f} "
            f"points, 95 % interval {low} to {high} over {len(self.differences)} seeds"
        )


def common_seeds(contrast: Contrast, students: Collection[Student]) -> list[int]:
    """Return the seeds that both students of a contrast have.

    Raises ConfigError: one of the two is not among `students`, or they have less than two seeds in common.
    """
    higher, lower = (
        {seed for each, seed in students if each == name} for name in (contrast.higher, contrast.lower)
    )
    for name, seeds in ((contrast.higher, higher), (contrast.lower, lower)):
        if not seeds:
            valid = did_you_mean(name, {each for each, _ in students})
            raise ConfigError(f"surrogate.contrasts: the command trains no student {name!r}; {valid}")
    common = sorted(seed for seed in higher & lower if seed is not None)
    if len(common) < 2:
        raise ConfigError(
            f"surrogate.contrasts: {contrast.higher} and {contrast.lower} have {counted(len(common), 'seed')} in "
            "common, and an interval needs two or more"
        )
    return common


def judge(contrast: Contrast, top1: Mapping[Student, float]) -> Verdict:
    """Return what the accuracies of students say of a contrast. Raises ConfigError as `common_seeds`."""
    seeds = common_seeds(contrast, top1)
    return Verdict(
        contrast, tuple(top1[contrast.higher, seed] - top1[contrast.lower, seed] for seed in seeds)
    )


# A row of the benchmark's form: the weights of a finished run, evaluated, beside the number of the paper.


def check_recipe(source: str, loaded: Pretrained, stages: Sequence[Stage], stage: str) -> int:
    """Return the seed of a student's run, which was that of a recipe, by what the student has recorded.

    Args:
        source: The student's source, for errors.
        loaded: The student.
        stages: Those of the recipe; one for a recipe without stages.
        stage: The one that the student comes from.

    Raises ConfigError: the student has recorded no settings, or another value of one that the number depends on.
    """
    recorded = loaded.provenance.get("recipe")
    if not isinstance(recorded, dict):
        raise ConfigError(f"{source} is no student of a run: it has not recorded its settings")
    run, chained = RunConfig(**recorded), chain(stages) if len(stages) > 1 else stages
    wanted = next(each.config for each in chained if each.name == stage)
    follows = len(stages) > 1 and stage != stages[0].name  # its student is in the folder of the stage before
    free = OWN_OF_A_RUN | ({"student.model"} if follows else set())
    for key, (its, other) in differences(_settings(run, free), _settings(wanted, free)).items():
        raise ConfigError(f"{source} was trained with {key}={its!r}, and the kit's recipe has {other!r}")
    return run.seed


def _settings(config: RunConfig, free: set[str]) -> JsonDict:
    found = dump_decisive(config, free)
    found.pop("engine", None)  # a student does not record where it ran
    return found


def make_row(
    name: str,
    kit: Kit,
    models: Sequence[Pretrained],
    recipes: Sequence[Sequence[Stage]],
    seed: int,
    measured: Mapping[str, float],
) -> Row:
    """Return the row of a kit's students, one for each of its recipes.

    `hash` is the digest of their weights, `settings` that of the recipes' settings, and the curve has one point: the
    accuracy and loss of the student, or of the ensemble, in `measured`.

    Raises ConfigError: it was measured on another number of images than the published one.
    """
    if int(measured["samples"]) != kit.published.images:
        raise ConfigError(
            f"it was measured on {int(measured['samples']):,} images, and the published number on "
            f"{kit.published.images:,}: give the same validation split by --dataset or --data_path"
        )
    configs = [stage.config for stages in recipes for stage in stages]
    settings = [dump_decisive(config, OWN_OF_A_RUN, exclude_defaults=True) for config in configs]
    last = recipes[0][-1].config
    point = Point(last.optim.epochs, round(measured["top1"], 4), measured["loss"])
    return Row(
        settings=digest(settings),
        hash=digest([each.digest for each in models]),
        name=name,
        program=last.student.plan or "",
        backbone=last.student.model,
        data=kit.published.data,
        seed=seed,
        local=False,
        recipe=" + ".join(kit.recipes),
        curve=(point,),
        parameters=sum(sum(p.numel() for p in each.model.parameters()) for each in models),
        macs=sum(sum(attention_macs(each.model)) + other_macs(each.model) for each in models),
        environment=environment(),
    )


def compare_published(row: Row, kit: Kit) -> str:
    """Return the row beside the published number, in words."""
    published, top1 = kit.published, row.top1 or 0.0
    agrees = abs(top1 - published.top1) <= published.tolerance
    return (
        f"top-1 {top1:.2f} on {published.data}, published {published.top1} ± {published.tolerance}: "
        f"{'agrees' if agrees else 'does not agree'} ({top1 - published.top1:+.2f} points)"
    )


def disagreement_of_weights(rows: Sequence[Row], own: Row) -> str:
    """Return what is wrong with the rows that say something of the weights of `own`; empty if nothing is."""
    same = [row for row in rows if (row.name, row.hash) == (own.name, own.hash)]
    if not same:
        return f"no row of {own.name} has the digest of these weights, {own.hash}"
    for row in same:
        for field in ("settings", "recipe", "data", "backbone", "seed", "parameters", "macs"):
            if getattr(row, field) != getattr(own, field):
                return (
                    f"the row has {field} {getattr(row, field)!r}, and these weights {getattr(own, field)!r}"
                )
        if row.top1 is None or own.top1 is None or abs(row.top1 - own.top1) > SAME_WEIGHTS:
            return f"the row has top-1 {row.top1}, and these weights {own.top1}"
    return ""
