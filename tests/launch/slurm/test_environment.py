"""What submitit does that a run must not depend on."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import submitit
from graftvit.launch.slurm import environment as module
from graftvit.launch.slurm.environment import (
    PORTS,
    export_ranks,
    forget_old_results,
    outside_of_a_job,
    requeue,
    start_script,
)
from graftvit.models.errors import RunFailedError
from support.slurm.cluster_users import write_program
from support.slurm.slurm_folders import be_a_task


@pytest.fixture
def in_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As in rank 1 of 4 of job 77, with a folder in front of PATH."""
    be_a_task(monkeypatch, tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path


def start(
    folder: Path, *words: str, code: Path | None = None, **more: Any
) -> subprocess.CompletedProcess[str]:
    """Run the script that starts a task, with the folder in front of PATH and its code, unless another is given."""
    script = folder / "start.sh"
    script.write_text(start_script(shlex.quote(str(code or folder)), folder))
    path = {"PATH": f"{folder}:{os.environ['PATH']}"}
    more = {"env": {**os.environ, **path}, **more}
    return subprocess.run(["sh", str(script), *words], capture_output=True, text=True, **more)


BLOCKED = "import signal; print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())), flush=True)"


def test_a_signal_before_the_handlers_waits_for_them(tmp_path: Path) -> None:
    code = (
        f"{BLOCKED}; import os, time; os.kill(os.getpid(), signal.SIGUSR2); time.sleep(0.2)\n"
        "from graftvit.transfer.engine import early_signals as early\n"
        "early.remember_signals(); time.sleep(0.05); print(early.received)"
    )
    done = start(tmp_path, "-c", code)
    blocked, received = done.stdout.splitlines()
    assert "SIGUSR2" in blocked
    assert "SIGTERM" in blocked
    assert received == f"[{signal.SIGUSR2.value}]"
    assert "torch" not in done.stderr


def test_a_preemption_in_the_first_moment_does_not_end_the_task(tmp_path: Path) -> None:
    """Where the script only tries whether it can block."""
    signals = '[ "$2" = true ] && kill -TERM $PPID && kill -USR2 $PPID'
    write_program(tmp_path, "env", f'{signals}\nexec {shutil.which("env")} "$@"')
    done = start(tmp_path, "-c", "print('started')", start_new_session=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (0, "started\n")


@pytest.mark.parametrize("before", [{}, {"PYTHONPATH": "/mine"}])
def test_the_script_puts_the_copied_code_first_and_keeps_the_rest_of_the_path(
    before: dict[str, str], tmp_path: Path
) -> None:
    code = tmp_path / "a folder's code"
    code.mkdir()
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    show = "import os; print(os.environ['PYTHONPATH'])"
    found = start(tmp_path, "-c", show, code=code, env={**own, **before}).stdout.strip()
    assert found == ":".join([str(code), *before.values()])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="python 3.10 looks in the folder it is started in")
def test_the_script_does_not_look_where_it_was_submitted(tmp_path: Path) -> None:
    for folder in ("code", "here"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "thing.py").write_text(f"print('{folder}')")
    assert start(tmp_path, "-m", "thing", code=tmp_path / "code", cwd=tmp_path / "here").stdout == "code\n"


def test_the_script_starts_where_env_cannot_block_but_not_without_the_copy(tmp_path: Path) -> None:
    write_program(tmp_path, "env", "exit 125")
    done = start(tmp_path, "-c", BLOCKED)
    assert (done.returncode, done.stdout.strip()) == (0, "[]")
    done = start(tmp_path, "-c", "print('started')", code=tmp_path / "code")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"the copy of the code is gone, submit again: {tmp_path}/code\n"


def test_results_of_earlier_attempts_are_forgotten_but_only_ones_own(in_slurm: Path) -> None:
    mine = submitit.JobEnvironment().paths.result_pickle
    assert mine.name == "77_1_result.pkl"
    other = in_slurm / "77_0_result.pkl"
    torn = in_slurm / "77_1_result.pkl.save_tmp"
    for path in (mine, other, torn):
        path.write_bytes(b"old")
    forget_old_results()
    assert (mine.exists(), torn.exists(), other.exists()) == (False, False, True)
    forget_old_results()  # nothing there


def test_scontrol_survives_the_signal_that_its_own_requeue_sends(in_slurm: Path) -> None:
    """A slow scontrol, in a step of which every process gets SIGTERM while it runs."""
    write_program(in_slurm, "scontrol", f"echo $$ > {in_slurm}/pid; sleep 0.4; echo $@ > {in_slurm}/asked")
    before = signal.getsignal(signal.SIGTERM)

    def end_all() -> None:
        while not (in_slurm / "pid").exists() or not (in_slurm / "pid").read_text().strip():
            time.sleep(0.01)
        os.kill(int((in_slurm / "pid").read_text()), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=end_all)
    thread.start()
    requeue()
    thread.join()
    assert (in_slurm / "asked").read_text() == "requeue incomplete 77\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_requeue_is_asked_for_again_where_the_controller_is_away(
    in_slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REQUEUE_PAUSE", 0.01)
    write_program(in_slurm, "scontrol", f"echo x >> {in_slurm}/asked; [ $(wc -l < {in_slurm}/asked) -ge 3 ]")
    requeue()
    assert (in_slurm / "asked").read_text() == "x\n" * 3
    write_program(in_slurm, "scontrol", "exit 1")
    with pytest.raises(RunFailedError, match=r"cannot be requeued .* `graftvit jobs resume` resumes"):
        requeue()


def test_a_job_that_submits_hands_nothing_of_itself_on(
    in_slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", "/etc/ours.conf")
    monkeypatch.setenv("RANK", "3")
    before = dict(os.environ)
    with outside_of_a_job():
        inside = dict(os.environ)
    assert dict(os.environ) == before
    assert inside["SLURM_CONF"] == "/etc/ours.conf"
    assert [name for name in inside if name.startswith(("SLURM_", "SUBMITIT_"))] == ["SLURM_CONF"]
    assert "RANK" not in inside


def test_each_attempt_meets_at_a_port_of_its_own(in_slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ports = {export_ranks(restart)["MASTER_PORT"] for restart in range(50)}
    assert len(ports) == 50
    assert all(int(port) in PORTS for port in ports)
    wanted = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node1"}
    assert wanted.items() <= os.environ.items()
    assert os.environ.get("CUDA_VISIBLE_DEVICES") != "1"
    be_a_task(monkeypatch, in_slurm, NTASKS=1, PROCID=0)
    os.environ["WORLD_SIZE"] = "4"  # one process alone is no group
    assert export_ranks(0) == {}
    assert "WORLD_SIZE" not in os.environ
