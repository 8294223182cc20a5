"""What the benchmark trains: the section `attnbench:` of a recipe, and the programs, backbones and data of its rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

from pydantic import Field, ValidationError, model_validator

from ...checkpoints.files import safe_name
from ...models.errors import ConfigError, JsonDict, did_you_mean
from ...models.programs.drawing import draw_program
from ...models.programs.program import FOUND, LINEAR, parse_program
from ..cells.records import digest
from ..config import DataConfig, RunConfig, StudentConfig
from ..effect import dump_decisive
from ..engine.build import identify_teachers
from ..section import Section

CONTROLS = {
    "softmax": "mm(softmax(nt(scale(q) k)) v)",
    "elu1": LINEAR,
    "values": "v",
    "identity": "q",
}
"""Programs that every run has: softmax and linear attention, and two that mix no tokens."""
NAMED = {**CONTROLS, **FOUND}
MOST = 100_000


class BackboneConfig(Section):
    """A model whose layers get the program."""

    layers: str = Field("*", description="layers that get the program, as in a plan: '*', stage1-2")
    student: JsonDict = Field({}, description="settings of the section student")


class BenchConfig(Section):
    """The section `attnbench:`."""

    backbones: dict[str, BackboneConfig] = Field(min_length=1, description="models by name")
    data: dict[str, JsonDict] = Field(min_length=1, description="by name, settings of the section data")

    @model_validator(mode="after")
    def _check_names(self) -> BenchConfig:
        """Raise ConfigError for names that give no folder of its own to each pair of a model and data."""
        for what, names in (("backbones", self.backbones), ("data", self.data)):
            for name in names:
                safe_name(name, f"attnbench.{what}")
        pairs = [f"{backbone}-{data}" for backbone in self.backbones for data in self.data]
        twice = next((pair for pair in pairs if pairs.count(pair) > 1), None)
        if twice is not None:
            raise ConfigError(f"attnbench: two pairs of a model and data are called {twice!r}; rename one")
        return self


@dataclass(frozen=True)
class Trial:
    """What a row is about."""

    program: str
    backbone: str
    data: str
    seed: int
    local: bool

    @property
    def name(self) -> str:
        """Return the name of a control or of a published program; empty for others."""
        return next((name for name, text in NAMED.items() if parse_program(text).text == self.program), "")

    @property
    def hash(self) -> str:
        return parse_program(self.program).hash

    @property
    def folder(self) -> str:
        convolution = "with" if self.local else "without"
        return f"{self.backbone}-{self.data}-{self.seed}-{convolution}"


@dataclass(frozen=True)
class Bench:
    """The settings of a benchmark, under the name of its recipe."""

    recipe: str
    config: RunConfig
    settings: BenchConfig

    def run_config(self, backbone: str, data: str) -> RunConfig:
        """Return the settings of a run without its program, seed and folder. Raises ConfigError: one is not valid."""
        own = self.settings.backbones[backbone]
        try:
            student = StudentConfig.model_validate({**self.config.student.model_dump(), **own.student})
            images = DataConfig.model_validate({**self.config.data.model_dump(), **self.settings.data[data]})
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise ConfigError(
                f"{self.recipe}: attnbench, {backbone} and {data}: {key} is {first['input']!r}: {first['msg']}"
            ) from error
        return self.config.model_copy(update={"student": student, "data": images})

    def trial_config(self, trial: Trial, folder: Path) -> RunConfig:
        """Return the settings of the run of a trial."""
        config = self.run_config(trial.backbone, trial.data)
        plan = f"program(code={trial.program}, local_size={3 if trial.local else 0})"
        student = config.student.model_copy(
            update={"plan": f"{self.settings.backbones[trial.backbone].layers}: {plan}"}
        )
        return config.model_copy(update={"student": student, "seed": trial.seed, "output_dir": folder})

    @cached_property
    def teachers(self) -> list[str]:
        """The digests of the teachers' identities."""
        return identify_teachers(self.config)

    def digest(self, backbone: str, data: str) -> str:
        """Return the digest of what numbers depend on, but for program and seed: not of paths and processes.

        Settings with their default are left out, so that a new setting does not change the digest of older rows.
        """
        own = {"seed", "teacher.source", "engine.device", "engine.evaluate_start", "engine.evaluate_teacher"}
        config = dump_decisive(self.run_config(backbone, data), own, exclude_defaults=True)
        return digest([config, self.settings.backbones[backbone].layers, *self.teachers])

    def trials(
        self,
        programs: Sequence[str],
        seeds: Sequence[int],
        backbones: Sequence[str] = (),
        data: Sequence[str] = (),
        local: Sequence[bool] = (True, False),
    ) -> list[Trial]:
        """Return a trial for each combination; no names mean all. Raises ConfigError: a name does not exist."""
        models = _chosen(backbones, self.settings.backbones, "--backbone")
        sets = _chosen(data, self.settings.data, "--data")
        return [
            Trial(program, model, images, seed, convolved)
            for program in programs
            for images in sets
            for model in models
            for seed in seeds
            for convolved in local
        ]


def _chosen(names: Sequence[str], valid: Iterable[str], flag: str) -> list[str]:
    """Return the valid names that are among `names`; all for none. Raises ConfigError: a name does not exist."""
    for name in names:
        if name not in valid:
            raise ConfigError(f"{flag} {name}: the recipe has no such name; {did_you_mean(name, valid)}")
    return [name for name in valid if not names or name in names]


def list_programs(given: Sequence[str], drawn: int, seed: int) -> list[str]:
    """Return canonical texts, each once: the controls, those given (names or texts), and some drawn with a seed.

    Raises ProgramError: a given text is invalid.
    """
    random = Random(seed)
    found = [parse_program(text).text for text in CONTROLS.values()]
    found += [parse_program(NAMED.get(text, text)).text for text in given]
    found = list(dict.fromkeys(found))
    new: dict[str, None] = {}
    while len(new) < drawn:
        text = draw_program(random).text
        if text not in found:
            new[text] = None
    return [*found, *new]
