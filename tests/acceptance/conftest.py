"""The photographs, a process with timm alone, and a hub, for all tests of a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.files.photos import make_photo_folder
from support.files.plain_timm import PlainTimm
from support.hub.hub_client import client_environment, use_hub
from support.hub.hub_server import Hub
from support.hub.hub_uploads import serve_uploads


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder: `train/` and `validation/`, six classes, formats and shapes of all kinds."""
    return make_photo_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub on this machine that takes uploads, and this process as its client."""
    with pytest.MonkeyPatch.context() as patch, serve_uploads() as (server, _):
        use_hub(patch, server, tmp_path_factory.mktemp("home"))
        yield server


@pytest.fixture(scope="session")
def plain_timm(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlainTimm]:
    """What somebody has who never heard of this project: timm, and the hub with an empty cache."""
    with PlainTimm(client_environment(hub, tmp_path_factory.mktemp("elsewhere"))) as process:
        yield process
