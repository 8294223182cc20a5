"""What can go wrong in a run: each ends in one sentence and an exit code, and nothing that was saved is lost."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from graftvit.checkpoints.state import StateFolder
from graftvit.models.errors import CheckpointError, ConfigError, GraftError, RunFailedError
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine import train as finish
from graftvit.transfer.engine.fence import Fence, FencedError
from graftvit.transfer.engine.loop import Loop
from graftvit.transfer.engine.train import train
from graftvit.transfer.methods.dual import DualOutput, DualViT
from support.runs.engine_runs import config, differences, make_teacher, records, state


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(config(folder, teacher))
    return folder


def after_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Any) -> None:
    """Calls `action(loop)` once, after the optimizer step `step`."""
    real = Loop._step

    def wrapped(self: Loop, batches: Any) -> None:
        real(self, batches)
        if self.position.step == step:
            action(self)

    monkeypatch.setattr(Loop, "_step", wrapped)


def one_sentence(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_run_that_was_taken_over_at_its_end_leaves_no_student(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    train_loop = Loop.run

    def replaced_after_training(self: Loop) -> int | None:
        stopped = train_loop(self)
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
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        after_step(patch, step, lambda loop: os.kill(os.getpid(), number))
        result = train(config(tmp_path / "run", teacher))
    assert (result.signal, result.steps, result.finished) == (number, step, False)
    assert signal.getsignal(number) is before
    assert not (tmp_path / "run" / "student").exists()
    assert train(config(tmp_path / "run", teacher)).finished
    assert differences(whole, tmp_path / "run") == []


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


def test_a_finished_run_says_so_and_keeps_its_results(
    tmp_path: Path, whole: Path, teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    again = train(config(tmp_path / "run", teacher))
    assert (again.finished, again.steps) == (True, 16)
    assert again.metrics["test_top1"] == records(whole)[-1]["test_top1"]
    assert again.metrics["best_top1"] == max(r.get("test_ema_top1", 0) for r in records(whole))
    assert "is finished" in caplog.text
    assert differences(whole, tmp_path / "run") == []


def test_a_finished_run_may_be_made_longer(tmp_path: Path, whole: Path, teacher: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    result = train(config(tmp_path / "run", teacher, optim={"epochs": 3}))
    assert (result.finished, result.steps) == (True, 24)
    assert records(tmp_path / "run")[: len(records(whole))] == records(whole)
    assert [record["step"] for record in records(tmp_path / "run")][-1] == 24


def test_a_run_that_has_become_another_is_refused(tmp_path: Path, whole: Path, teacher: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"seed=5.*was started with 0") as caught:
        train(config(tmp_path / "run", teacher, seed=5))
    one_sentence(caught.value)
    with pytest.raises(ConfigError, match="asks for 8 steps, but the run has done 16"):
        train(config(tmp_path / "run", teacher, optim={"epochs": 1}))
    assert differences(whole, tmp_path / "run") == []


def test_resume_never_does_not_write_over_a_run(tmp_path: Path, whole: Path, teacher: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(ConfigError, match="already holds a run"):
        train(config(tmp_path / "run", teacher, engine={"resume": "never"}))
    assert differences(whole, tmp_path / "run") == []
    assert train(config(tmp_path / "new", teacher, engine={"resume": "never"})).finished


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_last_state_is_named_and_the_one_before_goes_on(
    tmp_path: Path, whole: Path, teacher: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.safetensors"
    content = bytearray(last.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    last.write_bytes({"truncate": content[: len(content) // 2], "flip": content, "empty": b""}[damage])
    assert train(config(tmp_path / "run", teacher)).finished
    assert "last.safetensors" in caplog.text
    assert "resumed at step 8 of 16" in caplog.text
    assert differences(whole, tmp_path / "run") == []


def test_when_all_states_are_damaged_nothing_is_overwritten(
    tmp_path: Path, whole: Path, teacher: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("*.safetensors"):
        path.write_bytes(b"damaged")
    log = (tmp_path / "run" / "log.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="no whole state is left") as caught:
        train(config(tmp_path / "run", teacher))
    one_sentence(caught.value)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == log


def test_a_teacher_that_is_gone_on_resume_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_teacher(tmp_path / "teacher")
    with monkeypatch.context() as patch:
        after_step(patch, 3, lambda loop: os.kill(os.getpid(), signal.SIGTERM))
        train(config(tmp_path / "run", source))
    before = state(tmp_path / "run")
    shutil.move(source, tmp_path / "away")
    with pytest.raises(CheckpointError, match="teacher") as caught:
        train(config(tmp_path / "run", source))
    one_sentence(caught.value)
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
    with monkeypatch.context() as patch:
        poison(patch, 11, "layer01")
        with pytest.raises(RunFailedError, match=r"not finite at step 11 \(in layer01\)") as caught:
            train(config(tmp_path / "run", teacher, engine={"log_interval": 3}))
    text = one_sentence(caught.value)
    assert "the last good state is that of step 8" in text
    assert str(tmp_path / "run" / "checkpoints") in text
    assert caught.value.exit_code == 1
    for name, tensor in state(tmp_path / "run").items():
        assert not tensor.is_floating_point() or torch.isfinite(tensor).all(), name
    assert [record["step"] for record in records(tmp_path / "run")][-1] == 9
    assert train(config(tmp_path / "run", teacher)).finished
    assert differences(whole, tmp_path / "run") == []


def test_a_diverging_run_never_saves_what_is_not_finite(tmp_path: Path) -> None:
    run = config(
        tmp_path,
        optim={"lr": 1e30, "opt": "sgd", "warmup_epochs": 0.0, "clip_grad": None},
        engine={"save_every": 1},
    )
    with pytest.raises(RunFailedError, match="not finite") as caught:
        train(run)
    one_sentence(caught.value)
    found = StateFolder(tmp_path / "checkpoints").load()
    tensors = {} if found is None else found.tensors
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point())


def test_a_weight_that_is_not_finite_is_not_saved(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(loop: Loop) -> None:
        with torch.no_grad():
            next(loop.parts.task.trainable.parameters()).fill_(torch.inf)

    after_step(monkeypatch, 8, spoil)
    run = config(tmp_path, teacher, engine={"eval_every": 5, "log_interval": 100, "save_every": 4})
    with pytest.raises(
        RunFailedError, match=r"a weight is not finite at step 8; the last good state is that of step 4"
    ):
        train(run)


@pytest.fixture
def file_size_limit() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("file_size_limit")
def test_a_disk_that_takes_no_more_leaves_the_old_state(
    tmp_path: Path, teacher: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    with monkeypatch.context() as patch:
        after_step(patch, 9, lambda loop: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard)))
        with pytest.raises(GraftError) as caught:
            train(config(tmp_path / "run", teacher))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    one_sentence(caught.value)
    assert caught.value.exit_code == 1
    assert train(config(tmp_path / "run", teacher)).finished
    assert differences(whole, tmp_path / "run") == []


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
    filler = small_disk / "filler"

    def fill(loop: Loop) -> None:
        size = shutil.disk_usage(small_disk).free - 40_000
        filler.write_bytes(bytes(size))

    with monkeypatch.context() as patch:
        after_step(patch, 9, fill)
        with pytest.raises(GraftError) as caught:
            train(config(small_disk / "run", teacher, engine={"eval_every": 9}))
    one_sentence(caught.value)
    assert caught.value.exit_code == 1
    filler.unlink()
    kept = StateFolder(small_disk / "run" / "checkpoints").load()
    assert kept is not None
    assert kept.meta["position"]["step"] == 8
    shutil.copytree(small_disk / "run", tmp_path / "run")
    assert train(config(tmp_path / "run", teacher, engine={"eval_every": 9})).finished
    learned = state(whole)
    assert all(
        torch.equal(tensor, learned[n]) for n, tensor in state(tmp_path / "run").items() if n[:5] != "meter"
    )


def test_a_run_killed_before_its_first_state_starts_again(tmp_path: Path, teacher: Path, whole: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text('{"epoch": 0, "step": 3}\n{"epo')
    assert train(config(tmp_path / "run", teacher)).finished
    assert differences(whole, tmp_path / "run") == []


def test_the_run_folder_may_move(
    tmp_path: Path, teacher: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        after_step(patch, 10, lambda loop: os.kill(os.getpid(), signal.SIGTERM))
        train(config(tmp_path / "here", teacher))
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert train(config(tmp_path / "there", teacher)).finished
    assert differences(whole, tmp_path / "there") == []


def test_workers_are_no_part_of_the_result(tmp_path: Path, teacher: Path, whole: Path) -> None:
    run: RunConfig = config(tmp_path / "run", teacher, data={"workers": 1})
    assert train(run).finished
    assert differences(whole, tmp_path / "run") == []
