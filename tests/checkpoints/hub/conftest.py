"""A hub with two commits of one repository, and the real client pointed at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from graftvit.checkpoints.hub import download
from graftvit.models.errors import CheckpointError
from support.hub.hub_client import be_impatient, use_hub
from support.hub.hub_server import COMMIT, Hub, serve

OLD = "b" * 40
CONTENT = bytes(range(256)) * 40  # 10,240 bytes
CONFIG = b'{"architecture": "vit_tiny_patch16_224"}'


@pytest.fixture
def server() -> Iterator[Hub]:
    files = {
        ("org/vit", COMMIT, "model.safetensors"): CONTENT, ("org/vit", COMMIT, "config.json"): CONFIG,
        ("org/vit", OLD, "model.safetensors"): CONTENT[::-1], ("org/bare", COMMIT, "README.md"): b"",
    }  # fmt: skip
    with serve(files, refs={"org/vit": {"main": COMMIT, "v1": OLD}}) as hub:
        yield hub


@pytest.fixture
def client(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the client of this process at the hub, without a token."""
    use_hub(monkeypatch, server, tmp_path, token=None)
    be_impatient(monkeypatch)


@pytest.fixture
def refused(client: None) -> Callable[..., str]:
    """The sentence of a download that is refused."""

    def sentence(
        name: str = "model.safetensors", repository: str = "org/vit", revision: str | None = None
    ) -> str:
        with pytest.raises(CheckpointError) as caught:
            download(repository, name, revision)
        return str(caught.value)

    return sentence
