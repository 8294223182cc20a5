"""What goes wrong while loading: unreadable images, dying processes, signals to the whole job."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.models.errors import DataError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data.loaders import TrainLoader, create_eval_loader, create_train_loader
from PIL import Image
from support.runs.patience import PATIENCE

SPEC = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)
GOOD = 9


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Nine good images, and a corrupt JPEG, a truncated PNG, an empty file and a text file among them."""
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    random = np.random.RandomState(0)
    pixels = [Image.fromarray(random.randint(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(GOOD + 2)]
    for number in range(GOOD):
        pixels[number].save(folder / f"good{number}.png")
    pixels[GOOD].save(folder / "corrupt.jpg")
    (folder / "corrupt.jpg").write_bytes((folder / "corrupt.jpg").read_bytes()[:2] + b"\0" * 300)
    pixels[GOOD + 1].save(folder / "truncated.png")
    (folder / "truncated.png").write_bytes((folder / "truncated.png").read_bytes()[:400])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not an image")
    return tmp_path


BAD = {"corrupt.jpg", "truncated.png", "empty.png", "text.png"}


def loader(root: Path, **keys: Any) -> TrainLoader:
    config = DataConfig(
        data_path=str(root), **{"batch_size": 13, "workers": 0, "aa": None, "max_bad_images": 4} | keys
    )  # type: ignore[arg-type]
    return create_train_loader(config, SPEC, seed=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced_reported_once_and_counted(
    damaged: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    train = loader(damaged, workers=workers, batch_size=5)
    with caplog.at_level(logging.WARNING):
        made = [list(train.epoch(epoch)) for epoch in (0, 1, 2, 3)]
    assert {Path(path).name for path in train.bad_images} == BAD
    assert len(train.bad_images) == len(BAD)
    assert sum("unreadable" in record.message for record in caplog.records) == len(BAD)
    again = [list(loader(damaged, batch_size=5).epoch(epoch)) for epoch in (0, 1, 2, 3)]
    for first, second in zip(made, again, strict=True):
        assert [images.shape[0] for images, _ in first] == [5, 5]
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unreadable_images_stop_the_run(damaged: Path, workers: int) -> None:
    with pytest.raises(
        DataError, match=r"4 of \d+ images cannot be read, more than data\.max_bad_images=3 allows.*/train/a/"
    ):
        list(loader(damaged, workers=workers, max_bad_images=3).epoch(0))
    assert len(list(loader(damaged, workers=workers, max_bad_images=4).epoch(0))) == 1


def test_a_set_of_unreadable_images_alone_ends_in_one_sentence(damaged: Path) -> None:
    for path in (damaged / "train" / "a").glob("good*"):
        path.unlink()
    with pytest.raises(DataError, match="of the 4 images of class 'a' cannot be read; the first is"):
        list(loader(damaged).epoch(0))


def test_evaluation_leaves_unreadable_images_out(damaged: Path) -> None:
    config = DataConfig(data_path=str(damaged), val_split="train", batch_size=4, workers=0, max_bad_images=4)
    evaluation = create_eval_loader(config, SPEC)
    assert sum(int(valid.sum()) for *_, valid in evaluation) == GOOD
    assert {Path(path).name for path in evaluation.bad_images} == BAD


def children() -> set[int]:
    listed = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True, check=False)
    return {int(line) for line in listed.stdout.split()}


def workers_of(train: TrainLoader) -> tuple[Any, set[int]]:
    before = children()
    batches = train.epoch(0)
    next(batches)
    found = {pid for pid in children() - before if Path(f"/proc/{pid}/cmdline").exists()}
    return batches, found


def digits(workers: int) -> TrainLoader:
    config = DataConfig(dataset="digits", batch_size=4, workers=workers, aa="affine")
    return create_train_loader(config, Preprocessing((1, 8, 8), (0.5,), (0.5,)), seed=0)


def test_a_killed_process_ends_in_one_sentence() -> None:
    train = digits(2)
    batches, found = workers_of(train)
    os.kill(found.pop(), signal.SIGKILL)
    with pytest.raises(DataError, match="a loader process died") as caught:
        list(batches)
    assert "\n" not in str(caught.value)
    del caught  # and with it the traceback that holds the loader
    subprocess.run(
        ["true"], check=True
    )  # torch must not raise again for the dead one when another child ends
    assert torch.equal(next(train.epoch(1))[0], next(digits(0).epoch(1))[0])


def kill_and_wait(pid: int) -> None:
    """The wait ends by what torch's handler of SIGCHLD raises."""
    os.kill(pid, signal.SIGKILL)
    time.sleep(PATIENCE)


def test_a_process_that_dies_between_two_epochs_is_told_and_replaced() -> None:
    train = digits(1)
    batches, found = workers_of(train)
    assert len(list(batches)) == 1297 // 4 - 1
    with pytest.raises(RuntimeError, match="killed by signal"):
        kill_and_wait(found.pop())
    with pytest.raises(DataError, match="a loader process died") as caught:
        list(train.epoch(1))
    del caught  # and with it the traceback that holds the loader
    assert torch.equal(next(train.epoch(1))[0], next(digits(0).epoch(1))[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TERM", "INT", "USR1", "USR2"])
def test_a_signal_to_the_whole_job_leaves_the_loaders_alive(name: str) -> None:
    batches, found = workers_of(digits(1))
    for pid in found:  # from another process: one from this one means that the run ends its loaders
        subprocess.run(["kill", f"-{name}", str(pid)], check=True)
    assert len(list(batches)) == 1297 // 4 - 1


def test_a_loader_obeys_the_run_that_ends_it() -> None:
    batches, found = workers_of(digits(1))
    pid = found.pop()
    os.kill(pid, signal.SIGTERM)
    with pytest.raises(DataError, match="a loader process died"):
        list(batches)


@pytest.mark.filterwarnings("error:This DataLoader")
def test_a_loader_of_more_processes_than_cores_is_no_warning_of_torch(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    loader = create_train_loader(DataConfig(data_path=str(damaged), batch_size=3, workers=2), SPEC, seed=0)
    assert len(next(iter(loader.epoch(0)))[0]) == 3
