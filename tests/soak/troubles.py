"""What happens to a cluster while people work on it."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

from ledger import Ledger
from support.slurm.slurm_cluster import SlurmCluster
from support.slurm.slurm_processes import ClusterError


class Troubles(threading.Thread):
    """One trouble after another, each mended before the next, until it is told to stop."""

    def __init__(self, cluster: SlurmCluster, ledger: Ledger, seed: int) -> None:
        super().__init__(name="troubles", daemon=True)
        self.cluster, self.ledger = cluster, ledger
        self._chance = random.Random(seed)
        self._over = threading.Event()

    def run(self) -> None:
        kinds: list[Callable[[], None]] = [
            self._preempt,
            self._kill_a_node,
            self._drain,
            self._restart_the_controller,
            self._lose_the_accounting,
        ]
        left: list[Callable[[], None]] = []
        while not self._over.wait(self._chance.uniform(2, 12)):
            left = left or self._chance.sample(kinds, len(kinds))  # each comes before one comes again
            try:
                left.pop()()
            except ClusterError as error:
                self.ledger.note("trouble failed", why=str(error)[:120])

    def end(self) -> None:
        """After the trouble that is under way has been mended."""
        self._over.set()
        self.join()

    def _pause(self, low: float, high: float) -> None:
        self._over.wait(self._chance.uniform(low, high))

    def _preempt(self) -> None:
        count = self._chance.randint(1, len(self.cluster.nodes))
        words = ["-p", "high", "-N", str(count), "--ntasks-per-node=1", "--cpus-per-task=8", "-J", "urgent"]
        job = self.cluster.run("sbatch", "--parsable", *words, "-o", "/dev/null", "--wrap", "sleep 2").strip()
        self.ledger.note("preempt", job=job, nodes=count)

    def _kill_a_node(self) -> None:
        name = self._chance.choice(self.cluster.nodes)
        self.cluster.kill_node(name)
        self.ledger.note("node dies", node=name)
        self._pause(3, 10)
        self.cluster.start_node(name)
        self.ledger.note("node back", node=name)

    def _drain(self) -> None:
        names = self._chance.choice([self.cluster.nodes, self.cluster.nodes[:1]])
        self.cluster.drain(*names)
        self.ledger.note("drain", nodes=" ".join(names))
        self._pause(3, 12)
        self.cluster.undrain(*names)
        self.ledger.note("undrain", nodes=" ".join(names))

    def _restart_the_controller(self) -> None:
        self.cluster.stop_controller()
        self.ledger.note("controller stops")
        self._pause(1, 8)
        self.cluster.start_controller()
        self.ledger.note("controller back")

    def _lose_the_accounting(self) -> None:
        self.cluster.stop_accounting()
        self.ledger.note("accounting away")
        self._pause(5, 20)
        self.cluster.start_accounting()
        self.ledger.note("accounting back")
