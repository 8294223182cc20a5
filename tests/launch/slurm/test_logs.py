"""`graftvit jobs logs`: the log of a rank, of all ranks, and of a run that goes on."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from graftvit.launch.slurm import failures
from graftvit.launch.slurm.failures import new_text, tail
from support.runs.typed import Typed
from support.slurm.slurm_folders import FakeSlurm, submitted


def test_the_logs_of_all_ranks_come_under_their_names(tmp_path: Path, typed: Typed) -> None:
    submitted(tmp_path)
    for name, text in {"12_10_log.err": "ten\r11", "12_0_log.err": "zero\n", "12_2_log.out": ""}.items():
        (tmp_path / "logs" / name).write_text(text)
    lines = typed("jobs logs --rank all", tmp_path).out.splitlines()
    names = [f"==> {tmp_path}/logs/12_{rank}_log.err <==" for rank in (0, 10)]
    assert lines == [names[0], "zero", names[1], "ten", "11"]


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
    monkeypatch.setattr(failures, "_CHUNK", 7)
    path = tmp_path / "log"
    path.write_text("".join(f"line {number}\n" for number in range(50)) + "cut")
    assert tail(path, 3) == "line 48\nline 49\ncut"
    assert tail(path, 0) == tail(tmp_path / "none", 3) == ""


def test_following_survives_truncation(tmp_path: Path) -> None:
    path = tmp_path / "log"
    place = 0
    for written, new in (("", ""), ("a long first line\nhal", "a long first line\n"), ("f\n", "half\n")):
        with path.open("a") as file:
            file.write(written)
        text, place = new_text(path, place)
        assert text == new
    path.write_text("new\ncut")
    assert new_text(path, place) == ("new\n", 4)
    assert new_text(path, 4, lines=False) == ("cut", 7)


def test_following_ends_with_the_run(
    tmp_path: Path, slurm: FakeSlurm, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "POLL", 0.01)
    monkeypatch.setattr(failures, "ASK", 0.2)
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
