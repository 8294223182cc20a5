"""Run the trials of a benchmark in parallel processes: a cell is a program, and each of its trials has a record."""

from __future__ import annotations

import itertools
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from random import Random

import torch
from pydantic import Field, ValidationError, model_validator

from ..checkpoints.files import digest, read_records, safe_name
from ..checkpoints.pretrained import load_pretrained
from ..models.cost import attention_macs, other_macs
from ..models.errors import ConfigError, JsonDict, RunFailedError, did_you_mean
from ..models.programs.drawing import draw_program
from ..models.programs.program import FOUND, LINEAR, parse_program
from ..models.programs.program_checks import CHECKS, check
from .analysis.benchmark_cases import step_of, time_steps
from .bench_rows import Point, Row, describe, disagreement
from .cells import (
    CELL_FILE,
    State,
    cell_state,
    load_record,
    refuse_links,
    run_in_processes,
    save_record,
)
from .config import DataConfig, RunConfig, StudentConfig
from .engine.build import identify_teachers
from .engine.train import train
from .setting import Section, dump_decisive

# What the benchmark trains: the section `attnbench:` of a recipe, and the programs, backbones and data of its rows.

CONTROLS = {
    "softmax": "mm(softmax(nt(scale(q) k)) v)",
    "elu1": LINEAR,
    "values": "v",
    "identity": "q",
}
"""Programs that every run has: softmax and linear attention, and two that mix no tokens."""
NAMED = {**CONTROLS, **FOUND}


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

        Settings with their default are left out, so that a new setting does not change the digest of finished rows.
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


# Run one trial: check its program, train its model from scratch, and measure what the model costs.

REFUSING = tuple(each for each in CHECKS if each.name not in ("stability", "triviality", "half", "training"))
"""The checks that a program passes before it is trained: those that take milliseconds. Controls are not checked."""
RUN = "run"
"""Of the folder of a trial: the run, until it ends."""
BATCH, ROUNDS = 32, 5
"""Images and rounds of the latency."""


def run_trial(bench: Bench, trial: Trial, folder: Path) -> Row | int:
    """Return the row of a trial, or the signal that stopped its training, which the next call resumes.

    The run is in `folder`, and is removed at its end. Raises GraftError as `train`, but for a loss that is not finite.
    """
    row = _row(bench, trial)
    verdict = check(trial.program, REFUSING)
    if trial.name not in CONTROLS and not verdict.passed:
        return replace(row, status="refused", reason=f"{verdict.check}: {verdict.reason}")
    config = bench.trial_config(trial, folder / RUN)
    try:
        result = train(config)
        if result.signal is not None:
            return result.signal
        row = _measured(row, config.output_dir)
    except RunFailedError as error:
        if "not finite" not in str(error):
            raise
        reason = str(error).partition(";")[0].replace(str(folder), "").strip()
        row = replace(row, status="failed", reason=reason, curve=_curve(config.output_dir))
    shutil.rmtree(folder / RUN, ignore_errors=True)
    return _finite(row)


def _finite(row: Row) -> Row:
    """Return a row that can be written: one with a loss that is no number has failed."""
    curve = tuple(point for point in row.curve if math.isfinite(point.loss))
    if len(curve) == len(row.curve):
        return row
    reason = row.reason or "the loss on the validation split is not finite"
    return replace(row, status="failed", reason=reason, curve=curve)


def environment() -> dict[str, str]:
    """Return what the last digits depend on, beside the settings: the machine, the threads and the packages."""
    return {
        "graftvit": version("graftvit"),
        "torch": torch.__version__,
        "timm": version("timm"),
        "machine": platform.machine(),
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
    }


def _processor() -> str:
    """Return the name of the processor, and the instructions that torch uses."""
    name = platform.processor()
    described = Path("/proc/cpuinfo")
    if described.exists():
        lines = described.read_text(errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name} {torch.backends.cpu.get_cpu_capability()}".strip()


def _row(bench: Bench, trial: Trial) -> Row:
    """Return the row of a trial without its measurements."""
    return Row(
        settings=bench.digest(trial.backbone, trial.data),
        program=trial.program,
        hash=trial.hash,
        name=trial.name,
        backbone=trial.backbone,
        data=trial.data,
        seed=trial.seed,
        local=trial.local,
        recipe=bench.recipe,
        environment=environment(),
    )


def _measured(row: Row, run: Path) -> Row:
    """Return the row with the curve of a finished run, and with the cost of its model."""
    loaded = load_pretrained(f"local-dir:{run / 'student'}")
    model = loaded.model.eval()
    images = torch.zeros(BATCH, *loaded.preprocessing.input_size)
    timing = time_steps({"model": step_of(lambda: model(images))}, ROUNDS, torch.device("cpu"))["model"]
    return replace(
        row,
        curve=_curve(run),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=sum(attention_macs(model)) + other_macs(model),
        latency=round(1e3 * timing.median / BATCH, 4),
    )


def _curve(run: Path) -> tuple[Point, ...]:
    """Return the score after each epoch that was evaluated."""
    return tuple(
        Point(int(record["epoch"]) + 1, float(record["test_top1"]), float(record["test_loss"]))
        for record in read_records(run / "log.jsonl")
        if "test_top1" in record and record["step"] > 0
    )


@dataclass(frozen=True)
class ProgramCell:
    """The trials of one program, which one process runs."""

    bench: Bench
    trials: tuple[Trial, ...]
    folder: Path
    threads: int = 1
    needs: Path | None = None

    def __str__(self) -> str:
        return self.trials[0].name or self.trials[0].program

    def state(self) -> State:
        """Return how far it is. Raises ConfigError: a trial was run with other settings."""
        states = {self._state(trial) for trial in self.trials}
        if states == {"done"}:
            return "done"
        return "to do" if states == {"to do"} else "begun"

    def run(self) -> int | None:
        """Run the trials that have no record; returns the signal that stopped one before its end."""
        torch.set_num_threads(self.threads)
        for trial in self.trials:
            folder = self.folder / trial.folder
            if self._state(trial) == "done":
                continue
            refuse_links(folder, self.folder.parent.parent)  # a run is deleted at its end
            folder.mkdir(parents=True, exist_ok=True)
            found = run_trial(self.bench, trial, folder)
            if not isinstance(found, Row):
                return found
            save_record(found, folder)
        return None

    def rows(self) -> list[Row]:
        """Return the records that are there."""
        found = (load_record(Row, self.folder / trial.folder) for trial in self.trials)
        return [row for row in found if row is not None]

    def _state(self, trial: Trial) -> State:
        settings = self.bench.digest(trial.backbone, trial.data)
        return cell_state(self.folder / trial.folder, settings, flag="--output_dir")


def list_cells(bench: Bench, trials: Sequence[Trial], out: Path, threads: int) -> list[ProgramCell]:
    """Return a cell for each program, in the order of the trials."""
    groups = [tuple(group) for _, group in itertools.groupby(trials, lambda trial: trial.program)]
    cells = out.resolve() / "cells"
    return [ProgramCell(bench, group, cells / group[0].hash, threads) for group in groups]


def run_bench(
    bench: Bench,
    trials: Sequence[Trial],
    out: Path,
    *,
    processes: int,
    threads: int,
    tell: Callable[[str], None],
) -> list[Row]:
    """Run the trials that have no record in `out`, and return the rows of all records there, also of earlier calls.

    Raises:
        StoppedError: on SIGINT, SIGTERM or SIGUSR2, after saving.
        RunFailedError: a cell failed, other than by a loss that is not finite; its log is named.
        ConfigError: `out` has a trial with other settings.
    """
    cells = list_cells(bench, trials, out, threads)
    left = [cell for cell in cells if cell.state() != "done"]
    tell(f"{len(trials)} trials of {len(cells)} programs; {len(cells) - len(left)} programs are done")
    start, ended = time.monotonic(), 0

    def finish(cell: ProgramCell) -> None:
        nonlocal ended
        ended += 1
        seconds = (time.monotonic() - start) / ended * (len(left) - ended)
        tell(f"[{ended}/{len(left)}] {_outcome(cell)}; {seconds / 60:.0f} min to go")

    run_in_processes(cells, processes, look=lambda running: None, finish=finish)
    return _all_rows(out)


def _all_rows(out: Path) -> list[Row]:
    found = (load_record(Row, path.parent) for path in (out / "cells").glob(f"*/*/{CELL_FILE}"))
    return [row for row in found if row is not None]


def _outcome(cell: ProgramCell) -> str:
    rows = cell.rows()
    scores = [f"{row.top1:.1f}" for row in rows if row.top1 is not None]
    reasons = [row.reason for row in rows if row.reason]
    return f"{cell}: {', '.join([*scores, *reasons[:1]])}"


# Run a sample of rows again, and compare.


def pick_sample(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """Return some rows in order, drawn with a seed; all if there are fewer."""
    chosen = sorted(Random(seed).sample(range(len(rows)), min(count, len(rows))))
    return [rows[place] for place in chosen]


def verify_rows(bench: Bench, rows: Sequence[Row], tell: Callable[[str], None]) -> list[str]:
    """Run each row again and return what disagrees, in words; `tell` gets a line for each row.

    It has the threads of the row, or as many as there are processors.

    Raises ConfigError: a row is of other settings than the benchmark. RunFailedError: a signal stopped it.
    """
    for row in rows:
        if row.backbone not in bench.settings.backbones or row.data not in bench.settings.data:
            raise ConfigError(
                f"{bench.recipe} has no {row.backbone} with {row.data}, as the row of {describe(row)}"
            )
        if row.settings != bench.digest(row.backbone, row.data):
            raise ConfigError(
                f"{describe(row)} was run with other settings than those of {bench.recipe}; give its --config"
            )
    found, threads = [], torch.get_num_threads()
    try:
        for row in rows:
            torch.set_num_threads(min(row.threads, os.cpu_count() or 1))
            new = _again(bench, row)
            why = disagreement(row, new)
            same = "bit for bit" if new.environment == row.environment else "within the tolerance"
            tell(f"{describe(row)}: {why or f'agrees {same}'}")
            if why:
                found.append(f"{describe(row)}: {why}")
    finally:
        torch.set_num_threads(threads)
    return found


def _again(bench: Bench, row: Row) -> Row:
    trial = Trial(row.program, row.backbone, row.data, row.seed, row.local)
    with tempfile.TemporaryDirectory() as folder:
        new = run_trial(bench, trial, Path(folder))
    if not isinstance(new, Row):
        raise RunFailedError(f"stopped by signal {new} while {describe(row)} ran again")
    return new
