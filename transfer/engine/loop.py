"""The training loop: epochs, optimizer steps and step boundaries."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor

from ...checkpoints.preprocessing import Preprocessing
from ...models.errors import ConfigError, DataError, JsonDict, RunFailedError, counted
from ..config import RunConfig
from ..data.loaders import TrainLoader
from ..data.sampler import seed_batch
from .build import Parts
from .optim import Schedule, set_learning_rate
from .resume_check import Position
from .run_state import RunState, SaveClock
from .runlog import CommunicationTimer, LossHealth, Recorder, describe, peak_memory, stacked, weights_finite
from .scoring import best_value, score
from .signals import StopSignals
from .tasks import Task, check_learns

logger = logging.getLogger(__name__)

Batch = tuple[Any, ...]
"""What a task takes: images, labels and, where they are kept, the teachers' targets by name; or one `DenseBatch`."""


class SharedBatches:
    """The batches of several loops that take turns: each is read once, and the teachers run on it once.

    The batches of one step are kept, with what teachers gave for them. A loop behind the others reads its own again.
    """

    def __init__(
        self, loader: TrainLoader, spec: Preprocessing, accelerator: Accelerator, accum: int
    ) -> None:
        self.loader, self.spec, self.accelerator, self.accum = loader, spec, accelerator, accum
        self._batches: Iterator[Batch] = iter(())
        self._next: tuple[int, int] | None = None
        """The epoch and number of what `_batches` yields next."""
        self._kept: dict[tuple[int, int], tuple[Batch, list[tuple[object, object]]]] = {}

    def check(self, spec: Preprocessing, name: str) -> None:
        """Raise ConfigError where the student `name` takes other images."""
        if spec != self.spec:
            raise ConfigError(
                f"students.{name} takes images as {spec.described()}, and the first student as "
                f"{self.spec.described()}: all students of a run share their images, so give models that take the same"
            )

    def epoch(self, epoch: int, start: int) -> Iterator[Batch]:
        """Yield the batches of an epoch on the device, from batch `start`."""
        for number in itertools.count(start):
            batch = self._take((epoch, number))
            if batch is None:
                return
            yield batch

    def taught(self, task: Task, batch: Batch) -> Batch:
        """Return the batch that was yielded last, with what the teachers of a task give for it."""
        needs = task.needs(self.spec.input_size[1:])
        if needs is None:
            return batch
        for others, lesson in self._lessons:
            if others == needs:
                return (*batch, lesson)
        with self.accelerator.autocast():
            self._lessons.append((needs, task.teach(batch[0])))
        return (*batch, self._lessons[-1][1])

    def _take(self, place: tuple[int, int]) -> Batch | None:
        if place not in self._kept:
            if self._next != place:
                self._batches = self.loader.epoch(*place)
            self._next = (place[0], place[1] + 1)
            batch = next(self._batches, None)
            if batch is None:
                return None
            while len(self._kept) >= self.accum:
                del self._kept[next(iter(self._kept))]
            self._kept[place] = send_to_device(batch, self.accelerator.device, non_blocking=True), []
        batch, self._lessons = self._kept[place]
        return batch


@dataclass(frozen=True)
class LastBatch:
    """The last batch of this process, and what its random numbers depend on."""

    batch: Batch
    epoch: int
    place: int
    """Position of its first sample in the epoch's order."""


@dataclass
class Loop:
    """The training of a run from `position` to its end."""

    config: RunConfig
    accelerator: Accelerator
    parts: Parts
    run_state: RunState
    schedule: Schedule
    recorder: Recorder
    signals: StopSignals
    position: Position
    shared: SharedBatches | None = None
    """Where the batches come from, and what the teachers give for them, beside other loops."""

    def __post_init__(self) -> None:
        self.health = LossHealth()
        first = self.accelerator.is_main_process
        self.clock = SaveClock(self.config.engine.save_minutes if first else None)
        self.due = False
        """Whether the clock asked for a state that is not saved yet. All processes agree on it."""
        self._last: LastBatch | None = None

    @property
    def finished(self) -> bool:
        """Return whether the last step and the last evaluation are done."""
        return self._over and self.position.epoch_step == 0

    @property
    def _over(self) -> bool:
        """Return whether all steps are done, or `engine.patience` is exhausted."""
        patience = self.config.engine.patience
        exhausted = patience is not None and self.position.stale >= patience
        return exhausted or self.position.step >= self.schedule.total_steps

    def run(self) -> Generator[int, None, int | None]:
        """Train to the end, or until all processes agree on a stop signal; then save and return the signal.

        Yield before each step the number of steps done, so that several loops can take turns.
        """
        self.run_state.model.train()
        self.clock.restart()  # the teacher may have been evaluated before
        timer = CommunicationTimer(self.run_state.model, self.config.engine.log_interval)
        self.recorder.communication = timer.seconds
        for kind in self.run_state.meters:
            self.recorder.start(kind)
        while not self.finished:
            stopped = yield from self._epoch_steps()
            if stopped is not None:
                self._save()
                return stopped
            self._end_epoch()
        return None

    @property
    def _steps_left(self) -> bool:
        return (
            self.position.epoch_step < self.schedule.steps_per_epoch
            and self.position.step < self.schedule.total_steps
        )

    def last_batch(self) -> LastBatch:
        """Return the last batch of a run that is over; read it again where the run was resumed after its last step."""
        if self._last is None:
            step, epoch = self.position.step, self.position.epoch - 1
            self.position.epoch, self.position.epoch_step = (
                epoch,
                step - 1 - epoch * self.schedule.steps_per_epoch,
            )
            try:
                with closing(self._batches()) as batches:
                    *_, batch = (next(batches) for _ in range(self.schedule.accum))
                self._last = LastBatch(batch, epoch, self._place(self.schedule.accum - 1))
            finally:
                self.position.epoch, self.position.epoch_step = epoch + 1, 0
        return self._last

    def _epoch_steps(self) -> Generator[int, None, int | None]:
        """Do the remaining steps of this epoch. Return the signal that stopped them, or None."""
        self._last = None
        with closing(self._batches()) as batches:
            while self._steps_left:
                yield self.position.step
                self._step(batches)
                stopped, due = self.signals.agreed(save=self.clock.due())
                self.due |= due
                if self.position.step % self.config.engine.log_interval == 0:
                    self._write_interval()
                if stopped is not None:
                    return stopped
                if self._save_due and self._steps_left:
                    self._save()
        return None

    @property
    def _save_due(self) -> bool:
        """Return whether a state is due at this step, by the clock or by the number of steps."""
        every = self.config.engine.save_every
        return self.due or (every is not None and self.position.step % every == 0)

    def _batches(self) -> Generator[Batch, None, None]:
        """Yield the batches of this epoch on the device, from the position of the run."""
        start = self.position.epoch_step * self.schedule.accum
        loader, epoch = self.parts.train_loader, self.position.epoch
        source = self.shared or loader
        rows = self.parts.rows
        batches: Iterator[Batch] = (
            source.epoch(epoch, start) if rows is None else rows.batches(loader, epoch, start)
        )
        while True:
            with self.recorder.waiting():
                batch = next(batches, None)
            if batch is None:
                raise DataError(f"the data set ended in the middle of epoch {self.position.epoch}")
            batch = send_to_device(batch, self.accelerator.device, non_blocking=True)
            if rows is not None:
                batch = (*batch[:2], rows.form.unpack(batch[2]))
            yield batch if self.shared is None else self.shared.taught(self.parts.task, batch)

    def _step(self, batches: Iterator[Batch]) -> None:
        """Do one optimizer step over `accum` batches, without waiting for the device."""
        set_learning_rate(self.run_state.optimizer, self.schedule.rate(self.position.step))
        for index in range(self.schedule.accum):
            last = index == self.schedule.accum - 1
            with nullcontext() if last else self.accelerator.no_sync(self.run_state.model):
                batch = next(batches)
                self._backward(batch, index)
        place = self._place(self.schedule.accum - 1)
        if self.config.optim.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.parts.task.parameters(), self.config.optim.clip_grad)
        self.run_state.optimizer.step()
        self.run_state.optimizer.zero_grad()
        if self.run_state.average is not None:
            self.run_state.average.update()
        self.position.step += 1
        self.position.epoch_step += 1
        if not self._steps_left:  # of an epoch, which may be the last one
            self._last = LastBatch(batch, self.position.epoch, place)
        self.recorder.step(self.position.step, self.position.epoch)

    def _backward(self, batch: Batch, index: int) -> None:
        """Add the gradients of batch `index` of this step."""
        seed_batch(self.config.seed, self.position.epoch, self._place(index), self.accelerator.device)
        with self.accelerator.autocast():
            losses: dict[str, Tensor] = self.run_state.model(*batch)
        check_learns(losses["loss"])
        self.accelerator.backward(losses["loss"] / self.schedule.accum)
        names, values = tuple(losses), stacked(losses)
        self.health.record(self.position.step + 1, names, values)
        for meter in self.run_state.meters.values():
            meter.add(names, values)
        self.recorder.images(len(batch[0]) * self.accelerator.num_processes)

    def _place(self, index: int) -> int:
        """Return the position in the epoch's order of the first sample of this process's batch `index`."""
        rank, processes = int(self.accelerator.process_index), int(self.accelerator.num_processes)
        batches = self.position.epoch_step * self.schedule.accum + index
        return (batches * processes + rank) * self.parts.train_loader.batch_size

    def _write_interval(self) -> None:
        self._check_losses()
        self.recorder.write("interval", self._record("interval"))

    def _record(self, kind: str) -> JsonDict:
        """Return epoch, step, mean losses since the last record of this kind, and learning rate. Synchronizes."""
        means = self.run_state.meters[kind].means(self.accelerator)
        self.run_state.meters[kind].reset()
        return {
            "epoch": self.position.epoch,
            "step": self.position.step,
            **{f"train_{name}": value for name, value in means.items()},
            "lr": self.schedule.rate(self.position.step - 1),
            "total_steps": self.schedule.total_steps,
            **peak_memory(self.accelerator.device),
        }

    def _end_epoch(self) -> None:
        """Evaluate if it is due, write the epoch's record and save."""
        self._check_losses()
        record, better = self._record("epoch"), False
        if self._over or (self.position.epoch + 1) % self.config.engine.eval_every == 0:
            with self.recorder.paused():
                better = self._evaluate(record)
        self.recorder.write("epoch", {**record, "n_parameters": self.run_state.n_parameters})
        if self._over and self.position.step < self.schedule.total_steps:
            logger.warning(
                "ended at step %d of %d: %s without a better value (engine.patience)",
                self.position.step,
                self.schedule.total_steps,
                counted(self.position.stale, "evaluation"),
            )
        self.position.epoch += 1
        self.position.epoch_step = 0
        due = self._over or self.config.engine.save_every is None or self._save_due
        if due or better:
            self._save(best=better, last=due)

    def _evaluate(self, record: JsonDict) -> bool:
        """Add the test metrics to `record`, and return whether they are the best so far."""
        metrics = score(self.parts, self.run_state.average, self.accelerator)
        record |= metrics
        self.position.metrics |= metrics
        choice = self.parts.choice
        if choice is None:
            return False
        value = best_value(choice, metrics)
        better = choice.better(value, self.position.best)
        if better:
            self.position.best, self.position.best_metric = value, choice.key
        self.position.stale = 0 if better else self.position.stale + 1
        return better

    def _save(self, *, best: bool = False, last: bool = True) -> None:
        """Save a state, after checking that losses and weights are finite."""
        self._check_losses()
        if not weights_finite(self.parts.task, self.accelerator):
            raise RunFailedError(f"a weight is not finite at step {self.position.step}{self._last_good()}")
        with self.recorder.paused():
            self.run_state.save(self.position, best=best, last=last)
        if last:
            self.due = False
            self.clock.restart()

    def _check_losses(self) -> None:
        failures = self.health.failures(self.accelerator)
        if failures:
            raise RunFailedError(describe(failures) + self._last_good())

    def _last_good(self) -> str:
        self.run_state.wait()
        advice = "lower optim.blr or set optim.clip_grad"
        if self.run_state.last_step is None:
            return f"; no state had been saved yet: {advice}"
        folder = self.config.output_dir / "checkpoints"
        return f"; the last good state is that of step {self.run_state.last_step} in {folder}: {advice}"
