"""What a benchmark measures, one row a case, and the file that keeps them."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ....checkpoints.atomic import write_file
from ....models.errors import ConfigError

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

    def describe(self) -> str:
        size = f"{self.size:,} tokens" if self.kind == "operators" else f"{self.source}, {self.size} px"
        mode = "forward and backward" if self.backward else "forward"
        ending = ", compiled" if self.compiled else ""
        return f"{self.name}, {size}, batch {self.batch}, {self.dtype}, {self.device}, {mode}{ending}"


@dataclass(frozen=True)
class Row:
    """The numbers of a case; seconds are of one call, quartiles in `low` and `high`."""

    case: Case
    median: float
    low: float
    high: float
    softmax: float
    """Median seconds of fused softmax attention, timed in the same rounds."""
    peak_bytes: int
    macs: int
    """Multiply-adds of one image by the operators' own account, attention alone."""
    counted_macs: int
    """The same by torch's counter; for a model, what its counter gives with the rest of the model left out."""
    load: float
    """Load average of the machine over the last minute."""

    @property
    def ratio(self) -> float:
        """How many times as fast as softmax."""
        return self.softmax / self.median


@dataclass
class Results:
    """The rows of one kind on one machine."""

    kind: Kind
    machine: str
    rows: list[Row] = field(default_factory=list)

    def has(self, case: Case) -> bool:
        return any(row.case == case for row in self.rows)

    def save(self, folder: Path) -> None:
        """`results.json` and `results.csv`, each whole or not at all."""
        document = dataclasses.asdict(self)
        write_text(folder / RESULTS, json.dumps(document, indent=1) + "\n")
        write_text(folder / "results.csv", _csv(self.rows))


def load_results(folder: Path, kind: Kind) -> Results:
    """The results in `folder`, none where it has no file.

    Raises ConfigError: the file is none of this kind, or of another machine.
    """
    path = folder / RESULTS
    if not path.exists():
        return Results(kind, machine())
    found = read_results(path)
    if (found.kind, found.machine) != (kind, machine()):
        raise ConfigError(
            f"--out: {path} has {found.kind} on {found.machine}, and this is {kind} on {machine()}; "
            "name another folder, or measure anew with --force"
        )
    return found


def read_results(path: Path) -> Results:
    """The results of a file, from any machine. Raises ConfigError: it is no such file."""
    try:
        document = json.loads(path.read_text())
        rows = [_row(row) for row in document["rows"]]
        return Results(document["kind"], document["machine"], rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--out: {path} is no file of benchmark results; name another folder") from error


def machine() -> str:
    """Processor, threads and torch in one line."""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    threads = f"threads: {torch.get_num_threads()}, CPU cores: {os.cpu_count()}"
    return f"{gpu}{threads}, {platform.machine()}, torch {torch.__version__.split('+')[0]}"


def load_average() -> float:
    """Processes that wanted to run, over the last minute; 0 where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all. Raises WriteFailedError as `write_file`."""
    write_file(path, lambda temporary: _write(temporary, text), size=len(text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _row(values: Mapping[str, Any]) -> Row:
    return Row(**{**values, "case": Case(**values["case"])})


def _csv(rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    cases = [one.name for one in dataclasses.fields(Case)]
    numbers = [one.name for one in dataclasses.fields(Row) if one.name != "case"]
    writer.writerow([*cases, *numbers, "ratio"])
    for row in rows:
        values = [*(getattr(row.case, name) for name in cases), *(getattr(row, name) for name in numbers)]
        writer.writerow([*values, f"{row.ratio:.4f}"])
    return text.getvalue()
