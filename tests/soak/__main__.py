"""People, a cluster and its troubles for some minutes: `python tests/soak [--actions 20] [--seed 0]`.

Two shells submit, resume and stop three runs at random moments, with Ctrl-C among them, on a Slurm cluster of this
machine whose nodes die, are drained and are taken by urgent jobs, whose controller restarts, and whose accounting
goes away and comes back. At the end everything is mended and each run is taken to its end. Then must hold: every job
that Slurm saw is known to `graftvit jobs`, none runs that `graftvit jobs stop` was told to end, no run had two jobs at
a time, no command ended with a traceback, and each run has the bits of an undisturbed one. Exit code 1 and the reasons
where one of these does not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import yaml
from ledger import Job, Ledger
from shells import Shell, command, recipe_of, resources_of
from support.slurm.cluster_runs import ClusterRun, assert_undisturbed, cluster_run
from support.slurm.slurm_cluster import SlurmCluster, missing_programs
from support.slurm.slurm_config import ClusterOptions
from support.slurm.slurm_processes import ClusterError
from troubles import Troubles

EPOCHS = 40
"""Some minutes of training for each run, so that the actions meet runs that train."""


def main() -> int:
    arguments = parse()
    options = ClusterOptions(nodes=4, user_signal=bool(arguments.seed % 2), grace=6, accounting=True)
    if reason := missing_programs(options):
        print(f"no Slurm cluster can start here: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="soak-", dir="/tmp") as folder:
        root = arguments.folder or Path(folder) / "runs"
        root.mkdir(parents=True)
        ledger = Ledger(root / "soak.jsonl")
        with SlurmCluster(Path(folder) / "slurm", options) as cluster:
            soak(cluster, root, ledger, arguments)
    return report(ledger)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/soak", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--actions", type=int, default=20, help="of the two shells together (default: 20)")
    parser.add_argument("--minutes", type=float, default=40, help="when it is given up (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
    parser.add_argument("--folder", type=Path, help="a new folder that keeps the runs; else nothing is kept")
    return parser.parse_args()


def soak(cluster: SlurmCluster, root: Path, ledger: Ledger, arguments: argparse.Namespace) -> None:
    """The actions under the troubles, then the end of every run without them."""
    until = time.monotonic() + 60 * arguments.minutes
    runs = [
        cluster_run(cluster, root, name, optim={"epochs": EPOCHS})
        for name in ("two-nodes", "alone", "second")
    ]
    for run in runs:
        recipe_of(run).write_text(yaml.safe_dump(run.config.model_dump(mode="json")))
        command(run, ["submit", str(recipe_of(run)), *resources_of(run)])
    kinds = ["submit", "resume", "resume", "stop", "stop --now"]
    actions = [kinds[place % len(kinds)] for place in range(arguments.actions)]
    shells = [
        Shell(name, runs, actions, ledger, f"{name} {arguments.seed}") for name in ("shell 1", "shell 2")
    ]
    troubles, watch = Troubles(cluster, ledger, arguments.seed), Watch(cluster, ledger)
    for thread in (*shells, troubles, watch):
        thread.start()
    for shell in shells:
        shell.join(max(0, until - time.monotonic()))
        if shell.is_alive():
            ledger.fault(f"{shell.name} had not done its actions after {arguments.minutes} minutes")
    troubles.end()
    for run in runs:
        take_to_the_end(run, ledger, until)
    watch.end()
    for run in runs:
        check(run, ledger)


class Watch(threading.Thread):
    """Asks for the queue every second, as far as somebody answers."""

    def __init__(self, cluster: SlurmCluster, ledger: Ledger) -> None:
        super().__init__(name="watch", daemon=True)
        self.cluster, self.ledger, self._over = cluster, ledger, threading.Event()

    def run(self) -> None:
        columns = ("JobArrayID", "State", "STDOUT", "RestartCnt")
        wanted = ",".join(f"{name}:|" for name in columns)
        while not self._over.wait(1):
            try:
                text = self.cluster.run("squeue", "--noheader", "--states=all", f"--Format={wanted}")
            except (ClusterError, OSError):
                continue
            rows = [[word.strip() for word in line.split("|")] for line in text.splitlines()]
            self.ledger.see(
                Job(number, state, logs.partition("/jobs/logs/")[0], int(restarts))
                for number, state, logs, restarts, *_ in rows
                if "/jobs/logs/" in logs
            )

    def end(self) -> None:
        self._over.wait(2)
        self._over.set()
        self.join()


def take_to_the_end(run: ClusterRun, ledger: Ledger, until: float) -> None:
    """Resumes the run until it has finished, with patience for what is still under way."""
    while time.monotonic() < until:
        state = state_of(run, ledger)
        if state == "finished":
            return
        if state not in ("pending", "running", "requeued", "stopping"):
            words = ["jobs", "resume", str(run.folder)]
            if not (run.folder / "jobs").exists():
                words = ["submit", str(recipe_of(run)), *resources_of(run)]
            code, said, complaint = command(run, words)
            ledger.note(
                "to the end", run=run.folder.name, was=state, code=code, said=(said or complaint)[:90]
            )
        time.sleep(2)
    ledger.fault(f"{run.folder} has not come to its end: {state_of(run, ledger)}")


def state_of(run: ClusterRun, ledger: Ledger) -> str:
    code, said, complaint = command(run, ["jobs", str(run.folder), "--json"])
    if code != 0:
        if "Traceback" in complaint:
            ledger.fault(f"`graftvit jobs` ended with {complaint[-800:]}")
        return "never submitted"
    return str(json.loads(said)[0]["state"])


def check(run: ClusterRun, ledger: Ledger) -> None:
    """That all jobs of the run are known, and that its bits are those of an undisturbed run."""
    known = {submission.job_id for submission in run.jobs.jobs()}
    for job in ledger.jobs.values():
        if job.folder == str(run.folder) and job.number not in known:
            ledger.fault(f"job {job.number} of {run.folder} is unknown to `graftvit jobs`")
    attempts = run.jobs.attempts()
    ledger.note("attempts", run=run.folder.name, count=len(attempts), submissions=len(known))
    try:
        assert_undisturbed(run, ranks=2 if run.folder.name == "two-nodes" else 1)
    except (AssertionError, OSError) as error:
        ledger.fault(f"{run.folder} differs from an undisturbed run: {str(error)[:500]}")
    else:
        ledger.note("same bits", run=run.folder.name)


def report(ledger: Ledger) -> int:
    counts = ", ".join(f"{count} {what}" for what, count in sorted(ledger.counts.items()))
    print(f"\n{ledger.seconds / 60:.1f} minutes: {counts}\n{len(ledger.jobs)} jobs seen in the queue")
    for sentence in ledger.faults:
        print(f"FAULT: {sentence}")
    print("nothing went wrong" if not ledger.faults else f"{len(ledger.faults)} faults")
    return bool(ledger.faults)


if __name__ == "__main__":
    sys.exit(main())
