"""`graftvit jobs logs`: the log of a rank, of all ranks in one, and of a run that goes on."""

from __future__ import annotations

import os
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest
from graftvit.launch.slurm import logs
from graftvit.launch.slurm.logs import Follower, tail, time_of
from support.runs.typed import Typed
from support.slurm.slurm_folders import FakeSlurm, submitted

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


def test_lines_of_all_ranks_come_in_the_order_of_their_times(tmp_path: Path, typed: Typed) -> None:
    submitted(tmp_path)
    written = {
        "12_0_log.out": STARTED.format("36,000"),
        "12_0_log.err": "[W1122 17:57:40.5 a.cpp:1] zero\nzero again\nCANCELLED AT 2026-11-22T17:57:59\n",
        "12_2_log.out": STARTED.format("36,100"),
        "12_3_log.err": "[rank3]:[W1122 17:57:38.1 a.cpp:1] three\n\n",
        "12_10_log.err": "[W1122 17:57:50.0 a.cpp:1] ten\r\n",
    }
    for name, text in written.items():
        path = tmp_path / "logs" / name
        path.write_text(text)
        os.utime(path, (datetime(2026, 12, 1).timestamp(),) * 2)
    lines = typed("jobs logs --rank all", tmp_path).out.splitlines()
    assert [line[:4] for line in lines] == [" 3: ", " 0: ", " 0: ", "10: ", " 0: "]
    assert [line.split()[-1] for line in lines] == ["three", "zero", "again", "ten", "2026-11-22T17:57:59"]


def test_logs_of_a_rank(tmp_path: Path, typed: Typed) -> None:
    submitted(tmp_path)
    assert "there is no log yet" in typed("jobs", "logs", tmp_path).err
    (tmp_path / "logs" / "12_0_log.err").write_text("old\nerr 0\n")
    (tmp_path / "logs" / "12_1_log.out").write_text("out 1\n")
    text = typed("jobs logs --lines 1", tmp_path).out
    assert [word in text for word in ("err 0", "old", "out 1")] == [True, False, False]
    assert "out 1" in typed("jobs logs --rank 1", tmp_path).out
    assert "ranks with logs are 0 to 1" in typed("jobs logs --rank 7", tmp_path, code=2).err
    assert "give all, or the number of a process" in typed("jobs logs --rank first", tmp_path, code=2).err


def test_the_end_of_a_long_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(logs, "_CHUNK", 7)
    path = tmp_path / "log"
    path.write_text("".join(f"line {number}\n" for number in range(50)) + "cut")
    assert tail(path, 3) == "line 48\nline 49\ncut"
    assert tail(path, 0) == tail(tmp_path / "none", 3) == ""


def test_following_survives_truncation(tmp_path: Path) -> None:
    path = tmp_path / "log"
    follower = Follower(path)
    for written, new in (("", ""), ("a long first line\nhal", "a long first line\n"), ("f\n", "half\n")):
        with path.open("a") as file:
            file.write(written)
        assert follower.new() == new
    path.write_text("new\n")
    assert follower.new() == "new\n"


def test_following_ends_with_the_run(
    tmp_path: Path, slurm: FakeSlurm, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "POLL", 0.01)
    monkeypatch.setattr(logs, "ASK", 0.2)
    files, path = submitted(tmp_path), tmp_path / "logs" / "12_0_log.out"
    slurm.says("PENDING", "RUNNING", "COMPLETED")

    def work() -> None:
        time.sleep(0.1)
        path.write_text("begun\n")
        time.sleep(0.2)
        files.begin(job_id="12", restart=0, nodes=[], world_size=1, outcome="finished")
        path.write_text("begun\nthe end")

    thread = threading.Thread(target=work)
    thread.start()
    written = typed("jobs logs --follow", tmp_path)
    thread.join()
    assert written.out.endswith("begun\nthe end\n")
    assert "the run is finished" in written.err
