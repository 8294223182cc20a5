"""What a run writes down: log.jsonl, means, rates and waits, the progress bar, trackers, losses that are not finite."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from graftvit.checkpoints.files import read_records
from graftvit.models.errors import ConfigError, RunFailedError
from graftvit.transfer.config import RunConfig
from graftvit.transfer.data.loaders import EvalLoader
from graftvit.transfer.data.loading import TrainBatches
from graftvit.transfer.engine import runlog as trackers
from graftvit.transfer.engine.build import build
from graftvit.transfer.engine.loop import Loop
from graftvit.transfer.engine.resume_check import settings
from graftvit.transfer.engine.runlog import (
    CommunicationTimer,
    LossHealth,
    Meters,
    ProgressBar,
    Recorder,
    RunLog,
    create_trackers,
    describe,
    hyperparameters,
    numbers,
    peak_memory,
    stacked,
    weights_finite,
)
from graftvit.transfer.engine.train import train
from support.runs.engine_runs import config
from support.runs.scenarios import RunScenario
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn


def test_records_come_back_with_every_bit(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    log.keep(5)
    assert (log.records, log.path.read_text()) == (0, "")
    record = {"step": 3, "train_loss": 0.1 + 0.2, "lr": 1e-17}
    log.append(record)
    assert read_records(log.path) == [record]
    assert log.records == 1


def test_keep_drops_what_came_after_and_a_cut_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    for step in range(4):
        log.append({"step": step})
    with log.path.open("a") as file:
        file.write('{"step": 4, "train')
    again = RunLog(log.path)
    again.keep(3)
    again.append({"step": 9})
    assert [record["step"] for record in read_records(log.path)] == [0, 1, 2, 9]
    assert again.records == 4
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_reader_leaves_out_a_cut_line_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"st{"step": 3}\n7\n{"step": 4}\n{"st')
    assert read_records(path) == [{"step": 1}, {"step": 4}]
    assert caplog.messages == [f"{path}: left out lines 2, 3, 5, which are no whole records"]


def test_a_cut_line_among_the_records_of_a_state_is_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A node that crashed lost the end of the file; the next record was glued to the half of one."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    log = RunLog(path)
    log.keep(4)
    log.append({"step": 5})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 5}\n'
    assert log.records == 3
    (message,) = caplog.messages
    assert message.startswith(f"{path} has 2 of the 4 records up to the resumed state;")
    assert "`graftvit evaluate`" in message


@pytest.mark.parametrize(("end", "warned"), [('{"step": 3, "lo', True), ('{"step": 3}\n', False)])
def test_a_cut_line_after_the_state_is_dropped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, end: str, warned: bool
) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"step": 1}}\n{{"step": 2}}\n{end}')
    RunLog(path).keep(2)
    message = f"{path}: dropped a line after the resumed state, which is no whole record"
    assert caplog.messages == [message] * warned


def test_a_record_after_a_failed_write_is_whole(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    log.append({"step": 1})
    with log.path.open("a") as file:
        file.write('{"step": 2, "lo')
    log.append({"step": 3})
    assert read_records(log.path) == [{"step": 1}, {"step": 3}]


@pytest.mark.parametrize(
    ("path", "cause"),
    [("absent/log.jsonl", "No such file or directory"), ("/dev/full", "No space left on device")],
)
def test_an_unwritable_log_is_one_sentence(path: str, cause: str, tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match=f"cannot be written: {cause}") as caught:
        RunLog(tmp_path / path).append({"step": 1})
    assert caught.value.exit_code == 1


def test_means_and_a_cut_in_the_middle() -> None:
    accelerator, names = Accelerator(cpu=True), ("loss", "task")
    values = [torch.rand(2) for _ in range(7)]
    whole, first, second = (Meters(torch.device("cpu")) for _ in range(3))
    assert whole.means(accelerator) == {}
    for index, value in enumerate(values):
        whole.add(names, value)
        (first if index < 3 else second).add(names, value)
        if index == 2:
            second.load(first.count, first.names, first.sums.clone())
    assert second.means(accelerator) == whole.means(accelerator)
    expected = torch.stack(values).double().mean(0).tolist()
    torch.testing.assert_close(list(whole.means(accelerator).values()), expected, rtol=1e-14, atol=0)
    whole.reset()
    assert whole.means(accelerator) == {}


def test_stacked_detaches_and_keeps_the_order() -> None:
    loss = torch.ones((), requires_grad=True, dtype=torch.bfloat16)
    values = stacked({"loss": loss * 2, "task": loss * 3})
    assert values.tolist() == [2, 3]
    assert not values.requires_grad
    assert values.dtype == torch.float32


NAMES = ("loss", "task", "transfer", "layer00", "layer01")


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def losses(*bad: str, value: float = float("nan")) -> Tensor:
    return torch.tensor([value if name in bad else 1.0 for name in NAMES])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_bad_step_of_each_part_is_kept(accelerator: Accelerator, value: float) -> None:
    health = LossHealth()
    assert health.failures(accelerator) == {}
    health.record(1, NAMES, losses())
    assert health.failures(accelerator) == {}
    health.record(2, NAMES, losses("loss", "transfer", "layer01", value=value))
    health.record(3, NAMES, losses(*NAMES, value=value))
    health.record(4, NAMES, losses())
    failures = health.failures(accelerator)
    assert failures == {"loss": 2, "transfer": 2, "layer01": 2, "task": 3, "layer00": 3}
    assert describe(failures) == "the loss is not finite at step 2 (in layer01)"
    assert describe({"loss": 5}) == "the loss is not finite at step 5 (in loss)"
    assert "in task" in describe({"loss": 5, "task": 5})


def test_a_loss_that_is_not_finite_on_another_rank_stops_all(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = LossHealth()
    watch.record(4, ("loss", "task"), torch.tensor([1.0, 1.0]))

    def other_rank(first: Tensor, op: object) -> None:
        first[0] = min(int(first[0]), 4)  # there, the total was not finite at step 4

    monkeypatch.setattr(trackers.dist, "all_reduce", other_rank)
    assert watch.failures(SimpleNamespace(num_processes=2)) == {"loss": 4}  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_weight_is_found(accelerator: Accelerator, value: float) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert weights_finite(model, accelerator)
    with torch.no_grad():
        model[0].bias[1] = value
    assert not weights_finite(model, accelerator)


SHOWN = {
    "epoch": 0,
    "step": 3,
    "train_loss": 11.98361,
    "train_task": 2.3286,
    "lr": 9.38e-4,
    "images_per_second": 280.2,
}


def test_the_numbers_of_a_record_are_shown_and_many_layers_are_left_to_the_log() -> None:
    assert numbers(SHOWN) == "loss 11.98  task 2.329  lr 9.38e-04  280 img/s"
    layers = {f"train_layer{index:02d}": 1.0 for index in range(12)}
    assert "layer" not in numbers({**SHOWN, **layers})
    assert "layer00" in numbers({**SHOWN, "train_layer00": 1.0})


@pytest.mark.parametrize(
    ("share", "said"), [(0.1, ""), (0.114, "  11% waiting for data"), (1.0, "  100% waiting for data")]
)
def test_a_wait_for_data_is_said_where_it_is_worth_a_look(share: float, said: str) -> None:
    assert numbers({**SHOWN, "data_wait": share}) == numbers(SHOWN) + said


@pytest.mark.parametrize(("terminal", "shown"), [(True, True), (True, False), (False, True)])
def test_it_is_drawn_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool, shown: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("TTY_COMPATIBLE", "1" if terminal else "0")
    with ProgressBar(4, shown=shown, done=1) as bar:
        bar.step(3, 1)
        bar.show(SHOWN)
    printed = capsys.readouterr().out
    assert ("3/4" in printed and "280 img/s" in printed) == (terminal and shown)


RECORD = {"epoch": 0, "step": 1, "train_loss": 0.5, "lr": 0.1}


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that stands still but for what this adds to it."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def add(seconds: float) -> None:
        now[0] += seconds

    return add


def recorder(folder: Path, writes: bool = True) -> Recorder:
    return Recorder(RunLog(folder / "log.jsonl"), [], ProgressBar(4, shown=False), writes=writes)


def test_the_clock_stands_still_while_paused(tmp_path: Path, pass_time: Callable[[float], None]) -> None:
    """A record without a timed step has no rate, and other processes write none."""
    under_test = recorder(tmp_path)
    under_test.start("interval")
    under_test.write("interval", RECORD)
    under_test.start("interval")
    under_test.start("epoch")
    under_test.images(30)
    pass_time(2.0)
    with under_test.paused():
        pass_time(100.0)
    under_test.images(10)
    under_test.step(1, 0)
    pass_time(2.0)
    under_test.write("interval", RECORD)
    pass_time(2.0)
    under_test.write("epoch", RECORD)
    untimed, interval, epoch = read_records(tmp_path / "log.jsonl")
    assert untimed.keys() == {*RECORD, "seconds"}
    assert (interval["seconds"], interval["images_per_second"]) == (4.0, 10.0)
    assert (epoch["seconds"], epoch["images_per_second"]) == (6.0, 6.7)
    other = recorder(tmp_path / "other", writes=False)
    other.start("interval")
    other.write("interval", RECORD)
    assert not (tmp_path / "other").exists()


def test_waiting_is_a_share_of_the_clock_it_is_in(tmp_path: Path, pass_time: Callable[[float], None]) -> None:
    under_test = recorder(tmp_path)
    under_test.communication = iter([0.5, None, 1.0]).__next__
    under_test.start("interval")
    under_test.start("epoch")
    for wait, work in ((1.0, 1.0), (0.0, 2.0)):
        with under_test.waiting():
            pass_time(wait)
        with under_test.paused():
            pass_time(100.0)
        pass_time(work)
        under_test.step(1, 0)
    under_test.write("interval", RECORD)
    pass_time(4.0)
    under_test.step(2, 0)
    under_test.write("interval", RECORD)
    under_test.write("epoch", RECORD)
    first, second, epoch = read_records(tmp_path / "log.jsonl")
    assert (first["seconds"], first["data_wait"], first["comm_wait"]) == (4.0, 0.25, 0.25)  # 2 x 0.5 s of 4 s
    assert (second["seconds"], second["data_wait"]) == (4.0, 0.0)
    assert "comm_wait" not in second  # nothing was timed in it
    assert epoch["seconds"] == 8.0
    assert (epoch["data_wait"], epoch["comm_wait"]) == (0.125, 0.281)  # 3 x 0.75 s of 8 s


def test_what_came_after_the_resumed_step_is_dropped(tmp_path: Path) -> None:
    Accelerator(cpu=True)  # trackers ask accelerate which process they are in
    for start, value in ((0, 1.0), (2, 5.0)):
        (tracker,) = create_trackers(("tensorboard",), tmp_path, "id", start)
        for step in range(start + 1, 5):
            tracker.log({"train_loss": value}, step=step)
        tracker.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("train_loss")]
    assert found == [(1, 1.0), (2, 1.0), (3, 5.0), (4, 5.0)]


def test_a_resumed_run_continues_the_record_of_its_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []
    steps: list[int] = []
    run = SimpleNamespace(log=lambda values, step: steps.append(step), finish=lambda: None)
    fake: Any = ModuleType("swanlab")
    fake.init, fake.config = lambda **words: (started.append(words), run)[1], {}
    monkeypatch.setitem(sys.modules, "swanlab", fake)
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["swanlab"])
    for last in (1, 2):
        short = {"max_steps": last, "warmup_epochs": 0.0, "ema": None}
        train(config(tmp_path / "run", optim=short, engine={"trackers": ("swanlab",), "log_interval": 1}))
    assert sorted({*steps}) == [1, 2]
    first, second = started
    assert first == second
    assert (first["project"], first["experiment_name"], first["resume"]) == ("graftvit", "run", "allow")
    assert first["logdir"] == str(tmp_path / "run" / "swanlab")


def test_a_tracker_that_cannot_start_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unknown(LOGGER_TYPE_TO_CLASS["wandb"]):  # type: ignore[misc]
        def start(self) -> None:
            raise RuntimeError("No API key configured.\nUse `wandb login`")

    for name, sentence in {
        "wandbb": "trackers=wandbb is no tracker of accelerate; did you mean 'wandb'?",
        "wandb": "trackers asks for wandb, which is not installed: pip install wandb",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            build(config(tmp_path, engine={"trackers": (name,)}))
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["wandb"])
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Unknown)
    with pytest.raises(ConfigError, match=r"trackers=wandb does not start \(No API key.* WANDB_MODE=offline"):
        create_trackers(("wandb",), tmp_path, "id", 0)


def test_hyperparameters_are_flat_scalars() -> None:
    flat = hyperparameters(settings(RunConfig()), peak_lr=0.5)
    assert flat["peak_lr"] == 0.5
    assert flat["optim.blr"] == 1e-3
    assert flat["mode"] == "transfer"
    assert all(isinstance(value, int | float | str | bool) for value in flat.values())


def slowed(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, before: Callable[[], None]) -> None:
    real = getattr(owner, name)

    def slow(self: Any, *arguments: Any) -> Any:
        before()
        return real(self, *arguments)

    monkeypatch.setattr(owner, name, slow)


@pytest.mark.parametrize(
    ("owner", "name", "seconds", "wait"),
    [(TrainBatches, "__getitem__", 0.3, 0.75), (EvalLoader, "__iter__", 0.5, 0.0)],
)
def test_time_of_the_loader_is_told_from_that_of_the_steps_and_of_evaluations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pass_time: Callable[[float], None],
    owner: type, name: str, seconds: float, wait: float,
) -> None:  # fmt: skip
    slowed(monkeypatch, owner, name, lambda: pass_time(seconds))
    slowed(monkeypatch, Loop, "_step", lambda: pass_time(0.1))
    train(config(tmp_path, optim={"epochs": 1}))
    timed = [record for record in read_records(tmp_path / "log.jsonl") if "seconds" in record]
    assert timed
    for record in timed:
        assert record["data_wait"] == pytest.approx(wait, abs=0.01)
        assert "comm_wait" not in record


@pytest.mark.slow
def test_a_slow_process_is_what_the_others_wait_for(run_scenario: RunScenario, tmp_path: Path) -> None:
    report = run_scenario("engine_waits", tmp_path / "run", 0.1)
    assert report["ends"] == [0, 0]
    steps = [record["step"] for record in report["log"] if "comm_wait" in record]
    assert steps == [2, 2, 4, 4, 6, 6], "an interval and an epoch end at each"
    shares = [record["comm_wait"] for record in report["log"] if "comm_wait" in record]
    assert all(0 <= share <= 1 for share in shares)
    assert any(shares)


class Timed(nn.Module):
    """What DDP says after each of some steps."""

    def __init__(self, said: list[dict[str, int]]) -> None:
        super().__init__()
        self.said = said
        self.rate = 0

    def _get_ddp_logging_data(self) -> dict[str, int]:
        return self.said.pop(0)

    def _set_ddp_runtime_logging_sample_rate(self, rate: int) -> None:
        self.rate = rate


def test_each_step_that_ddp_timed_counts_once() -> None:
    assert CommunicationTimer(nn.Linear(2, 2), 5).seconds() is None, "without DDP there is nothing to read"
    keys = ("iteration", "backward_comm_time", "backward_compute_comm_overlap_time")
    rows = [(1, 5_000_000, 2_000_000)] * 2 + [(7, 1_000_000, 1_500_000), (9, 4_000_000, 0)]
    model = Timed([{"iteration": 0}, *(dict(zip(keys, row, strict=True)) for row in rows)])
    timer = CommunicationTimer(model, 7)
    assert model.rate == 7
    assert [timer.seconds() for _ in range(5)] == [None, pytest.approx(3e-3), None, 0.0, pytest.approx(4e-3)]


def test_the_log_holds_the_peak_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    assert peak_memory(torch.device("cuda", 0)) == {"peak_memory_gib": 1.5}
    assert peak_memory(torch.device("cpu")) == {}
