"""`log.jsonl` of a run folder: one JSON object per interval and one per epoch."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from torch import Tensor, nn

from ...checkpoints.atomic import write_bytes
from ...checkpoints.files import append_line, open_lines, parse_record, read_lines
from ...models.errors import ConfigError, Json, JsonDict, RunFailedError, did_you_mean, one_sentence
from ..metrics.measure import LAYER as LAYER_METRIC
from .parallel import local

if TYPE_CHECKING:
    from rich.progress import Progress

# Measure how long a process waits: the clock of a record, and the exposed gradient communication of DDP.

NANOSECONDS = 1e-9


@dataclass
class Clock:
    """Times and counts since the last record of a kind, by the clock of this process."""

    start: float = field(default_factory=lambda: time.perf_counter())
    images: int = 0
    steps: int = 0
    waited: float = 0.0
    """Seconds without a batch from the loader."""
    exposed: list[float] = field(default_factory=list)
    """Seconds of communication after the backward pass, in the steps that were timed."""

    def readings(self) -> dict[str, float]:
        """Return the seconds, and unless no step was timed, images per second and the shares of time spent waiting."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        readings = {"seconds": round(seconds, 3)}
        if self.steps:
            readings["images_per_second"] = round(self.images / seconds, 1)
            readings["data_wait"] = round(min(1.0, self.waited / seconds), 3)
        if self.exposed and self.steps:
            share = sum(self.exposed) / len(self.exposed) * self.steps / seconds
            readings["comm_wait"] = round(min(1.0, share), 3)
        return readings


class CommunicationTimer:
    """DDP's own timing of a step: how long its gradient exchange continued after the backward pass.

    DDP times its first ten steps and then one in `every`. It reads the times from the device at the start of the next
    step; if `every` is the interval of the log, the log has waited for the device there anyway. FSDP and a single
    process have no such times.
    """

    def __init__(self, model: nn.Module, every: int) -> None:
        self._model = model
        self._seen = 0
        choose = getattr(model, "_set_ddp_runtime_logging_sample_rate", None)
        if choose is not None:
            choose(every)

    def seconds(self) -> float | None:
        """Return the seconds of the last timed step; None if no step was timed since the last call."""
        read = getattr(self._model, "_get_ddp_logging_data", None)
        timed: JsonDict = {} if read is None else read()
        total, hidden = timed.get("backward_comm_time"), timed.get("backward_compute_comm_overlap_time")
        step = timed.get("iteration", 0)
        if total is None or hidden is None or step == self._seen:
            return None
        self._seen = step
        return float(max(0, total - hidden)) * NANOSECONDS


# Mean losses and a check for non-finite losses, without waiting for the device.


def stacked(losses: Mapping[str, Tensor]) -> Tensor:
    """Return the scalars of `losses` as one detached float32 vector, in their order."""
    return torch.stack([loss.detach().float() for loss in losses.values()])


class Meters:
    """Running sums of named scalars. They are in the saved state, because a restart may interrupt an interval."""

    def __init__(self, device: torch.device) -> None:
        # float64: an epoch adds thousands of values. MPS has no float64.
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Clear the sums."""
        self.count = 0
        self.names: tuple[str, ...] = ()
        self.sums = torch.zeros(0, dtype=self._dtype, device=self._device)

    @torch.no_grad()
    def add(self, names: Sequence[str], values: Tensor) -> None:
        """Add one value of each named loss, the same names each time, without waiting for the device."""
        if not self.count:
            self.names, self.sums = tuple(names), torch.zeros_like(values, dtype=self._dtype)
        self.count += 1
        self.sums = self.sums + values

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over steps and processes. Synchronizes."""
        if not self.count:
            return {}
        sums = accelerator.reduce(self.sums, reduction="sum").tolist()
        total = self.count * accelerator.num_processes
        return {name: value / total for name, value in zip(self.names, sums, strict=True)}

    def load(self, count: int, names: Sequence[str], sums: Tensor) -> None:
        """Restore `count`, `names` and `sums`."""
        self.count, self.names = count, tuple(names)
        self.sums = sums.to(self._device, self._dtype)


NEVER = 2**62


class LossHealth:
    """The first step at which each part of the loss was not finite, kept on the device until asked for."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._first: Tensor | None = None

    @torch.no_grad()
    def record(self, step: int, names: Sequence[str], values: Tensor) -> None:
        """Record which of `values` are not finite at `step`, without waiting for the device."""
        if self._first is None:
            self._names, self._first = tuple(names), torch.full_like(values, NEVER, dtype=torch.int64)
        self._first = torch.where(torch.isfinite(values), self._first, self._first.clamp(max=step))

    def failures(self, accelerator: Accelerator) -> dict[str, int]:
        """Return the first step of each failed part on any process, equal on all processes. Synchronizes."""
        if self._first is None:
            return {}
        first = self._first.clone()
        if accelerator.num_processes > 1:
            dist.all_reduce(first, op=dist.ReduceOp.MIN)
        return {name: step for name, step in zip(self._names, first.tolist(), strict=True) if step < NEVER}


def describe(failures: Mapping[str, int]) -> str:
    """Describe the first failed step and its parts. Name the total only if no part explains it."""
    step = min(failures.values())
    parts = [name for name, first in failures.items() if first == step]
    explained = [name for name in parts if name not in ("loss", "transfer")]
    return f"the loss is not finite at step {step} (in {', '.join(explained or parts)})"


@torch.no_grad()
def weights_finite(model: nn.Module, accelerator: Accelerator) -> bool:
    """Return whether every floating-point weight is finite on all processes. Synchronizes; call it before a save.

    A gradient can overflow while the loss is finite: the weights are then bad one step before the loss.
    """
    held = [local(tensor) for tensor in model.state_dict().values()]
    floats = [tensor for tensor in held if tensor.is_floating_point() and tensor.numel()]
    bad = torch.zeros((), device=accelerator.device)
    if floats:
        norms = torch.stack(torch._foreach_norm(floats, ord=float("inf")))
        bad = (~torch.isfinite(norms)).any().float()
    return float(accelerator.reduce(bad, reduction="sum")) == 0


# The progress bar of a run, on a terminal only.

SHOWN_PARTS = 6
"""With more losses, the losses of single layers appear only in the log."""
NOTABLE_WAIT = 0.1
"""The share of time spent waiting for data above which the line shows it."""


class ProgressBar:
    """Steps done and time left; below, losses, learning rate and images per second.

    The step count changes with each step, without synchronization; the numbers change with each log record. They have a
    second line, because one line would be too wide for most terminals.
    """

    def __init__(self, total: int, *, shown: bool, done: int = 0, name: str = "epoch 0") -> None:
        self._numbers = ""
        self._bar: Progress | None = None
        if not (shown and sys.stdout.isatty()):
            return
        from rich.console import Group  # here: a job has no terminal
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.text import Text

        bar = self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
        )
        self._task = bar.add_task(name, total=total, completed=done)
        self._live = Live(get_renderable=lambda: Group(bar, Text(self._numbers, style="dim")))

    def __enter__(self) -> ProgressBar:
        if self._bar is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._live.stop()

    def step(self, done: int, epoch: int) -> None:
        """Show that `done` optimizer steps are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=f"epoch {epoch}")

    def advance(self, count: int) -> None:
        """Show that `count` more are done."""
        if self._bar is not None:
            self._bar.advance(self._task, count)

    def show(self, record: Mapping[str, float]) -> None:
        """Show the numbers of a log record."""
        self._numbers = numbers(record)


LAYER = re.compile(r"(.*\.)?layer\d+")
"""Name of the loss of one layer."""


def numbers(record: Mapping[str, float]) -> str:
    """Return the line under the bar: losses, learning rate, images per second, and a long wait for data."""
    losses = {key.removeprefix("train_"): value for key, value in record.items() if key.startswith("train_")}
    if len(losses) > SHOWN_PARTS:
        losses = {name: value for name, value in losses.items() if not LAYER.fullmatch(name)}
    text = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
    text = f"{text}  lr {record['lr']:.2e}"
    if "images_per_second" in record:
        text = f"{text}  {record['images_per_second']:.0f} img/s"
    waiting = record.get("data_wait", 0.0)
    return f"{text}  {waiting:.0%} waiting for data" if waiting > NOTABLE_WAIT else text


logger = logging.getLogger(__name__)

WALL_CLOCK = ("seconds", "images_per_second", "data_wait", "comm_wait", "peak_memory_gib")
"""The keys that depend on the clock or the device. All others are equal bit for bit in a resumed run."""


class RunLog:
    """Append records. A state stores their number, so that a resumed run can drop the records after it.

    Each write is inside a `guard`, which raises if another attempt has taken over the run. The file is opened once, so
    a replaced attempt still writes into the old file, which `keep` has replaced.
    """

    def __init__(self, path: Path, guard: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self.path = path
        self.records = 0
        self._guard = guard
        self._file: BinaryIO | None = None

    def append(self, record: Json) -> None:
        """Write one record immediately. Raise RunFailedError if the disk fails."""
        with self._writing():
            if self._file is None:
                self._file = open_lines(self.path)
            append_line(self._file, json.dumps(record))
        self.records += 1

    def sync(self) -> None:
        """Flush the records to the disk; called before a state is written. Raise as `append`."""
        if self._file is not None:
            with self._writing():
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with suppress(OSError):  # `append` has reported a full disk
                self._file.close()
            self._file = None

    def keep(self, records: int) -> None:
        """Keep the first `records` records and drop the rest, in one atomic replacement. Warn of lost and cut ones.

        Raises CheckpointError: the log is no regular file.
        """
        with self._writing():
            self.close()
            lines = read_lines(self.path) if self.path.exists() else []
            kept = [line + b"\n" for line in lines[:records] if parse_record(line) is not None]
            write_bytes(self.path, b"".join(kept))
        self.records = len(kept)
        if self.records < records:
            logger.warning(
                "%s has %d of the %d records up to the resumed state; the others were cut or lost, as by a crash, and "
                "are not written again: `graftvit evaluate` measures the student again",
                self.path,
                self.records,
                records,
            )
        elif any(parse_record(line) is None for line in lines[records:]):
            logger.warning("%s: dropped a line after the resumed state, which is no whole record", self.path)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._guard():
            try:
                yield
            except OSError as error:
                raise RunFailedError(
                    f"{self.path} cannot be written: {error.strerror}; the last saved state is intact"
                ) from error


# Write the numbers of a run to log.jsonl, the trackers and the progress bar. Only the first process writes.


class Recorder:
    """Add the times of the clock to each record and pass it on."""

    def __init__(
        self,
        log: RunLog,
        trackers: list[GeneralTracker],
        bar: ProgressBar,
        *,
        writes: bool,
        name: str | None = None,
    ) -> None:
        """`name`: what the terminal shows before each record, where several runs take turns."""
        self.log = log
        self._trackers = trackers
        self._bar = bar
        self._writes = writes
        self._name = "" if name is None else f"{name}: "
        self._clocks: dict[str, Clock] = {}
        self.communication: Callable[[], float | None] = lambda: None
        """Return the seconds of exposed communication of a step timed since the last call, or None."""

    def start(self, kind: str) -> None:
        """Start the clock of `kind` (interval or epoch)."""
        self._clocks[kind] = Clock()

    def images(self, count: int) -> None:
        """Count the images of a step, over all processes."""
        for clock in self._clocks.values():
            clock.images += count

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clocks inside the block: evaluating and saving are not training."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            for clock in self._clocks.values():
                clock.start += time.perf_counter() - begin

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside the block as waiting for the loader."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            for clock in self._clocks.values():
                clock.waited += time.perf_counter() - begin

    def step(self, done: int, epoch: int) -> None:
        """Note that a step is done."""
        for clock in self._clocks.values():
            clock.steps += 1
        self._bar.step(done, epoch)

    def write(self, kind: str, record: Json) -> None:
        """Write a record with the readings of its clock (`Clock.readings`), and restart the clock."""
        exposed = self.communication()
        for clock in self._clocks.values():
            clock.exposed += [] if exposed is None else [exposed]
        full = {**record, **self._clocks[kind].readings()}
        self.start(kind)
        self.plain(full)
        if kind == "interval":
            self._bar.show(full)

    def plain(self, record: Json) -> None:
        """Write a record unchanged."""
        if not self._writes:
            return
        self.log.append(record)
        shown = {
            key: value
            for key, value in record.items()
            if not (key.startswith("test_") and LAYER_METRIC in key)
        }
        logger.info("%s%s", self._name, "  ".join(f"{key} {_short(value)}" for key, value in shown.items()))
        for tracker in self._trackers:
            tracker.log(
                {key: value for key, value in record.items() if key != "step"}, step=int(record["step"])
            )

    def describe(self, hyperparameters: Json) -> None:
        """Send the settings of the run to the trackers."""
        for tracker in self._trackers:
            tracker.store_init_configuration(dict(hyperparameters))

    def finish(self) -> None:
        """Close the trackers."""
        for tracker in self._trackers:
            tracker.finish()


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return the most memory of a GPU, in GiB, that tensors held at once in this process; empty on a CPU."""
    if device.type != "cuda":
        return {}
    return {"peak_memory_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 3)}


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


# Experiment trackers of accelerate. A tracker is called as its package.

HELP = {"wandb": ": `wandb login` once, or WANDB_MODE=offline where there is no network"}


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise ConfigError for a tracker that accelerate does not know, or whose package is not installed."""
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(
                f"engine.trackers={name} is no tracker of accelerate; {did_you_mean(name, LOGGER_TYPE_TO_CLASS)}"
            )
        if name not in map(str, get_available_trackers()):
            raise ConfigError(f"engine.trackers asks for {name}, which is not installed: pip install {name}")


def create_trackers(names: tuple[str, ...], folder: Path, run_id: str, step: int) -> list[GeneralTracker]:
    """Create the trackers of a run at `step`, and drop what an earlier attempt logged after it.

    A tracker that lets its caller choose the name of a record continues the record of the attempt before.

    Raises ConfigError: a tracker is unknown, its package is missing, or it does not start.
    """
    check_trackers(names)
    named = {"id": run_id, "resume": "allow"}
    arguments: dict[str, JsonDict] = {
        "tensorboard": {"purge_step": step + 1},
        "wandb": {"name": folder.name, "dir": str(folder), **named},
        "swanlab": {"experiment_name": folder.name, "logdir": str(folder / "swanlab"), **named},
        "trackio": {"name": f"{folder.name}-{run_id}", "resume": "allow"},
        "comet_ml": {"experiment_key": run_id},
        "dvclive": {"dir": str(folder / "dvclive"), "resume": True},
        "mlflow": {"run_name": folder.name},
        "clearml": {"task_name": folder.name},
    }
    trackers: list[GeneralTracker] = []
    for name in names:
        kind = LOGGER_TYPE_TO_CLASS[name]
        place = [folder] if kind.requires_logging_directory else []
        project = name if name == "tensorboard" else "graftvit"  # TensorBoard's is the folder of its files
        trackers.append(kind(project, *place, **arguments.get(name, {})))
    for tracker in trackers:
        _start(tracker)
    return trackers


def _start(tracker: GeneralTracker) -> None:
    try:
        tracker.start()
    except (
        Exception
    ) as error:  # trackers raise their own errors: no key, no network, a folder that cannot be written
        raise ConfigError(
            f"engine.trackers={tracker.name} does not start ({one_sentence(str(error))}){HELP.get(tracker.name, '')}"
        ) from error


def hyperparameters(settings: JsonDict, **extra: float) -> JsonDict:
    """Return the run's settings as the flat scalars that trackers accept."""
    flat: JsonDict = dict(extra)
    for section, values in settings.items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            name = f"{section}.{key}" if key else section
            flat[name] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
