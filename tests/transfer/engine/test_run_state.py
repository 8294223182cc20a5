"""Whatever interrupts or damages a run, it ends in one sentence, loses nothing saved, and goes on bit for bit."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Generator, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from graftvit.checkpoints.state import StateFolder
from graftvit.models.errors import CheckpointError, ConfigError, GraftError, RunFailedError
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine import early_signals, run_state
from graftvit.transfer.engine import train as finish
from graftvit.transfer.engine.fence import Fence, FencedError
from graftvit.transfer.engine.loop import Loop
from graftvit.transfer.engine.run_state import RunState, SaveClock
from graftvit.transfer.engine.train import train
from graftvit.transfer.methods.dual import DualOutput, DualViT
from support.runs.engine_runs import config, differences, make_teacher, records, state
from support.runs.interrupting import terminated_after
from support.runs.scenarios import NEEDS_FSDP, RunScenario


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(config(folder, teacher))
    return folder


@pytest.fixture
def finished(tmp_path: Path, whole: Path) -> Path:
    """A copy of the undisturbed run."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def after_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Any) -> None:
    """Calls `action(loop)` once, after the optimizer step `step`."""
    real = Loop._step

    def wrapped(self: Loop, batches: Any) -> None:
        real(self, batches)
        if self.position.step == step:
            action(self)

    monkeypatch.setattr(Loop, "_step", wrapped)


def goes_on(run: RunConfig, whole: Path) -> None:
    """Resume a run, and compare what it ends with with the undisturbed one."""
    assert train(run).finished
    assert differences(whole, run.output_dir) == []


def refusal(kind: type[GraftError], match: str, run: RunConfig) -> GraftError:
    """Return the one sentence with which a run ends."""
    with pytest.raises(kind, match=match) as caught:
        train(run)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_run_that_was_taken_over_at_its_end_leaves_no_student(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    train_loop = Loop.run

    def replaced_after_training(self: Loop) -> Generator[int, None, int | None]:
        stopped = yield from train_loop(self)
        Fence(tmp_path / "run").take()
        return stopped

    def replaced_while_writing(*_: object, **__: object) -> None:
        Fence(tmp_path / "run").take()
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    if when == "before":
        monkeypatch.setattr(Loop, "run", replaced_after_training)
    else:
        monkeypatch.setattr(finish, "write_student", replaced_while_writing)
    with pytest.raises(FencedError, match="has taken over the run"):
        train(config(tmp_path / "run", teacher))
    assert not (tmp_path / "run" / "student").exists()


@pytest.mark.parametrize(
    ("number", "step"),
    [*((signal.SIGTERM, step) for step in (1, 5, 8, 11)), (signal.SIGUSR2, 5), (signal.SIGINT, 11)],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, teacher: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, number: int, step: int
) -> None:
    """In another place, and with another number of loader processes."""
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        after_step(patch, step, lambda loop: os.kill(os.getpid(), number))
        result = train(config(tmp_path / "here", teacher))
    assert (result.signal, result.steps, result.finished) == (number, step, False)
    assert signal.getsignal(number) is before
    assert not (tmp_path / "here" / "student").exists()
    shutil.move(tmp_path / "here", tmp_path / "there")
    goes_on(config(tmp_path / "there", teacher, data={"workers": int(step == 11)}), whole)


def test_a_second_interrupt_aborts_without_a_save(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(loop: Loop) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    after_step(monkeypatch, 2, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path / "run", teacher))
    assert StateFolder(tmp_path / "run" / "checkpoints").load() is None


def test_a_finished_run_says_so_and_keeps_its_results_and_may_be_made_longer(
    finished: Path, whole: Path, teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    again = train(config(finished, teacher))
    assert (again.finished, again.steps) == (True, 16)
    assert again.metrics["test_top1"] == records(whole)[-1]["test_top1"]
    assert again.metrics["best_top1"] == max(r.get("test_ema_top1", 0) for r in records(whole))
    assert "is finished" in caplog.text
    assert differences(whole, finished) == []
    longer = train(config(finished, teacher, optim={"epochs": 3}))
    assert (longer.finished, longer.steps) == (True, 24)
    assert records(finished)[: len(records(whole))] == records(whole)
    assert records(finished)[-1]["step"] == 24


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"seed": 5}, "seed=5.*was started with 0"),
        ({"optim": {"epochs": 1}}, "asks for 8 steps, but the run has done 16"),
        ({"engine": {"resume": "never"}}, "already holds a run"),
    ],
)
def test_a_run_that_has_become_another_is_refused(
    finished: Path, whole: Path, teacher: Path, sections: dict[str, Any], message: str
) -> None:
    refusal(ConfigError, message, config(finished, teacher, **sections))
    assert differences(whole, finished) == []
    if "engine" in sections:
        assert train(config(finished.with_name("new"), teacher, **sections)).finished


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_last_state_is_named_and_the_one_before_goes_on(
    finished: Path, whole: Path, teacher: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    last = finished / "checkpoints" / "last.safetensors"
    content = bytearray(last.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    last.write_bytes({"truncate": content[: len(content) // 2], "flip": content, "empty": b""}[damage])
    goes_on(config(finished, teacher), whole)
    assert "last.safetensors" in caplog.text
    assert "resumed at step 8 of 16" in caplog.text


def test_when_all_states_are_damaged_nothing_is_overwritten(finished: Path, teacher: Path) -> None:
    for path in (finished / "checkpoints").glob("*.safetensors"):
        path.write_bytes(b"damaged")
    log = (finished / "log.jsonl").read_bytes()
    refusal(CheckpointError, "no whole state is left", config(finished, teacher))
    assert (finished / "log.jsonl").read_bytes() == log


def test_a_run_killed_before_its_first_state_starts_again(tmp_path: Path, teacher: Path, whole: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text('{"epoch": 0, "step": 3}\n{"epo')
    goes_on(config(tmp_path / "run", teacher), whole)


def test_a_teacher_that_is_gone_on_resume_is_named(tmp_path: Path) -> None:
    source = make_teacher(tmp_path / "teacher")
    with terminated_after(3):
        train(config(tmp_path / "run", source))
    early_signals.received.clear()
    before = state(tmp_path / "run")
    shutil.move(source, tmp_path / "away")
    refusal(CheckpointError, "teacher", config(tmp_path / "run", source))
    assert all(torch.equal(before[name], tensor) for name, tensor in state(tmp_path / "run").items())
    shutil.move(tmp_path / "away", source)
    assert train(config(tmp_path / "run", source)).finished


def poison(patch: pytest.MonkeyPatch, call: int, layer: str) -> None:
    """The part `layer` of the transfer loss is NaN from the training call `call` on."""
    real, calls = DualViT.forward, [0]

    def forward(self: DualViT, images: torch.Tensor) -> DualOutput:
        output = real(self, images)
        calls[0] += self.training
        if self.training and calls[0] >= call:
            bad = torch.full((), torch.nan)
            output.parts[layer] = output.parts[layer] * bad
            output.transfer_loss = output.transfer_loss * bad
        return output

    patch.setattr(DualViT, "forward", forward)


def test_a_loss_that_is_not_finite_names_its_layer_and_keeps_the_last_state(
    tmp_path: Path, teacher: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(tmp_path / "run", teacher)
    with monkeypatch.context() as patch:
        poison(patch, 11, "layer01")
        error = refusal(RunFailedError, r"not finite at step 11 \(in layer01\)", run)
    assert f"the last good state is that of step 8 in {tmp_path / 'run' / 'checkpoints'}" in str(error)
    assert error.exit_code == 1
    for name, tensor in state(tmp_path / "run").items():
        assert not tensor.is_floating_point() or torch.isfinite(tensor).all(), name
    assert records(tmp_path / "run")[-1]["step"] == 9
    goes_on(run, whole)


def test_a_diverging_run_never_saves_what_is_not_finite(tmp_path: Path) -> None:
    optim = {"lr": 1e30, "opt": "sgd", "warmup_epochs": 0.0, "clip_grad": None}
    refusal(RunFailedError, "not finite", config(tmp_path, optim=optim, engine={"save_every": 1}))
    found = StateFolder(tmp_path / "checkpoints").load()
    tensors = {} if found is None else found.tensors
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point())


def test_a_weight_that_is_not_finite_is_not_saved(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_step(
        monkeypatch, 8, lambda loop: next(loop.parts.task.trainable.parameters()).data.fill_(torch.inf)
    )
    run = config(tmp_path, teacher, engine={"eval_every": 5, "log_interval": 100, "save_every": 4})
    refusal(RunFailedError, "a weight is not finite at step 8; the last good state is that of step 4", run)


def test_a_disk_that_takes_no_more_leaves_the_old_state(
    tmp_path: Path, teacher: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with monkeypatch.context() as patch:
            limit = (20_000, before[1])
            after_step(patch, 9, lambda loop: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
            assert refusal(GraftError, ".", config(tmp_path / "run", teacher)).exit_code == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    goes_on(config(tmp_path / "run", teacher), whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    options = [mount or "mount", "-t", "tmpfs", "-o", "size=420k", "tmpfs", str(folder)]
    if mount is None or subprocess.run(options, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)  # a state that was read may still be mapped


def test_a_full_disk_is_one_sentence_and_the_old_state_goes_on(
    small_disk: Path, tmp_path: Path, teacher: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filler, seldom = small_disk / "filler", {"eval_every": 9}

    def fill(loop: Loop) -> None:
        filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 40_000))

    with monkeypatch.context() as patch:
        after_step(patch, 9, fill)
        assert refusal(GraftError, ".", config(small_disk / "run", teacher, engine=seldom)).exit_code == 1
    filler.unlink()
    kept = StateFolder(small_disk / "run" / "checkpoints").load()
    assert kept is not None
    assert (kept.meta["position"]["step"], kept.meta["version"]) == (8, version("graftvit"))
    shutil.copytree(small_disk / "run", tmp_path / "run")
    assert train(config(tmp_path / "run", teacher, engine=seldom)).finished
    ended, learned = state(tmp_path / "run"), state(whole)
    assert all(torch.equal(ended[name], learned[name]) for name in ended if not name.startswith("meter"))


class Hand:
    """A clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        monkeypatch.setattr(run_state, "now", lambda: self.seconds)


def saved_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let each step take a minute of the test's clock, and return the list that gets the step of each saved state."""
    hand, steps = Hand(monkeypatch), []
    step, save = Loop._step, RunState.save

    def slow(self: Loop, batches: object) -> None:
        step(self, batches)  # type: ignore[arg-type]
        hand.seconds += 60

    def noted(self: RunState, position: object, *, best: bool = False, last: bool = True) -> None:
        save(self, position, best=best, last=last)  # type: ignore[arg-type]
        steps.extend([position.step] if last else [])  # type: ignore[attr-defined]

    monkeypatch.setattr(Loop, "_step", slow)
    monkeypatch.setattr(RunState, "save", noted)
    return steps


def test_it_asks_once_when_the_minutes_are_over(monkeypatch: pytest.MonkeyPatch) -> None:
    hand, clock = Hand(monkeypatch), SaveClock(2)
    never, asked = SaveClock(None), []
    for seconds in (119, 120, 121, None, 239, 10_000):
        if seconds is None:
            clock.restart()
        else:
            hand.seconds = seconds
            asked.append(clock.due())
    assert asked == [False, True, False, False, True]
    assert not never.due()


@pytest.mark.parametrize(
    ("engine", "saved"),
    [
        ({"save_every": None, "save_minutes": 3}, [3, 6, 8, 11, 14, 16]),
        ({"save_every": 5, "save_minutes": 3}, [3, 5, 8, 10, 13, 15, 16]),
        ({"save_every": 1000, "save_minutes": 3}, [3, 6, 9, 12, 15, 16]),
        ({"save_every": 7, "save_minutes": 3}, [3, 6, 7, 10, 13, 14, 16]),
        ({"save_every": 1000, "save_minutes": 8}, [8, 16]),  # due at the end of an epoch, and saved there
    ],
)
def test_a_run_saves_by_the_clock_and_its_result_is_the_same(
    tmp_path: Path, teacher: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, engine: Any, saved: list[int]
) -> None:
    steps = saved_steps(monkeypatch)
    goes_on(config(tmp_path / "clocked", teacher, engine=engine), whole)
    assert steps == saved


RANKS = [(1, "single"), (2, "ddp"), pytest.param(2, "fsdp", marks=NEEDS_FSDP)]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["kill", "terminate"])
@pytest.mark.parametrize(("ranks", "wrap"), RANKS)
def test_killed_and_terminated_runs_leave_no_trace(
    run_scenario: RunScenario, tmp_path: Path, ranks: int, wrap: str, scenario: str
) -> None:
    """Kills of two ranks with three losses of two teachers, one a ConvNeXt; one rank's termination stops all."""
    report = run_scenario("engine_killer", scenario, tmp_path, ranks, wrap)
    assert report["disturbed"] == (2 if scenario == "terminate" else 10 if ranks == 1 else 4), report
    assert report["last"] == [0] * ranks, report
    assert report["differences"] == []
    whole, cut = report["verdicts"]
    assert whole == cut
    assert (whole is not None) == (scenario == "terminate")
    if whole is not None:
        assert whole["divergences"], report
        assert bool(whole["gradients"]) == (wrap != "fsdp"), report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "wrap"),
    [("starve", "ddp"), ("poison", "ddp"), pytest.param("poison", "fsdp", marks=NEEDS_FSDP)],
)
def test_a_loss_or_a_disk_that_fails_one_rank_stops_all(
    run_scenario: RunScenario, tmp_path: Path, scenario: str, wrap: str
) -> None:
    report = run_scenario("engine_killer", scenario, tmp_path, 2, wrap)
    assert report["ends"] == [1, 1], report
    assert report["texts"][0] == report["texts"][1]
    assert "\n" not in report["texts"][0]
    if scenario == "poison":
        assert "not finite at step 4 (in layer01)" in report["texts"][0]
        assert "the last good state is that of step 3" in report["texts"][0]
    assert report["finite"]
    assert report["last"] == [0, 0], report


@NEEDS_FSDP
@pytest.mark.slow
def test_a_run_stopped_under_ddp_goes_on_under_fsdp(run_scenario: RunScenario, tmp_path: Path) -> None:
    report = run_scenario("engine_killer", "rewrap", tmp_path, 2, "ddp")
    assert report["ends"] == [[115, 115], [0, 0]], report
    assert report["same_names"]
    assert report["gap"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "wrap"), RANKS)
def test_clocks_that_differ_save_together_and_leave_no_trace(
    run_scenario: RunScenario, tmp_path: Path, ranks: int, wrap: str
) -> None:
    report = run_scenario("engine_killer", "clock", tmp_path, ranks, wrap)
    assert report["ends"] == [[0] * ranks, [-9] * ranks, [0] * ranks], report
    assert all(steps == report["saved"][0] for steps in report["saved"]), report
    between = {int(step) for step in report["saved"][0] if int(step) % (8 if ranks == 1 else 4)}
    assert len(between) >= 2, report
    assert report["differences"] == []
