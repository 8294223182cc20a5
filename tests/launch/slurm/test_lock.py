"""The lock of a submission: who waits, for how long, and what is done where a file system has no locks."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from graftvit.launch.slurm import lock
from graftvit.launch.slurm.lock import is_submitting, submitting
from graftvit.models.errors import ConfigError

HOLD = """
import sys
from pathlib import Path
from graftvit.launch.slurm.lock import submitting
with submitting(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another command, which submits until its input ends."""
    words = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_submission_waits_and_then_gives_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    assert not is_submitting(folder)
    other = holder(folder)
    assert is_submitting(folder)
    with (
        pytest.raises(ConfigError, match=f"{folder} is being submitted by another command"),
        submitting(folder, wait=0.1),
    ):
        pass
    assert "waiting for another command that submits to" in caplog.text
    other.communicate("")
    with submitting(folder, wait=0.0):
        assert not is_submitting(folder)  # no other command does
    assert not is_submitting(folder)


def test_what_is_killed_holds_nothing(tmp_path: Path) -> None:
    other = holder(tmp_path)
    other.kill()
    other.communicate()
    with submitting(tmp_path, wait=0.0):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_file_system_without_locks(number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with submitting(tmp_path):
        lock._mine.clear()  # as another process sees it
        assert is_submitting(tmp_path)
        with (
            pytest.raises(ConfigError, match="is being submitted by another command"),
            submitting(tmp_path, wait=0.1),
        ):
            pass
    assert not is_submitting(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match="run cannot be written: Not a directory"),
        submitting(tmp_path / "file" / "run"),
    ):
        pass
