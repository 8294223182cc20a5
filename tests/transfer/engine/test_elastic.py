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
from graftvit.transfer.engine.elastic import (
    GlobalBatch,
    as_started,
    check_spread,
    describe,
    first_batch,
)
from graftvit.transfer.engine.resume_check import Position, settings
from graftvit.transfer.engine.run_state import restore_meters
from graftvit.transfer.engine.runlog import Meters
from hypothesis import assume, given
from hypothesis import strategies as st
from support.runs.scenarios import RunScenario

TOLERANCE = 1e-5
"""Relative, in float32: the processes add the same gradients in another order."""
NEEDS_FSDP = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch cannot shard on a CPU"
)


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
    return RunConfig.model_validate(
        {
            "data": {"batch_size": batch_size},
            "optim": {"accum_iter": accum_iter, **optim},
            "output_dir": "run",
        }
    )


def saved(run: RunConfig, world_size: int, images: TrainLoader) -> dict[str, Any]:
    """Meta of a state as it comes back from JSON."""
    batch = first_batch(run, images, world_size).meta()
    meta = {"config": settings(run), "world_size": world_size, "global_batch": batch}
    return cast("dict[str, Any]", json.loads(json.dumps(meta)))


def check(run: RunConfig, meta: dict[str, Any], images: TrainLoader, processes: int, **position: int) -> None:
    check_spread(
        GlobalBatch(**meta["global_batch"]), meta, Position(**cast(Any, position)), run, images, processes
    )


def is_the_whole_run(report: dict[str, Any], steps: int) -> None:
    assert report["steps"] == steps, report
    assert report["places"], report
    assert report["same_batches"], report
    assert report["gap"] < TOLERANCE, report
    assert report["log_gap"] < TOLERANCE, report


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["ddp", pytest.param("fsdp", marks=NEEDS_FSDP)])
def test_four_processes_are_killed_two_are_stopped_and_four_end_it(
    run_scenario: RunScenario, tmp_path: Path, wrap: str
) -> None:
    report = run_scenario("engine_elastic", "back_and_forth", tmp_path, wrap)
    assert report["ends"] == [[0] * 4, [-9] * 4, [115] * 2, [0] * 4], report
    assert (
        "on 2 processes with 4 batches a step in place of 4 with 2; the global batch stays 32"
        in report["stderr"]
    )
    assert (
        "on 4 processes with 2 batches a step in place of 2 with 4; the global batch stays 32"
        in report["stderr"]
    )
    is_the_whole_run(report, 16)


@pytest.mark.slow
def test_one_process_becomes_two_and_four(run_scenario: RunScenario, tmp_path: Path) -> None:
    report = run_scenario("engine_elastic", "from_one", tmp_path, "ddp")
    assert report["ends"] == [[0], [-9], [115] * 2, [0] * 4], report
    is_the_whole_run(report, 32)


def test_what_does_not_fit_is_refused_on_every_process(run_scenario: RunScenario, tmp_path: Path) -> None:
    report = run_scenario("engine_elastic", "refused", tmp_path, "ddp")
    assert report["ends"] == [[0, 0], [2, 2, 2], [2]], report
    three, one = report["texts"]
    assert len(set(three)) == 1
    assert "2 batches of 4 images a step, which 3 processes cannot share: use 1 or 2 processes" in three[0]
    assert "optim.accum_iter=3, but the run" in one[0]
    assert not any("\n" in text for text in [*three, *one])


@pytest.mark.slow
def test_a_streamed_run_changes_its_processes_between_epochs(
    run_scenario: RunScenario, tmp_path: Path
) -> None:
    report = run_scenario("engine_elastic", "streamed", tmp_path, "ddp")
    assert report["ends"] == [[115] * 4, [2] * 2, [115] * 4, [0] * 2], report
    assert "in the middle of epoch 0 of a streamed data set" in report["text"]
    assert report["steps"] == [7, 14, 21]


@given(
    images=st.integers(1, 400), size=st.integers(1, 16), accum=st.integers(1, 9),
    before=st.integers(1, 8), now=st.integers(1, 8),
)  # fmt: skip
def test_the_schedule_stays_and_the_data_suffice(
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


def test_the_numbers_of_processes_that_would_do_are_named() -> None:
    run = config(16, 1)
    meta = saved(run, 4, loader(1000, 16, 4))
    for processes in (1, 2, 4):
        check(run, meta, loader(1000, 16, processes), processes)
    with pytest.raises(
        ConfigError, match="4 batches of 16 images a step, which 3 processes cannot share: use 1, 2 or 4"
    ):
        check(run, meta, loader(1000, 16, 3), 3)
    with pytest.raises(
        ConfigError, match="which 2 processes cannot share: use 1 process, or another output_dir"
    ):
        check(run, saved(run, 1, loader(1000, 16, 1)), loader(1000, 16, 2), 2)


def test_a_small_data_set_does_not_go_on_with_other_batches() -> None:
    run = config(16, 4)  # 40 images: 2 processes take batches of 16, 4 of 10
    meta = saved(run, 1, loader(40, 16, 1))
    with pytest.raises(ConfigError, match=r"batches of 16 images .*: use 1 or 2 processes"):
        check(run, meta, loader(40, 16, 4), 4)
    few = saved(run, 4, loader(40, 16, 4))
    check(run, few, loader(40, 16, 4), 4)
    with pytest.raises(ConfigError, match=r"batches of 10 images .*: use 4 processes"):
        check(run, few, loader(40, 16, 2), 2)


def test_accumulation_is_given_as_it_was_or_as_it_is() -> None:
    run = config(16, 2)
    meta = saved(run, 4, loader(1000, 16, 4))
    two = loader(1000, 16, 2)
    for accum in (2, 4):
        given_now = config(16, accum)
        check(given_now, meta, two, 2)
        assert as_started(given_now, meta) == run
    for accum in (1, 3, 8):
        with pytest.raises(
            ConfigError, match=f"optim.accum_iter={accum}, .* 2 processes take 4 .*give 2 or 4,"
        ):
            check(config(16, accum), meta, two, 2)
    with pytest.raises(ConfigError, match="give 2, or another output_dir"):
        check(config(16, 3), meta, loader(1000, 16, 4), 4)


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


def test_a_data_set_that_has_changed_is_refused() -> None:
    run = config(16, 2)
    meta = saved(run, 4, loader(1000, 16, 4))
    with pytest.raises(ConfigError, match="has 200 images, which are not the 7 steps an epoch"):
        check(run, meta, loader(200, 16, 4), 4)


def test_the_log_line_counts() -> None:
    batch = GlobalBatch(4, 32, 8, 10)
    assert describe(batch, 4, 8) == (
        "continues on 8 processes with 1 batch a step in place of 4 with 2; the global batch stays 256"
    )
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
