"""Two processes that download the same file at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hub_client import PROXIES
from hub_server import COMMIT, Fault, Hub

MIB = 1 << 20
WEIGHTS = "model.safetensors"
CLIENT = f"""
from graftvit.checkpoints.hub.download import download
print(download("org/vit", "{WEIGHTS}", None))
"""


def start(server: Hub, tmp_path: Path) -> subprocess.Popen[str]:
    kept = {key: value for key, value in os.environ.items() if key not in PROXIES and key[:3] != "HF_"}
    settings = {"HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path)}
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT], env={**kept, **settings}, text=True, stdout=subprocess.PIPE
    )


def test_two_at_once_download_it_once(server: Hub, tmp_path: Path) -> None:
    content = server.files["org/vit", COMMIT, WEIGHTS] = os.urandom(2 * MIB)
    server.faults.append(Fault(hang=1.5, method="GET", where="/cdn/"))
    both = [start(server, tmp_path) for _ in range(2)]
    paths = {client.communicate(timeout=60)[0].strip() for client in both}
    assert [client.returncode for client in both] == [0, 0]
    assert len(paths) == 1
    assert Path(*paths).read_bytes() == content
    assert server.sent == len(content)
