"""Pushing through the real client, to a hub on this machine that takes it, refuses it, or breaks down."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from graftvit.checkpoints.upload import (
    Pushed,
    UploadFailedError,
    ask_remote,
    plan_upload,
    push_student,
    replaced_and_removed,
)
from graftvit.models.errors import CheckpointError
from huggingface_hub import constants
from support.hub.hub_client import use_hub
from support.hub.hub_server import TOKEN, Fault, Hub, closed_port
from support.hub.hub_uploads import Store, serve_uploads
from support.models.tiny_students import write_tiny_student


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Hub, Store]]:
    with serve_uploads() as (server, store):
        use_hub(monkeypatch, server, tmp_path / "home")
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        yield server, store


def write_licensed(folder: Path, **how: Any) -> Path:
    return write_tiny_student(folder, **{"license": "mit"} | how)


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return write_licensed(tmp_path / "student")


def push(
    folder: Path,
    name: str = "org/vit",
    private: bool = False,
    message: str | None = None,
    public: bool = False,
    **how: Any,
) -> Pushed:
    upload = plan_upload(folder, name, **how)
    return push_student(upload, private=private, public=public, message=message)


def refusal(folder: Path, name: str = "org/vit", code: int = 2, **how: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        push(folder, name, **how)
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert caught.value.exit_code == code
    return str(caught.value)


def test_one_commit_brings_all_files(hub: tuple[Hub, Store], student: Path) -> None:
    server, store = hub
    pushed = push(student, message="A student", private=True)
    (commit,) = store.commits
    assert commit.added == ["README.md", "config.json", "model.safetensors"]
    assert (commit.message, commit.branch, commit.deleted) == ("A student", "main", [])
    assert (pushed.url, pushed.changed) == (f"{server.url}/org/vit/commit/{commit.oid}", True)
    assert (
        server.files["org/vit", commit.oid, "model.safetensors"]
        == (student / "model.safetensors").read_bytes()
    )
    assert "org/vit" in server.private
    assert len(store.cards) == 1


def test_a_second_push_sends_only_what_changed(hub: tuple[Hub, Store], student: Path) -> None:
    server, store = hub
    first = push(student)
    again = push(student)
    assert not again.changed
    assert again.commit == first.commit
    assert len(server.asked("PUT", "/upload/")) == 1
    write_licensed(student)
    third = push(student)
    assert store.commits[-1].added == ["model.safetensors"]
    assert store.commits[-1].parent == first.commit
    assert (third.changed, len(store.created)) == (True, 1)


def test_a_branch_is_made_where_it_is_not_there(hub: tuple[Hub, Store], student: Path) -> None:
    server, store = hub
    push(student, revision="ema")
    push(student, revision="ema")
    assert [commit.branch for commit in store.commits] == ["ema"]
    assert set(server.refs["org/vit"]) == {"main", "ema"}
    push(student, revision="main")
    assert store.commits[-1].branch == "main"


def test_weights_of_another_layout_do_not_stay(hub: tuple[Hub, Store], student: Path, tmp_path: Path) -> None:
    server, store = hub
    push(student)
    sharded = write_licensed(tmp_path / "sharded", max_shard_size=8000)
    upload = plan_upload(sharded, "org/vit")
    assert replaced_and_removed(upload, ask_remote(upload)) == (
        ["README.md", "config.json"],
        ["model.safetensors"],
    )
    push(sharded)
    assert store.commits[-1].deleted == ["model.safetensors"]
    push(student)
    left = server.names("org/vit", store.commits[-1].oid)
    assert left == [".gitattributes", "README.md", "config.json", "model.safetensors"]


def test_a_card_that_a_person_edited_on_the_hub_stays(hub: tuple[Hub, Store], student: Path) -> None:
    server, store = hub
    push(student)
    edited = b"---\nlicense: mit\n---\n# Edited there\n"
    server.files["org/vit", store.commits[-1].oid, "README.md"] = edited
    write_licensed(student)
    assert push(student).kept_card
    assert server.files["org/vit", store.commits[-1].oid, "README.md"] == edited
    (student / "README.md").write_text("---\nlicense: mit\n---\n# Edited here\n")
    assert not push(student).kept_card
    assert b"Edited here" in server.files["org/vit", store.commits[-1].oid, "README.md"]


def test_a_card_on_the_hub_must_name_the_license_too(
    hub: tuple[Hub, Store], student: Path, tmp_path: Path
) -> None:
    server, store = hub
    push(student)
    server.files["org/vit", store.commits[-1].oid, "README.md"] = b"---\nlicense: mit\n---\n# Edited there\n"
    stricter = write_licensed(tmp_path / "stricter", license="cc-by-nc-4.0")
    assert "README.md on the hub mit is not cc-by-nc-4.0" in refusal(stricter)
    assert len(store.commits) == 1


def test_a_public_repository_does_not_become_private_by_a_push(hub: tuple[Hub, Store], student: Path) -> None:
    push(student)
    assert "is there and public" in refusal(student, private=True)


def test_nobody_may_push_without_a_token(
    hub: tuple[Hub, Store], student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub(monkeypatch, hub[0], tmp_path / "home", token=None)
    assert "(401), you are not logged in: `hf auth login`" in refusal(student)
    use_hub(monkeypatch, hub[0], tmp_path / "home", token="hf_wrong_token_of_somebody")
    sentence = refusal(student)
    assert "(401), your token is refused" in sentence
    assert "hf_wrong" not in sentence
    assert not hub[1].commits


def test_nobody_may_push_for_somebody_else(hub: tuple[Hub, Store], student: Path) -> None:
    assert "may not write to somebody/vit (403)" in refusal(student, "somebody/vit")
    assert not hub[1].objects


def test_a_change_by_somebody_else_is_not_overwritten(hub: tuple[Hub, Store], student: Path) -> None:
    push(student)
    write_licensed(student)
    upload = plan_upload(student, "org/vit")
    hub[0].faults.append(Fault(method="POST", where="/preupload/", hang=0.2))
    hub[0].faults.append(Fault(method="POST", where="/commit/", status=412, content=b'{"error": "moved"}'))
    with pytest.raises(CheckpointError, match=r"changed by somebody else meanwhile \(412\)"):
        push_student(upload)
    assert len(hub[1].commits) == 1


def test_the_parent_is_the_commit_that_was_looked_at(
    hub: tuple[Hub, Store], student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, store = hub
    push(student)
    upload = plan_upload(write_licensed(tmp_path / "mine"), "org/vit")
    seen = ask_remote(upload)
    push(write_licensed(tmp_path / "theirs"))
    monkeypatch.setattr("graftvit.checkpoints.upload.ask_remote", lambda upload: seen)
    with pytest.raises(CheckpointError, match="changed by somebody else"):
        push_student(upload)
    assert len(store.commits) == 2
    assert store.commits[1].parent == store.commits[0].oid == seen.commit
    assert server.refs["org/vit"]["main"] == store.commits[1].oid


def test_a_push_that_failed_at_its_end_goes_on_from_there(hub: tuple[Hub, Store], student: Path) -> None:
    server, store = hub
    server.faults.append(Fault(status=500, where="/commit/", times=1))
    sentence = refusal(student, code=1)
    assert "fails with 500" in sentence
    assert "not sent twice" in sentence
    assert len(server.asked("PUT", "/upload/")) == 1
    push(student)
    assert len(store.commits) == 1
    assert len(server.asked("PUT", "/upload/")) == 1


@pytest.mark.parametrize(
    "where", ["/api/repos/create", "/api/models/org/vit", "/preupload/", "/objects/batch", "/upload/"]
)
def test_a_hub_that_stays_down_ends_in_one_sentence(
    hub: tuple[Hub, Store], student: Path, where: str
) -> None:
    hub[0].faults.append(Fault(status=503, where=where, times=99))
    assert "org/vit cannot be pushed" in refusal(student, code=1)


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (400, 2, "refused the push"), (404, 2, "(404)"), (409, 2, "(409)"), (413, 2, "refused the push"),
        (418, 2, "refused the push"), (429, 1, "limits the rate"), (500, 1, "fails with 500"), (403, 2, "(403)"),
        (402, 2, "refused the push"),
    ],
)  # fmt: skip
def test_each_refusal_of_the_commit_is_one_sentence(
    hub: tuple[Hub, Store], student: Path, status: int, code: int, words: str
) -> None:
    echo = {"X-Error-Message": f"no, Bearer {TOKEN} may not"}
    hub[0].faults.append(Fault(status=status, where="/commit/", headers=echo, times=99))
    assert words in refusal(student, code=code)


@pytest.mark.parametrize("status", [400, 403, 429, 500])
@pytest.mark.parametrize(
    "where", ["/validate-yaml", "/preupload/", "/objects/batch", "/upload/", "/commit/", "/settings"]
)
def test_a_push_that_fails_leaves_nothing_public(
    hub: tuple[Hub, Store], student: Path, where: str, status: int
) -> None:
    server, _ = hub
    after = [Fault(where=where)] if where == "/settings" else []  # the first makes it private
    server.faults += [*after, Fault(status=status, where=where, times=99)]
    said = refusal(student, code=1 if status in (429, 500) or "yaml" in where else 2)
    assert server.private == {"org/vit"}
    assert said.endswith("; org/vit is private until it is pushed with --public")
    server.faults.clear()
    assert push(student).private
    assert server.private == {"org/vit"}
    assert not push(student, public=True).private
    assert not server.private


def test_a_push_is_public_once_all_of_it_is_there(hub: tuple[Hub, Store], student: Path) -> None:
    server, _ = hub
    assert not push(student).private
    assert [request.path for request in server.asked() if request.method in ("POST", "PUT")][-2:] == [
        "/api/models/org/vit/commit/main",
        "/api/models/org/vit/settings",
    ]
    assert "org/vit" not in server.private


def test_a_repository_that_cannot_be_made_private_stays_empty(hub: tuple[Hub, Store], student: Path) -> None:
    server, _ = hub
    server.faults.append(Fault(status=500, where="/settings", times=99))
    refusal(student, code=1)
    assert [name for repository, _, name in server.files if repository == "org/vit"] == [".gitattributes"]


def test_the_default_of_an_organization_is_kept(hub: tuple[Hub, Store], student: Path) -> None:
    hub[0].private_by_default.add("org")
    assert push(student).private
    assert not push(student, public=True).private


def test_a_private_push_that_fails_says_nothing_of_it(hub: tuple[Hub, Store], student: Path) -> None:
    hub[0].faults.append(Fault(status=500, where="/commit/", times=99))
    assert "--public" not in refusal(student, code=1, private=True)


def test_a_repository_that_was_private_before_stays_so(hub: tuple[Hub, Store], student: Path) -> None:
    push(student, private=True)
    write_licensed(student)
    assert push(student).private
    assert "org/vit" in hub[0].private


NONSENSE = (b"", b"[]", b"{}", b"not json", b'{"files": [{"path": "x"}]}')
ANSWERING = ("/preupload/", "/objects/batch", "/commit/", "/api/repos/create")


@pytest.mark.parametrize(
    ("where", "body"),
    [*product(ANSWERING, NONSENSE), *(("/validate-yaml", body) for body in (b"", b"[]", b"not json"))],
)
def test_a_hub_that_answers_nonsense_ends_in_one_sentence(
    hub: tuple[Hub, Store], student: Path, where: str, body: bytes
) -> None:
    hub[0].faults.append(Fault(status=200, content=body, where=where, times=99))
    with pytest.raises(CheckpointError, match=r"does not answer as a hub does|refused the push") as caught:
        push(student)
    assert "\n" not in str(caught.value)


def test_a_head_that_the_hub_refuses_is_said(hub: tuple[Hub, Store], student: Path) -> None:
    refused = b'{"errors": [{"message": "license is wrong"}], "warnings": []}'
    hub[0].faults.append(Fault(status=400, content=refused, where="/validate-yaml"))
    assert "license is wrong" in refusal(student)
    assert not hub[1].objects


def test_no_network_is_said(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, closed_port(), tmp_path / "home")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    said = refusal(student, code=1)
    assert "cannot be reached" in said
    assert said.endswith("; check the network and push again (what is uploaded already is not sent twice)")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(student, code=1)


def test_the_token_goes_to_the_hub_alone(hub: tuple[Hub, Store], student: Path) -> None:
    push(student)
    sent = {(request.host, request.token) for request in hub[0].requests if request.method in ("POST", "PUT")}
    assert sent == {("hub", f"Bearer {TOKEN}"), ("cdn", None)}
    assert UploadFailedError("x").exit_code == 1
