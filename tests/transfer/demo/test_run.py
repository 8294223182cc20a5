"""The demo from end to end with a handful of steps: its report, and what an interruption leaves."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from graftvit.models.errors import GraftError
from graftvit.transfer.config import RunConfig
from graftvit.transfer.demo import parts as demo_parts
from graftvit.transfer.demo import run as demo
from graftvit.transfer.engine import loop
from graftvit.transfer.engine.runlog import WALL_CLOCK
from graftvit.transfer.engine.train import RunResult

SHORT = {
    "optim": {"max_steps": 4, "epochs": 4, "warmup_epochs": 1},
    "engine": {"eval_every": 2, "save_every": 1, "log_interval": 1},
    "student": {"model_args": {"embed_dim": 8, "num_heads": 2}},
    "pretrain": {"decoder_dim": 8, "decoder_heads": 2},
}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = demo_parts.recipe

    def short(name: str, folder: Path, changes: Mapping[str, Any]) -> RunConfig:
        return plain(
            name, folder, demo_parts._merged(SHORT, {k: v for k, v in changes.items() if k != "optim"})
        )

    monkeypatch.setattr(demo_parts, "recipe", short)


def records(folder: Path) -> dict[str, list[dict[str, float]]]:
    """The logs of all runs, without the clock."""
    return {
        log.parent.name: [
            {key: value for key, value in json.loads(line).items() if key not in WALL_CLOCK}
            for line in log.read_text().splitlines()
        ]
        for log in folder.rglob("log.jsonl")
    }


@pytest.mark.slow
def test_it_writes_a_report_and_does_finished_parts_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, level = torch.get_num_threads(), logging.getLogger("graftvit").level
    report = demo.run_demo(tmp_path, seeds=(0, 5))
    assert report == tmp_path / "report.html"
    assert "of 2 seeds" in report.read_text()
    out = capsys.readouterr().out
    assert "9/9 distill, seed 5" in out
    assert "Attention distillation" in out
    assert (torch.get_num_threads(), logging.getLogger("graftvit").level) == (threads, level)
    assert len(records(tmp_path)) == 9
    before = {path: path.read_bytes() for path in tmp_path.rglob("log.jsonl")}
    monkeypatch.setattr(loop.Loop, "_step", lambda *_: pytest.fail("a finished run was trained again"))
    monkeypatch.chdir(tmp_path.parent)
    again = demo.run_demo(Path(tmp_path.name), seeds=(0, 5), progress=False)
    assert again.resolve() == report
    assert capsys.readouterr().out == ""
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("log.jsonl")}


@pytest.mark.slow
def test_interrupted_and_started_again_it_ends_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo.run_demo(tmp_path / "whole", quick=True, progress=False)
    step, count = loop.Loop._step, iter(range(1000))

    def interrupted(self: loop.Loop, *batches: Any) -> None:
        step(self, *batches)
        if next(count) == 9:  # the teacher's four, scratch's four, the second of fine-tuning
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop.Loop, "_step", interrupted)
    with pytest.raises(GraftError, match=r"SIGINT with 2 of 5 runs finished.*same command") as stopped:
        demo.run_demo(tmp_path / "broken", quick=True, progress=False)
    assert stopped.value.exit_code == 130
    assert not (tmp_path / "broken" / "report.html").exists()
    demo.run_demo(tmp_path / "broken", quick=True, progress=False)
    assert records(tmp_path / "broken") == records(tmp_path / "whole")


def test_a_second_ctrl_c_is_answered_in_one_sentence_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(config: RunConfig) -> RunResult:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", impatient)
    with pytest.raises(GraftError, match="0 of 5 runs") as stopped:
        demo.run_demo(tmp_path, quick=True, progress=False)
    assert stopped.value.exit_code == 130
