"""Downloads of several processes: one that is killed, and two at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from graftvit.checkpoints.hub.download import download
from hub_client import PROXIES
from hub_server import COMMIT, Fault, Hub
from patience import until

MIB = 1 << 20
WEIGHTS = "model.safetensors"
CLIENT = f"""
from graftvit.checkpoints.hub.download import download
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = {MIB}
print(download("org/vit", "{WEIGHTS}", None))
"""


def start(server: Hub, tmp_path: Path) -> subprocess.Popen[str]:
    kept = {key: value for key, value in os.environ.items() if key not in PROXIES and key[:3] != "HF_"}
    settings = {"HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path)}
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT], env={**kept, **settings}, text=True, stdout=subprocess.PIPE
    )


def test_a_killed_download_goes_on_where_it_was(server: Hub, waits: list[float], tmp_path: Path) -> None:
    content = server.files["org/vit", COMMIT, WEIGHTS] = os.urandom(3 * MIB)
    server.faults.append(Fault(cut=2 * MIB, stall=60, method="GET", where="/cdn/"))
    killed = start(server, tmp_path)
    parts = (tmp_path / "cache").glob
    until(lambda: any(part.stat().st_size == 2 * MIB for part in parts("*/blobs/*.incomplete")), "the part")
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert download("org/vit", WEIGHTS, None).read_bytes() == content
    assert server.asked("GET", "/cdn/")[-1].range == f"bytes={2 * MIB}-"
    assert server.sent == len(content)


def test_two_at_once_download_it_once(server: Hub, tmp_path: Path) -> None:
    content = server.files["org/vit", COMMIT, WEIGHTS] = os.urandom(2 * MIB)
    server.faults.append(Fault(hang=1.5, method="GET", where="/cdn/"))
    both = [start(server, tmp_path) for _ in range(2)]
    paths = {client.communicate(timeout=60)[0].strip() for client in both}
    assert [client.returncode for client in both] == [0, 0]
    assert len(paths) == 1
    assert Path(*paths).read_bytes() == content
    assert server.sent == len(content)
