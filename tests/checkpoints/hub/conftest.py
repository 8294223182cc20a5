"""A hub with two commits of one repository, and the real client pointed at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from graftvit.checkpoints.hub.download import download
from graftvit.models.errors import CheckpointError
from hub_client import point_client
from hub_server import COMMIT, Hub, serve

OLD = "b" * 40
CONTENT = bytes(range(256)) * 40  # 10,240 bytes
CONFIG = b'{"architecture": "vit_tiny_patch16_224"}'


@pytest.fixture
def server() -> Iterator[Hub]:
    files = {
        ("org/vit", COMMIT, "model.safetensors"): CONTENT,
        ("org/vit", COMMIT, "config.json"): CONFIG,
        ("org/vit", OLD, "model.safetensors"): CONTENT[::-1],
        ("org/bare", COMMIT, "README.md"): b"",
    }
    with serve(files, refs={"org/vit": {"main": COMMIT, "v1": OLD}}) as hub:
        yield hub


@pytest.fixture
def waits(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the client would have waited."""
    return point_client(monkeypatch, server.url, tmp_path / "cache")


@pytest.fixture
def blobs(tmp_path: Path) -> Callable[[], list[str]]:
    """The names of what the cache holds, unfinished files among them."""
    return lambda: sorted(path.name for path in (tmp_path / "cache").glob("models--*/blobs/*"))


@pytest.fixture
def refused(waits: list[float]) -> Callable[..., str]:
    """The sentence of a download that is refused."""

    def sentence(
        name: str = "model.safetensors", repository: str = "org/vit", revision: str | None = None
    ) -> str:
        with pytest.raises(CheckpointError) as caught:
            download(repository, name, revision)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return sentence
