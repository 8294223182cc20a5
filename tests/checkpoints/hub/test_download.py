"""The cache and revisions: what is asked of the hub, what is not, and what happens without a network."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from graftvit.checkpoints.hub import commit_of, download, try_download
from huggingface_hub import constants, hf_hub_download
from support.hub.hub_client import move_client
from support.hub.hub_server import COMMIT, Fault, Hub, closed_port

WEIGHTS = "model.safetensors"
OLD = "b" * 40
Refused = Callable[..., str]


@pytest.fixture
def gone(server: Hub, client: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Takes the hub off the network."""

    def go() -> str:
        address = closed_port()
        move_client(monkeypatch, address)
        return address

    return go


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("revision", "commit"), [(None, COMMIT), ("main", COMMIT), ("v1", OLD), (OLD, OLD), (COMMIT, COMMIT)]
)
def test_a_revision_is_a_branch_a_tag_or_a_commit(
    server: Hub, client: None, revision: str | None, commit: str
) -> None:
    path = download("org/vit", WEIGHTS, revision)
    assert path.read_bytes() == server.files["org/vit", commit, WEIGHTS]
    assert commit_of(path) == commit


def test_a_pinned_commit_stays_while_its_branch_moves(server: Hub, client: None) -> None:
    pinned = download("org/vit", WEIGHTS, None)
    server.refs["org/vit"]["main"] = OLD
    asked = len(server.requests)
    assert download("org/vit", WEIGHTS, COMMIT) == pinned
    assert len(server.requests) == asked
    assert commit_of(download("org/vit", WEIGHTS, None)) == OLD
    assert commit_of(download("org/vit", "config.json", COMMIT)) == COMMIT


def test_the_client_finds_what_was_downloaded(server: Hub, client: None, offline: Callable[[], None]) -> None:
    path = download("org/vit", WEIGHTS, "v1")
    offline()
    assert hf_hub_download("org/vit", WEIGHTS, revision="v1") == str(path)


def test_what_the_client_has_downloaded_is_found(
    server: Hub, client: None, offline: Callable[[], None]
) -> None:
    path = hf_hub_download("org/vit", WEIGHTS)
    sent = server.sent
    assert str(download("org/vit", WEIGHTS, None)) == path
    offline()
    assert str(download("org/vit", WEIGHTS, None)) == path
    assert server.sent == sent


def test_no_network_goes_on_with_the_cache(
    server: Hub, gone: Callable[[], str], caplog: pytest.LogCaptureFixture
) -> None:
    path = download("org/vit", WEIGHTS, None)
    address = gone()
    with caplog.at_level(logging.WARNING, "graftvit"):
        assert download("org/vit", WEIGHTS, None) == path
    (said,) = (record.getMessage() for record in caplog.records if record.name.startswith("graftvit"))
    assert said.startswith(f"{address} cannot be asked for org/vit (")
    assert said.endswith(f"using commit {COMMIT} of the cache")


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_a_hub_that_refuses_later_leaves_the_cache(server: Hub, client: None, status: int) -> None:
    path = download("org/vit", WEIGHTS, None)
    server.faults.append(Fault(status=status, times=1000))
    assert download("org/vit", WEIGHTS, None) == path
    assert download("org/vit", WEIGHTS, COMMIT) == path


def test_no_network_and_no_cache(gone: Callable[[], str], refused: Refused) -> None:
    address = gone()
    assert refused() == (
        f"{WEIGHTS} of org/vit is not in the cache and {address} cannot be reached: check the network, "
        "or download its files elsewhere and give the folder as local-dir:path"
    )


def test_offline_with_a_cache_asks_nothing(
    server: Hub, client: None, offline: Callable[[], None], refused: Refused
) -> None:
    paths = [download("org/vit", WEIGHTS, revision) for revision in (None, "v1")]
    assert try_download("org/vit", "absent", None) is None
    offline()
    asked = len(server.requests)
    assert [download("org/vit", WEIGHTS, revision) for revision in (None, "v1")] == paths
    assert try_download("org/vit", "absent", None) is None
    assert len(server.requests) == asked
    assert refused("config.json").startswith(
        "config.json of org/vit is not in the cache and HF_HUB_OFFLINE is set"
    )


def test_offline_without_a_cache(server: Hub, offline: Callable[[], None], refused: Refused) -> None:
    offline()
    assert refused() == (
        "model.safetensors of org/vit is not in the cache and HF_HUB_OFFLINE is set: unset it, "
        "or download its files elsewhere and give the folder as local-dir:path"
    )
    assert not server.requests


def test_a_server_that_hangs_is_not_waited_for(server: Hub, client: None) -> None:
    path = download("org/vit", WEIGHTS, None)
    server.faults.append(Fault(hang=30, times=1000))
    assert download("org/vit", WEIGHTS, None) == path


def test_a_file_that_the_repository_lacks_is_none(server: Hub, client: None) -> None:
    assert try_download("org/vit", "absent", None) is None
    assert try_download("org/vit", "config.json", "v1") is None


def test_a_failure_that_stays_is_given_up(server: Hub, refused: Refused) -> None:
    server.faults = [Fault(status=503, times=1000)]
    assert f"{server.url} fails with 503: try again later" in refused()
    server.faults = [Fault(status=429, times=1000)]
    assert refused().startswith(f"{server.url} limits the rate of requests (429): wait a while, or log in")
    server.faults = [Fault(cut=0, method="GET", where="/cdn/", times=1000)]
    assert refused().startswith(
        f"{WEIGHTS} of org/vit is not in the cache and {server.url} cannot be reached"
    )
