"""What the hub can do wrong, through the real client, against a server that does it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from graftvit.checkpoints.hub.download import download
from graftvit.models.errors import CheckpointError
from hub_client import point_client
from hub_server import COMMIT, Hub, serve

OLD = "b" * 40
WEIGHTS = "model.safetensors"
CONTENT = bytes(range(256)) * 40  # 10,240 bytes
CONFIG = b'{"architecture": "vit_tiny_patch16_224"}'


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> Iterator[Hub]:
    files = {
        ("org/vit", COMMIT, WEIGHTS): CONTENT,
        ("org/vit", COMMIT, "config.json"): CONFIG,
        ("org/vit", OLD, WEIGHTS): CONTENT[::-1],
        ("org/bare", COMMIT, "README.md"): b"",
    }
    with serve(files, refs={"org/vit": {"main": COMMIT, "v1": OLD}}) as hub:
        found = point_client(monkeypatch, hub.url, tmp_path / "cache")
        waits[:] = found
        hub.waits = found  # type: ignore[attr-defined]
        yield hub


def blobs(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").glob("models--*/blobs/*"))


def refused(name: str = WEIGHTS, repository: str = "org/vit", revision: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        download(repository, name, revision)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence
