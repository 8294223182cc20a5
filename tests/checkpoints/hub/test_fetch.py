"""Files that come cut, short, long or altered: they go on where they stopped, or do not enter the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from graftvit.checkpoints.hub.download import download
from graftvit.checkpoints.hub.fetch import DamagedError, check
from hub_server import COMMIT, Fault, Hub, git_hash

WEIGHTS = "model.safetensors"
DIGEST = "/cdn/"


def content_of(server: Hub, name: str = WEIGHTS) -> bytes:
    return server.files["org/vit", COMMIT, name]


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("times", [1, 3])
def test_a_download_that_is_cut_goes_on_there(
    server: Hub, waits: list[float], times: int, reset: bool
) -> None:
    server.faults.append(Fault(cut=3000, reset=reset, method="GET", where=DIGEST, times=times))
    content = content_of(server)
    assert download("org/vit", WEIGHTS, None).read_bytes() == content
    starts = [int((one.range or "bytes=0-")[6:-1]) for one in server.asked("GET", DIGEST)]
    assert len(starts) == times + 1
    if not reset:  # a reset may take bytes along that were on the way
        assert starts == [3000 * cut for cut in range(times + 1)]
        assert server.sent == len(content)
    assert starts == sorted(starts)


def test_what_an_interrupted_run_has_kept_is_not_sent_again(server: Hub, refused: Callable[..., str]) -> None:
    server.faults += [
        Fault(cut=4000, method="GET", where=DIGEST),
        Fault(status=403, method="GET", where=DIGEST),
    ]
    refused()
    assert server.sent == 4000
    assert download("org/vit", WEIGHTS, None).read_bytes() == content_of(server)
    assert server.asked("GET", DIGEST)[-1].range == "bytes=4000-"
    assert server.sent == len(content_of(server))


def test_a_server_that_ignores_ranges_sends_it_all(server: Hub, waits: list[float]) -> None:
    server.faults += [
        Fault(cut=4000, method="GET", where=DIGEST),
        Fault(ignore_range=True, method="GET", where=DIGEST, times=2),
    ]
    assert download("org/vit", WEIGHTS, None).read_bytes() == content_of(server)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "altered": lambda content: content[::-1],
    "short": lambda content: content[: len(content) // 2],
    "long": lambda content: content + b"more",
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_damage_that_stays_never_enters_the_cache(
    server: Hub, refused: Callable[..., str], blobs: Callable[[], list[str]], name: str, damage: str
) -> None:
    altered = DAMAGES[damage](content_of(server, name))
    server.faults.append(Fault(content=altered, method="GET", where=_place(server, name), times=1000))
    sentence = refused(name)
    if damage == "empty":
        assert sentence.endswith(
            "check the network, or download its files elsewhere and give the folder as local-dir:path"
        )
    else:
        assert sentence.startswith(f"{name} of org/vit came damaged twice and was removed: ")
    assert not any(one.endswith("incomplete") for one in blobs() if damage != "empty")
    server.faults.clear()
    assert download("org/vit", name, None).read_bytes() == content_of(server, name)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_damage_on_the_way_is_downloaded_again(
    server: Hub, waits: list[float], name: str, damage: str
) -> None:
    altered = DAMAGES[damage](content_of(server, name))
    server.faults.append(Fault(content=altered, method="GET", where=_place(server, name)))
    assert download("org/vit", name, None).read_bytes() == content_of(server, name)


def _place(server: Hub, name: str) -> str:
    return f"/cdn/{hashlib.sha256(content_of(server)).hexdigest()}" if name == WEIGHTS else f"/{name}"


def test_hashes_of_both_kinds_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    check(path, hashlib.sha256(b"content").hexdigest())
    check(path, git_hash(b"content"))
    check(path, hashlib.sha1(b"content").hexdigest())
    check(path, "W-an-etag-of-no-known-kind")
    for wrong in ("0" * 64, "0" * 40):
        with pytest.raises(DamagedError, match=f"instead of {wrong}"):
            check(path, wrong)
