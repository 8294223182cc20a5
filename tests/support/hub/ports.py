"""Ports of this machine for what tests start."""

from __future__ import annotations

import os
import random
import socket


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now, nor soon: below those of runs on a cluster and of outgoing connections.

    Each worker of pytest has its own, so that no two take the same one between this call and their daemons' start.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(10000 + worker, 20000, workers)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))  # on every address, as slurmd does
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found
