"""The real hub client of this process, pointed at a server of `hub_server`, with a cache of its own."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from huggingface_hub import constants, file_download

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def point_client(
    monkeypatch: pytest.MonkeyPatch, url: str, cache: Path, token: str | None = None
) -> list[float]:
    """Sets what the client reads of its environment at import; the list fills with the seconds it would wait.

    Chunks are small, so that a small file can be cut; waits are skipped; timeouts are short.
    """
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", *PROXIES):
        monkeypatch.delenv(name, raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    move_client(monkeypatch, url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache.parent / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    return skip_waits(monkeypatch)


def move_client(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Sets the address of the hub."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    # the client before its version 1 has copied the name
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


def skip_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Makes `time.sleep` of a second and more return at once, and lists those."""
    waits: list[float] = []
    sleep = time.sleep

    def short(seconds: float) -> None:
        if seconds >= 1:
            waits.append(seconds)
        sleep(min(seconds, 0.001) if seconds >= 1 else seconds)

    monkeypatch.setattr(time, "sleep", short)
    return waits
