"""People who submit, resume and stop runs at random moments, and press Ctrl-C at random moments."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from ledger import Ledger
from support.slurm.cluster_runs import ClusterRun

PATIENCE = 900.0
"""Seconds after which a command counts as hanging."""


class Shell(threading.Thread):
    """One terminal: an action after the other on whichever run, until the actions are used up."""

    def __init__(
        self, name: str, runs: Sequence[ClusterRun], actions: list[str], ledger: Ledger, seed: str
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.runs, self.actions, self.ledger = runs, actions, ledger
        self._chance = random.Random(seed)

    def run(self) -> None:
        while self.actions:
            try:
                action = self.actions.pop()
            except IndexError:  # the other shell took the last one
                return
            self._act(action, self._chance.choice(self.runs))
            time.sleep(self._chance.uniform(0, 6))

    def _act(self, action: str, run: ClusterRun) -> None:
        words = {
            "submit": ["submit", str(recipe_of(run)), *resources_of(run)],
            "resume": ["jobs", "resume", str(run.folder)],
            "stop": ["jobs", "stop", str(run.folder)],
            "stop --now": ["jobs", "stop", str(run.folder), "--now"],
        }[action]
        interrupt = self._chance.uniform(0.3, 8) if self._chance.random() < 0.5 else None
        code, said, complaint = command(run, words, interrupt)
        pressed = interrupt is not None and code in (130, -signal.SIGINT)
        self.ledger.note(
            action,
            by=self.name,
            run=run.folder.name,
            code=code,
            ctrl_c=pressed,
            said=first_line(run, said or complaint),
        )
        if pressed:
            self.ledger.note("Ctrl-C")
        if "Traceback" in complaint or code is None:
            self.ledger.fault(f"`graftvit {' '.join(words)}` ended with {code}: {complaint[-800:]}")
        if action.startswith("stop") and code == 0:
            self.ledger.told(re.findall(r"job (\S+) of", said))


def recipe_of(run: ClusterRun) -> Path:
    return run.root / f"{run.folder.name}.yaml"


def resources_of(run: ClusterRun) -> list[str]:
    """The first run takes two nodes, the others one process."""
    return [] if run.folder.name == "two-nodes" else ["--nodes", "1", "--tasks_per_node", "1"]


def command(
    run: ClusterRun, words: Sequence[str], interrupt: float | None = None
) -> tuple[int | None, str, str]:
    """Exit code (None: it hangs), standard output and standard error of a command of the user.

    With `interrupt`, the whole process group gets SIGINT after so many seconds, as by Ctrl-C in a terminal.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "graftvit.launch", *words],
        env=run.environment,
        cwd=run.root,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    key = threading.Timer(interrupt or PATIENCE, _signal_group, (process, signal.SIGINT))
    try:
        if interrupt is not None:
            key.start()
        said, complaint = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        _signal_group(process, signal.SIGKILL)
        said, complaint = process.communicate()
        return None, said, complaint
    finally:
        key.cancel()
    return process.returncode, said, complaint


def _signal_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:  # it ended at this moment
        return


def first_line(run: ClusterRun, text: str) -> str:
    return text.strip().partition("\n")[0].replace(f"{run.root}/", "")[:120]
