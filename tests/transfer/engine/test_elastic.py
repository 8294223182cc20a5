"""A run goes on with another number of processes as if nothing had happened, or says which numbers would do."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from graftvit.models.errors import ConfigError
from graftvit.transfer.config import RunConfig
from graftvit.transfer.data.loaders import TrainLoader
from graftvit.transfer.engine.elastic import GlobalBatch, as_started, check_spread, describe, first_batch
from graftvit.transfer.engine.resume_check import Position, settings
from graftvit.transfer.engine.run_state import restore_meters
from graftvit.transfer.engine.runlog import Meters
from hypothesis import assume, given
from hypothesis import strategies as st
from support.runs.scenarios import NEEDS_FSDP, RunScenario

TOLERANCE = 1e-5
"""Relative, in float32: the processes add the same gradients in another order."""


@dataclass
class Loader:
    """What a TrainLoader says of a data set of `num_samples` images."""

    num_samples: int
    setting: int
    processes: int
    streamed: bool = False

    @property
    def batch_size(self) -> int:
        return self.setting if self.streamed else min(self.setting, self.num_samples // self.processes)

    @property
    def batches_per_epoch(self) -> int:
        return self.num_samples // (self.batch_size * self.processes)


def loader(*of: Any, **more: Any) -> TrainLoader:
    return cast(TrainLoader, Loader(*of, **more))


def config(batch_size: int = 16, accum_iter: int = 2, **optim: Any) -> RunConfig:
    optim |= {"accum_iter": accum_iter}
    return RunConfig.model_validate({"data": {"batch_size": batch_size}, "optim": optim, "output_dir": "run"})


def saved(run: RunConfig, world_size: int, images: TrainLoader) -> dict[str, Any]:
    """Meta of a state as it comes back from JSON."""
    batch = first_batch(run, images, world_size).meta()
    meta = {"config": settings(run), "world_size": world_size, "global_batch": batch}
    return cast("dict[str, Any]", json.loads(json.dumps(meta)))


def check(run: RunConfig, meta: dict[str, Any], images: TrainLoader, processes: int, **position: Any) -> None:
    check_spread(GlobalBatch(**meta["global_batch"]), meta, Position(**position), run, images, processes)


BACK_AND_FORTH = [[0] * 4, [-9] * 4, [115] * 2, [0] * 4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "wrap", "ends", "steps"),
    [
        ("back_and_forth", "ddp", BACK_AND_FORTH, 16),
        pytest.param("back_and_forth", "fsdp", BACK_AND_FORTH, 16, marks=NEEDS_FSDP),
        ("from_one", "ddp", [[0], [-9], [115] * 2, [0] * 4], 32),
    ],
)
def test_some_processes_are_killed_or_stopped_and_others_end_the_run(
    run_scenario: RunScenario, tmp_path: Path, scenario: str, wrap: str, ends: list[list[int]], steps: int
) -> None:
    report = run_scenario("engine_elastic", scenario, tmp_path, wrap)
    assert report["ends"] == ends, report
    assert (report["steps"], report["places"], report["same_batches"]) == (steps, True, True), report
    assert max(report["gap"], report["log_gap"]) < TOLERANCE, report
    if scenario == "back_and_forth":
        for now, before in (("on 2 processes with 4", "4 with 2"), ("on 4 processes with 2", "2 with 4")):
            line = f"{now} batches a step in place of {before}; the global batch stays 32"
            assert line in report["stderr"]


def test_what_does_not_fit_is_refused_on_every_process(run_scenario: RunScenario, tmp_path: Path) -> None:
    report = run_scenario("engine_elastic", "refused", tmp_path, "ddp")
    assert report["ends"] == [[0, 0], [2, 2, 2], [2]], report
    three, one = report["texts"]
    assert len(set(three)) == 1
    assert "2 batches of 4 images a step, which 3 processes cannot share: use 1 or 2 processes" in three[0]
    assert "optim.accum_iter=3, but the run" in one[0]
    assert not any("\n" in text for text in [*three, *one])


@pytest.mark.slow
def test_a_stream_changes_its_processes_between_epochs(run_scenario: RunScenario, tmp_path: Path) -> None:
    report = run_scenario("engine_elastic", "streamed", tmp_path, "ddp")
    assert report["ends"] == [[115] * 4, [2] * 2, [115] * 4, [0] * 2], report
    assert "in the middle of epoch 0 of a streamed data set" in report["text"]
    assert report["steps"] == [7, 14, 21]


@given(
    images=st.integers(1, 400), size=st.integers(1, 16), accum=st.integers(1, 9),
    before=st.integers(1, 8), now=st.integers(1, 8),
)  # fmt: skip
def test_the_schedule_stays_and_data_suffice(
    images: int, size: int, accum: int, before: int, now: int
) -> None:
    assume(images >= before and images >= now)
    run, then = config(size, accum, warmup_epochs=3, epochs=7), loader(images, size, before)
    batch = first_batch(run, then, before)
    meta = saved(run, before, then)
    spread = loader(images, size, now)
    if batch.micro_batches % now or spread.batch_size != then.batch_size:
        with pytest.raises(ConfigError, match=r"^[^\n]*cannot share: use [^\n]*$"):
            check(run, meta, spread, now)
        return
    check(run, meta, spread, now)
    was, becomes = batch.schedule(run, before), batch.schedule(run, now)
    assert was.accum == min(accum, then.batches_per_epoch)
    assert becomes == replace(was, accum=becomes.accum)
    assert becomes.accum * now == was.accum * before
    assert becomes.accum * becomes.steps_per_epoch <= spread.batches_per_epoch


@pytest.mark.parametrize(
    ("size", "accum", "images", "before", "good", "refused", "message"),
    [
        (
            16,
            1,
            1000,
            4,
            [1, 2, 4],
            3,
            "4 batches of 16 images a step, which 3 processes cannot share: use 1, 2 or 4",
        ),
        (16, 1, 1000, 1, [1], 2, "which 2 processes cannot share: use 1 process, or another output_dir"),
        # of 40 images, 2 processes take batches of 16, 4 of 10
        (16, 4, 40, 1, [1, 2], 4, r"batches of 16 images .*: use 1 or 2 processes"),
        (16, 4, 40, 4, [4], 2, r"batches of 10 images .*: use 4 processes"),
    ],
)
def test_the_numbers_of_processes_that_would_do_are_named(
    size: int, accum: int, images: int, before: int, good: list[int], refused: int, message: str
) -> None:
    run = config(size, accum)
    meta = saved(run, before, loader(images, size, before))
    for processes in good:
        check(run, meta, loader(images, size, processes), processes)
    with pytest.raises(ConfigError, match=message):
        check(run, meta, loader(images, size, refused), refused)


def test_accumulation_is_given_as_it_was_or_as_it_is() -> None:
    run = config(16, 2)
    meta = saved(run, 4, loader(1000, 16, 4))
    two = loader(1000, 16, 2)
    for accum in (2, 4):
        given_now = config(16, accum)
        check(given_now, meta, two, 2)
        assert as_started(given_now, meta) == run
    for accum in (1, 3, 8):
        message = f"optim.accum_iter={accum}, .* 2 processes take 4 .*give 2 or 4,"
        with pytest.raises(ConfigError, match=message):
            check(config(16, accum), meta, two, 2)
    with pytest.raises(ConfigError, match="give 2, or another output_dir"):
        check(config(16, 3), meta, loader(1000, 16, 4), 4)
    with pytest.raises(ConfigError, match="has 200 images, which are not the 7 steps an epoch"):
        check(run, meta, loader(200, 16, 4), 4)


def test_a_stream_is_divided_anew_between_epochs_only() -> None:
    run = config(16, 2)
    meta, two = saved(run, 4, loader(990, 16, 4, streamed=True)), loader(990, 16, 2, streamed=True)
    check(run, meta, two, 2, epoch=3, epoch_step=0)
    check(run, meta, two, 2, epoch=3, epoch_step=7)  # stopped before the evaluation
    check(run, meta, loader(990, 16, 4, streamed=True), 4, epoch=3, epoch_step=2)
    with pytest.raises(
        ConfigError, match=r"in the middle of epoch 3 of a streamed data set.*use 4 to the end"
    ):
        check(run, meta, two, 2, epoch=3, epoch_step=2)


def test_the_log_line_counts() -> None:
    batch = GlobalBatch(4, 32, 8, 10)
    line = "continues on 8 processes with 1 batch a step in place of 4 with 2; the global batch stays 256"
    assert describe(batch, 4, 8) == line
    assert describe(batch, 8, 1).startswith(
        "continues on 1 process with 8 batches a step in place of 8 with 1;"
    )


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_sums_are_passed_on_whole(processes: int) -> None:
    """Four processes have added two batches each in one step."""
    values = {rank: torch.tensor([rank + 1.0, 10.0], dtype=torch.float64) for rank in range(4)}
    tensors = {f"meters.{rank}.epoch": value for rank, value in values.items()}
    counts = {key: {"count": 2, "names": ["loss", "task"]} for key in tensors}
    total, count = torch.zeros(2, dtype=torch.float64), 0
    for rank in range(processes):
        meter = Meters(torch.device("cpu"))
        restore_meters(tensors, counts, {"epoch": meter}, rank=rank, processes=processes, before=4)
        assert meter.names == ("loss", "task")
        assert processes != 4 or torch.equal(meter.sums, values[rank])
        total, count = total + meter.sums, count + meter.count
    assert total.tolist() == [10.0, 40.0]
    assert count == 8
