"""What the hub refuses: one sentence that says what to do and shows no token."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from graftvit.checkpoints.hub import download, explained
from graftvit.models.errors import CheckpointError
from huggingface_hub import constants
from support.hub.hub_server import COMMIT, TOKEN, Fault, Hub

Refused = Callable[..., str]
LOGIN = "log in with `hf auth login` or set HF_TOKEN"


@pytest.fixture
def token(client: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def test_a_token_that_the_hub_does_not_know(
    server: Hub, refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another_one")
    assert refused() == f"{server.url} refuses your token (401): correct or unset HF_TOKEN"
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text("hf_another_one\n")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert refused() == f"{server.url} refuses your token (401): log in again with `hf auth login`"


def test_gated_without_a_token(server: Hub, refused: Refused) -> None:
    server.gated.add("org/vit")
    page = f"{server.url}/org/vit"
    assert refused() == f"org/vit is gated: accept its terms on {page} and {LOGIN}"


@pytest.mark.usefixtures("token")
def test_gated_with_a_token_that_has_no_access(server: Hub, refused: Refused) -> None:
    server.gated.add("org/vit")
    page = f"{server.url}/org/vit"
    assert refused().startswith(
        f"org/vit is gated and your account has no access: accept its terms on {page}"
    )


@pytest.mark.parametrize("kind", ["gated", "private"])
@pytest.mark.usefixtures("token")
def test_what_the_account_may_read_comes(server: Hub, kind: str) -> None:
    getattr(server, kind).add("org/vit")
    server.readable.add("org/vit")
    assert download("org/vit", "config.json", None).is_file()


def test_a_private_repository_without_a_token(server: Hub, refused: Refused) -> None:
    server.private.add("org/vit")
    assert refused() == f"org/vit is not on {server.url}: check the name, or {LOGIN} if it is private"


@pytest.mark.usefixtures("token")
def test_a_private_repository_of_others(server: Hub, refused: Refused) -> None:
    server.private.add("org/vit")
    assert refused().endswith("check the name, or use a token that may read it if it is private")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("org/vitt", "org/vit"),
        ("org/VIT", "org/vit"),
        ("org/bar", "org/bare"),
        ("orgg/vit", "org/vit"),
        ("org/zzz", None),
    ],
)
def test_a_misspelt_repository(server: Hub, refused: Refused, name: str, near: str | None) -> None:
    hint = f" (did you mean {near!r}?)" if near else ""
    assert refused(repository=name).startswith(f"{name} is not on {server.url}{hint}: check the name")


def test_a_file_that_is_not_there(server: Hub, refused: Refused) -> None:
    assert (
        refused("modell.safetensors")
        == "org/vit has no 'modell.safetensors'; did you mean 'model.safetensors'?"
    )
    assert refused("x.npz") == "org/vit has no 'x.npz'; it has config.json, model.safetensors"
    server.files |= {("org/vit", COMMIT, f"{number}.txt"): b"" for number in range(9)}
    assert refused("x.npz").endswith(", 7.txt and 3 more")


def test_a_revision_that_is_not_there(server: Hub, refused: Refused) -> None:
    assert refused(revision="mian") == "org/vit has no revision 'mian': did you mean 'main'? it has main, v1"
    assert refused(revision="c" * 40).endswith("it has main, v1")


def test_a_hint_that_fails_hides_nothing(server: Hub, refused: Refused) -> None:
    server.faults.append(Fault(status=500, where="/api/", times=1000))
    page = f"{server.url}/org/vit"
    assert refused("x.npz") == f"org/vit has no 'x.npz'; {page}/tree/main lists what it has"
    assert refused(revision="v2") == f"org/vit has no revision 'v2': {page}/commits lists what it has"
    assert "org/absent is not on" in refused(repository="org/absent")


def test_a_server_that_is_no_hub(server: Hub, refused: Refused) -> None:
    server.faults.append(Fault(status=200, content=b"<html>log in to the hotel</html>", times=1000))
    assert "model.safetensors" in refused() or server.url in refused()


def test_a_name_that_the_hub_cannot_have(refused: Refused) -> None:
    assert refused(repository="org/a b").startswith("org/a b cannot be downloaded: ")


def test_a_cache_that_cannot_be_written(server: Hub, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("a file where the folder should be")
    assert refused().endswith("set HF_HOME to a folder that can")


@pytest.mark.usefixtures("token")
def test_nothing_shows_the_token(server: Hub, refused: Refused, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    said = [refused("absent.json"), refused(revision="v9"), refused(repository="org/absent")]
    for status in (400, 401, 403, 404, 429, 500):
        echo = Fault(status=status, headers={"X-Error-Message": f"no access for {TOKEN}"}, times=1000)
        server.faults = [echo]
        said.append(refused())
        server.faults = [
            Fault(cut=1000, method="GET", where="/cdn/"),
            Fault(status=status, where="/cdn/", times=1000),
        ]
        said.append(refused())
    server.faults = []
    download("org/vit", "model.safetensors", None)
    assert not any(TOKEN in text or "secret-of-a-signed-address" in text for text in said)
    # The transport below logs all headers of an answer when it is asked to, this one's echo of the token too.
    logged = [record for record in caplog.records if not record.name.startswith("httpcore")]
    assert not any(TOKEN in record.getMessage() for record in logged)
    assert {one.token for one in server.asked(where="/resolve/")} == {f"Bearer {TOKEN}"}
    assert {one.token for one in server.asked(where="/cdn/")} == {None}


def test_an_error_of_our_own_is_kept_as_it_is() -> None:
    for error in (KeyError("not the hub's"), CheckpointError("as it is")):
        with pytest.raises(type(error)) as caught, explained("org/vit"):
            raise error
        assert caught.value is error
