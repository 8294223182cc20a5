"""The logs of all ranks in one: lines as torch, submitit and Slurm write them."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

import pytest
from graftvit.launch.cli import main
from graftvit.launch.slurm.logs import time_of
from support.slurm.slurm_folders import submitted

STARTED = "submitit INFO (2026-11-22 17:57:{}) - Starting with JobEnvironment(job_id=12, global_rank=0(4))\n"


@pytest.mark.parametrize(
    ("line", "moment"),
    [
        ("submitit INFO (2026-11-22 17:57:37,250) - Loading", datetime(2026, 11, 22, 17, 57, 37, 250000)),
        (
            "[rank3]:[W1122 17:55:59.944470382 reducer.cpp:1545] Warning",
            datetime(2026, 11, 22, 17, 55, 59, 944470),
        ),
        ("*** STEP 1.0 ON n1 CANCELLED AT 2026-11-22T17:55:59 ***", datetime(2026, 11, 22, 17, 55, 59)),
        ("[W9999 17:55:59.944470382 x.cpp:1] no date", None),
        ("epoch 3: 12:30 left", None),
    ],
)
def test_the_time_of_a_line(line: str, moment: datetime | None) -> None:
    assert time_of(line, 2026) == (None if moment is None else pytest.approx(moment.timestamp(), abs=1e-5))


def test_lines_of_all_ranks_come_in_the_order_of_their_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(tmp_path)
    logs = {
        "12_0_log.out": STARTED.format("36,000"),
        "12_0_log.err": "[W1122 17:57:40.5 a.cpp:1] zero\nzero again\nCANCELLED AT 2026-11-22T17:57:59\n",
        "12_2_log.out": STARTED.format("36,100"),
        "12_3_log.err": "[rank3]:[W1122 17:57:38.1 a.cpp:1] three\n\n",
        "12_10_log.err": "[W1122 17:57:50.0 a.cpp:1] ten\r\n",
    }
    for name, text in logs.items():
        path = tmp_path / "logs" / name
        path.write_text(text)
        os.utime(path, (datetime(2026, 12, 1).timestamp(),) * 2)
    assert main(["logs", str(tmp_path), "--rank", "all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:4] for line in lines] == [" 3: ", " 0: ", " 0: ", "10: ", " 0: "]
    assert [line.split()[-1] for line in lines] == ["three", "zero", "again", "ten", "2026-11-22T17:57:59"]


def test_a_rank_is_a_number_or_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submitted(tmp_path)
    assert main(["logs", str(tmp_path), "--rank", "first"]) == 2
    assert "give all, or the number of a process" in capsys.readouterr().err
