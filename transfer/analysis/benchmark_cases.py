"""What a benchmark measures, one row a case, and the file that keeps them."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Literal

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from ...checkpoints.architecture import build, check_name
from ...checkpoints.atomic import write_text
from ...checkpoints.files import read_regular
from ...checkpoints.pretrained import load_pretrained
from ...checkpoints.sources import TimmSource, parse_source
from ...models.attention.base import Accounting, Operations
from ...models.conversion import convert, plan_of
from ...models.cost import OperationCount, count_operations
from ...models.errors import CheckpointError, ConfigError
from ...models.families import find_family
from ..cells import State
from .report.tables import Table, tabulate, to_json

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
        groups.setdefault(dataclasses.replace(row.case, name=""), []).append(row)
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
        unsteady = drifted(self.rows)
        columns: dict[str, Callable[[Row], object]] = {
            **{each.name: attrgetter(f"case.{each.name}") for each in dataclasses.fields(Case)},
            **{each.name: attrgetter(each.name) for each in dataclasses.fields(Row)[1:]},
            "ratio": lambda row: f"{row.ratio:.4f}",
            "drifted": lambda row: row in unsteady,
        }
        write_text(folder / RESULTS, to_json(dataclasses.asdict(self)))
        write_text(folder / "results.csv", tabulate(self.rows, columns).to_csv())


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
            f"--output_dir: {path} has {found.kind} on {found.machine}, and this is {kind} on {machine()}; "
            "name another folder, or drop these results with --force"
        )
    return found


def read_results(path: Path) -> Results:
    """Return the results of a file, from any machine. Raises ConfigError: the file is of another type."""
    try:
        return TypeAdapter(Results).validate_json(read_regular(path))
    except (CheckpointError, ValidationError) as error:
        raise ConfigError(
            f"--output_dir: {path} is no file of benchmark results; name another folder"
        ) from error


def machine() -> str:
    """Return processor, threads and torch in one line."""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    threads = f"threads: {torch.get_num_threads()}, CPU cores: {os.cpu_count()}"
    return f"{gpu}{threads}, {platform.machine()}, torch {torch.__version__.split('+')[0]}"


def load_average() -> float:
    """Return how many processes wanted to run over the last minute; 0 where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


# What the multiplications and additions of models cost in energy and in chip area.

BIASES = ("relative_position_bias_table", "cpb_mlp.0.weight")


@dataclass(frozen=True)
class Prices:
    """Energy in pJ and area in µm² of one operation, by default of a 32-bit float at 45 nm (Horowitz, ISSCC 2014)."""

    multiplication_pj: float = 3.7
    addition_pj: float = 0.9
    multiplication_area: float = 7700.0
    addition_area: float = 4184.0

    def energy(self, operations: Operations) -> float:
        """Return the energy in pJ."""
        return self.multiplication_pj * operations.multiplications + self.addition_pj * operations.additions

    def area(self, operations: Operations) -> float:
        """Return the area in µm² of a circuit that has a unit for each operation."""
        return (
            self.multiplication_area * operations.multiplications + self.addition_area * operations.additions
        )


@dataclass(frozen=True)
class EnergyRow:
    """A model and its operations for one image."""

    source: str
    plan: str
    count: OperationCount


def energy_rows(
    sources: Sequence[str], plans: Sequence[str], img_size: int | None, accounting: Accounting
) -> list[EnergyRow]:
    """Count each source as it is, and converted by each plan. A timm name is built without weights.

    Raises GraftError: a source is not there, a plan is invalid, or a model's attention is not known.
    """
    rows = []
    for source in sources:
        model = _load(source, img_size)
        own = None if find_family(model) is None else plan_of(model)
        rows.append(EnergyRow(source, own or "as it is", count_operations(model, accounting)))
        for plan in plans:
            student = convert(model, plan, without=("bias",) if _gives_up(model) else ())
            rows.append(EnergyRow(source, plan, count_operations(student, accounting)))
    return rows


def energy_table(rows: Iterable[EnergyRow], prices: Prices) -> Table:
    """Return a line for each model: operations in billions, energy in mJ (10⁹ pJ) and area."""
    columns: dict[str, Callable[[EnergyRow], str]] = {
        "model": lambda row: row.source,
        "plan": lambda row: row.plan,
        "multiplications (G)": lambda row: _billions(row.count.total.multiplications),
        "additions (G)": lambda row: _billions(row.count.total.additions),
        "in attention (G)": lambda row: " + ".join(
            map(_billions, (row.count.attention.multiplications, row.count.attention.additions))
        ),
        "energy (mJ)": lambda row: _billions(prices.energy(row.count.total)),
        "area (m²)": lambda row: f"{prices.area(row.count.total) / 1e12:.4g}",
    }
    return tabulate(rows, columns)


def _billions(count: float) -> str:
    return f"{count / 1e9:.5g}"


def _load(source: str, img_size: int | None) -> nn.Module:
    found = parse_source(source)
    if not isinstance(found, TimmSource):
        return load_pretrained(source, img_size=img_size).model
    check_name(found.name)
    size = {} if img_size is None else {"img_size": img_size}
    return build(found.name.partition(".")[0], size, on_meta=True)


def _gives_up(model: nn.Module) -> bool:
    """Return whether a model has a relative position bias to give up, which a count does not need."""
    biased = any(name.endswith(BIASES) for name, _ in model.named_parameters())
    family = find_family(model)
    return biased and family is not None and "bias" in family.gives_up


# Time, peak memory and multiply-adds of a function, on a CPU or a GPU.

Step = Callable[[], object]
TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""glibc's numbers of the options of `mallopt`."""
SHORTEST = 5e-3
"""Seconds that a timing lasts at least: shorter steps are taken several times in a row."""
QUICK = 0.1
"""Seconds below which a call before each timing fills the caches, which are those of another step by then."""


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median of the rounds, and the first and third quartile."""

    median: float
    low: float
    high: float
    cpu: float | None = None
    """Median seconds of processor time of all threads of this process: what others on the machine do is not in it."""


def time_steps(
    steps: Mapping[str, Step], repeats: int, device: torch.device, warmup: int = 1
) -> dict[str, Timing]:
    """Return the timing of each step over `repeats` rounds, at least two.

    Rounds take every step in turn, so that a drift of the machine touches all alike. Before its timing, a quick step
    is called once: otherwise a step that follows one of other data would be slower than one that follows its like.
    """
    first = {name: _warm(step, warmup, device) for name, step in steps.items()}
    calls = {name: max(1, round(SHORTEST / max(seconds, 1e-7))) for name, seconds in first.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    worked: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(max(2, repeats)):
        for name, step in steps.items():
            if first[name] < QUICK:
                step()
            before = time.process_time()
            times[name].append(_seconds(step, calls[name], device) / calls[name])
            worked[name].append((time.process_time() - before) / calls[name])
    return {name: replace(_timing(times[name]), cpu=statistics.median(worked[name])) for name in steps}


def step_of(run: Callable[[], Tensor], leaves: Sequence[Tensor] = (), upstream: Tensor | None = None) -> Step:
    """Return the forward pass `run` as a step; with `leaves`, and the backward pass to them from `upstream`."""

    def forward() -> None:
        with torch.no_grad():
            run()

    def learn() -> None:
        torch.autograd.grad(run(), leaves, upstream, allow_unused=True)

    return learn if leaves else forward


def keep_freed_memory() -> None:
    """Let the C library keep memory that is freed, as torch does on a GPU. Nothing happens where it is not glibc.

    glibc returns large blocks, and memory at the end of its heap, to the system, and gets them back page by page in
    the next call, which can take longer than the call's arithmetic.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(TRIM_THRESHOLD, -1)  # however large it is
        library.mallopt(MMAP_MAX, 0)


def peak_bytes(step: Step, device: torch.device) -> int:
    """Return the most bytes allocated at once during a step, above what was allocated before it.

    On a GPU those that torch's allocator counts; on a CPU the running sum of the allocations and releases that
    torch's profiler sees, which has temporary buffers within torch's own kernels, but not within oneDNN's.
    """
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def _warm(step: Step, warmup: int, device: torch.device) -> float:
    """Warm up; return the seconds of a call."""
    for _ in range(max(1, warmup)):
        step()
    return _seconds(step, 1, device)


def _seconds(step: Step, calls: int, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        step()
    _synchronize(device)
    return time.perf_counter() - start


def _timing(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
