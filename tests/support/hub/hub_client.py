"""The real hub client, of this process or of another one, pointed at a server of `hub_server`, with its own cache."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from huggingface_hub import constants, file_download
from support.hub.hub_server import TOKEN, Hub

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def use_hub(monkeypatch: pytest.MonkeyPatch, hub: Hub | str, home: Path, token: str | None = TOKEN) -> None:
    """Set what the client of this process reads of its environment at import; log in with `token`."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", *PROXIES):
        monkeypatch.delenv(name, raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    move_client(monkeypatch, hub if isinstance(hub, str) else hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def move_client(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Set the address of the hub."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    # the client before its version 1 has copied the name
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


def be_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the client's timeouts and skip its waits; cut downloads into small chunks, so that a file can break."""
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    sleep = time.sleep
    monkeypatch.setattr(
        time, "sleep", lambda seconds: sleep(min(seconds, 0.001) if seconds >= 1 else seconds)
    )


def client_environment(hub: Hub | str, home: Path, **more: str) -> dict[str, str]:
    """Return the environment of a process whose client talks to this hub, logged in, with its own cache."""
    dropped = ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN_PATH", *PROXIES)
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    address = hub if isinstance(hub, str) else hub.url
    mine = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    return kept | mine | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"} | more
