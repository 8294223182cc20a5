"""What a benchmark measures, one row a case, and the file that keeps them."""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import TypeAdapter, ValidationError

from ....checkpoints.atomic import write_text
from ....checkpoints.files import read_regular
from ....models.errors import CheckpointError, ConfigError
from ...cells.records import State
from ..report.tables import to_csv, to_json

Kind = Literal["operators", "models"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SOFTMAX = "softmax"
RESULTS = "results.json"


@dataclass(frozen=True)
class Case:
    """What is measured: an operator on its own, or a model converted by a plan."""

    kind: Kind
    name: str
    """Operator with its options, or plan."""
    source: str
    """Of a model; of an operator its layer, such as `6 heads of 64`."""
    size: int
    """Patch tokens of an operator, image side in pixels of a model."""
    batch: int
    dtype: str
    device: str
    backward: bool = False
    compiled: bool = False
    peers: bool = False
    """Beside its straight-line form and its public implementation."""
    without: tuple[str, ...] = ()
    """Parts of a pyramid's layers that the conversion gives up."""

    @property
    def beside(self) -> str:
        """What it is timed in turn with."""
        return "softmax" if self.kind == "operators" else "unconverted"

    @property
    def setting(self) -> str:
        """All but name and size."""
        return f"{self.source}, {self._how}"

    @property
    def size_text(self) -> str:
        return f"{self.size:,} tokens" if self.kind == "operators" else f"{self.size} px"

    def __str__(self) -> str:
        source = "" if self.kind == "operators" else f"{self.source}, "
        return f"{self.name}, {source}{self.size_text}, {self._how}"

    @property
    def _how(self) -> str:
        mode = "forward and backward" if self.backward else "forward"
        ways = [mode, *["compiled"] * self.compiled, *(f"without {part}" for part in self.without)]
        return ", ".join([f"batch {self.batch}", self.dtype, self.device, *ways])


@dataclass(frozen=True)
class Ways:
    """In which ways each operator or model is measured: every combination of them."""

    batches: Sequence[int] = (1,)
    dtypes: Sequence[str] = ("float32",)
    device: str = "cpu"
    backward: bool = False
    """The backward pass, too."""
    compiled: bool = False
    """Compiled, too."""
    peers: bool = False
    """Each beside its straight-line form and its public implementation."""
    without: tuple[str, ...] = ()
    """Parts of a pyramid's layers that conversions give up."""

    def cases(
        self, kind: Kind, names: Sequence[str], sources: Sequence[str], sizes: Sequence[int]
    ) -> list[Case]:
        """Return every combination, small sizes first."""
        return [
            Case(
                kind,
                name,
                source,
                size,
                batch,
                dtype,
                self.device,
                backward,
                compiled,
                self.peers,
                self.without,
            )
            for size in sorted(sizes)
            for source in sources
            for batch in self.batches
            for dtype in self.dtypes
            for backward in ([False, True] if self.backward else [False])
            for compiled in ([False, True] if self.compiled else [False])
            for name in names
        ]


@dataclass(frozen=True)
class Row:
    """The numbers of a case; seconds are of one call, quartiles in `low` and `high`."""

    case: Case
    median: float
    low: float
    high: float
    softmax: float
    """Median seconds of fused softmax attention, or of the unconverted model, timed in the same rounds."""
    peak_bytes: int
    macs: int
    """Multiply-adds of one image by the operators' own account, attention alone."""
    counted_macs: int
    """The same by torch's counter; for a model, what its counter gives with the rest of the model left out."""
    load: float
    """Load average of the machine over the last minute."""
    straight: float | None = None
    """Median seconds of the straight-line form of the operator's equation, timed in the same rounds."""
    public: float | None = None
    """Median seconds of its public implementation, timed in the same rounds."""
    package: str = ""
    """The package of the public implementation."""
    cpu: float | None = None
    """Median seconds of processor time of a call, all threads together; None in results of older versions."""
    softmax_cpu: float | None = None
    """The same of softmax, or of the unconverted model."""

    @property
    def ratio(self) -> float:
        """How many times as fast as softmax, or as the unconverted model."""
        return self.softmax / self.median


DRIFT = 1.25
"""How many times as slow or fast as in the other rows of its setting the reference of a row may be."""


def drifted(rows: Iterable[Row]) -> list[Row]:
    """Return the rows whose reference (softmax, or the unconverted model) took another time than in the others.

    It is the same work in all rows of a size and setting, so the machine was busy with something else in one of them.
    """
    groups: dict[Case, list[Row]] = {}
    for row in rows:
        groups.setdefault(dataclasses.replace(row.case, name="", peers=False), []).append(row)
    return [
        row
        for group in groups.values()
        for row in group
        if not 1 / DRIFT <= row.softmax / statistics.median(each.softmax for each in group) <= DRIFT
    ]


@dataclass
class Results:
    """The rows of one kind on one machine."""

    kind: Kind
    machine: str
    rows: list[Row] = field(default_factory=list)

    def state(self, case: Case) -> State:
        """Return how far a case is."""
        return "done" if any(row.case == case for row in self.rows) else "to do"

    def save(self, folder: Path) -> None:
        """Write `results.json` and `results.csv`, each whole or not at all."""
        write_text(folder / RESULTS, to_json(dataclasses.asdict(self)))
        case_names, (_, *numbers) = ([one.name for one in dataclasses.fields(kind)] for kind in (Case, Row))
        unsteady = drifted(self.rows)
        rows = [
            [
                *dataclasses.astuple(row.case),
                *(getattr(row, name) for name in numbers),
                f"{row.ratio:.4f}",
                row in unsteady,
            ]
            for row in self.rows
        ]
        write_text(folder / "results.csv", to_csv([*case_names, *numbers, "ratio", "drifted"], rows))


def load_results(folder: Path, kind: Kind) -> Results:
    """Return the results in `folder`, empty ones where it has no file.

    Raises ConfigError: the file is of another type, another kind, or another machine.
    """
    path = folder / RESULTS
    if not path.exists():
        return Results(kind, machine())
    found = read_results(path)
    if (found.kind, found.machine) != (kind, machine()):
        raise ConfigError(
            f"--out: {path} has {found.kind} on {found.machine}, and this is {kind} on {machine()}; "
            "name another folder, or drop these results with --force"
        )
    return found


def read_results(path: Path) -> Results:
    """Return the results of a file, from any machine. Raises ConfigError: the file is of another type."""
    try:
        return TypeAdapter(Results).validate_json(read_regular(path))
    except (CheckpointError, ValidationError) as error:
        raise ConfigError(f"--out: {path} is no file of benchmark results; name another folder") from error


def machine() -> str:
    """Return processor, threads and torch in one line."""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    threads = f"threads: {torch.get_num_threads()}, CPU cores: {os.cpu_count()}"
    return f"{gpu}{threads}, {platform.machine()}, torch {torch.__version__.split('+')[0]}"


def load_average() -> float:
    """Return how many processes wanted to run over the last minute; 0 where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
