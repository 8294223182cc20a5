"""`graftvit push`, as typed; that what went up comes down again is shown by `acceptance/test_artefacts.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from graftvit.launch.cli import main
from huggingface_hub import ModelCard
from support.hub.hub_client import use_hub
from support.hub.hub_server import Fault, Hub, closed_port
from support.hub.hub_uploads import Store, serve_uploads
from support.runs.engine_runs import make_teacher
from support.runs.typed import Typed

LICENSE = "cc-by-nc-4.0"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Hub, Store]]:
    with serve_uploads() as (server, store):
        use_hub(monkeypatch, server, tmp_path / "home")
        yield server, store


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A student's folder with a license that not everybody likes, beside what must not go up."""
    folder = make_teacher(tmp_path / "student")
    held = json.loads((folder / "config.json").read_text())
    held["pretrained_cfg"]["license"] = LICENSE
    (folder / "config.json").write_text(json.dumps(held))
    (folder / "secret.txt").write_text("mine")
    return folder


def names(hub: Hub, repository: str = "org/vit") -> list[str]:
    return hub.names(repository, hub.refs[repository]["main"])


def test_a_dry_run_shows_what_would_go_up_and_sends_nothing(
    hub: tuple[Hub, Store], student: Path, typed: Typed
) -> None:
    shown = typed(f"push {student} org/vit --dry_run --private").out
    size = f"{(student / 'model.safetensors').stat().st_size:,} bytes"
    license = (f"License: {LICENSE}", f"license: {LICENSE}")
    wanted = (size, "config.json", "README.md", *license, "it would be created", "Not pushed: secret.txt")
    assert [words for words in wanted if words not in shown] == []
    assert {request.method for request in hub[0].requests} <= {"GET", "HEAD"}
    assert not hub[1].created


def test_a_dry_run_works_without_a_network(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: Typed
) -> None:
    use_hub(monkeypatch, closed_port(), tmp_path / "home")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    shown = typed("push", student, "org/vit", "--dry_run").out
    (line,) = [line for line in shown.splitlines() if line.startswith("On the hub")]
    assert line.startswith("On the hub: unknown, because http://")
    assert line.endswith(" cannot be reached, or it hung up")


def test_a_dry_run_says_what_it_would_replace(hub: tuple[Hub, Store], student: Path, typed: Typed) -> None:
    typed("push", student, "org/vit")
    assert "The hub already had all files." in typed("push", student, "org/vit").out
    shown = typed("push", student, "org/vit", "--dry_run").out
    assert "On the hub: a public repository" in shown
    assert "Replaced there: README.md, config.json, model.safetensors" in shown
    assert len(hub[1].commits) == 1


def test_private_branch_and_message(hub: tuple[Hub, Store], student: Path) -> None:
    words = ["--private", "--revision", "ema", "--message", "The average"]
    assert main(["push", str(student), "org/vit", *words]) == 0
    (commit,) = hub[1].commits
    assert (commit.branch, commit.message) == ("ema", "The average")
    assert "org/vit" in hub[0].private
    assert names(hub[0]) == [".gitattributes"]


def test_what_lies_beside_a_student_stays_and_is_said(
    hub: tuple[Hub, Store], student: Path, typed: Typed
) -> None:
    assert "not pushed: secret.txt" in typed("push", student, "org/vit").err
    assert "secret.txt" not in names(hub[0])


def test_another_license_must_be_confirmed(hub: tuple[Hub, Store], student: Path, typed: Typed) -> None:
    words = ["push", str(student), "org/vit", "--license", "mit"]
    assert "--confirm_license" in typed(*words, code=2).err
    assert not hub[1].created
    assert "license: mit" in typed(*words, "--confirm_license").out
    card = hub[0].files["org/vit", hub[1].commits[0].oid, "README.md"].decode()
    assert ModelCard(card).data.license == "mit"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["org/vit", "--license", " "], "--license is empty"),
        (["org/vit", "--license", "no-such-license"], "no-such-license"),
        (["org/vit", "--message", ""], "--message is empty"),
        (["vit"], "write org/name"),
        (["org/vit", "--privat"], "--privat"),
        (["other/vit"], "you may not write to other/vit"),
        ([], "ORG/NAME"),
    ],
)
def test_a_mistake_is_one_sentence(
    hub: tuple[Hub, Store], student: Path, typed: Typed, words: list[str], said: str
) -> None:
    sentence = typed("push", student, *words, code=2).err.splitlines()[-1]
    assert sentence.startswith("graftvit: error: ")
    assert said in sentence
    assert not hub[1].commits


def test_a_hub_that_is_down_is_exit_code_1(
    hub: tuple[Hub, Store], student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub[0].faults.append(Fault(status=503, times=99))
    assert main(["push", str(student), "org/vit"]) == 1


def test_help_has_examples(typed: Typed) -> None:
    shown = typed("push", "--help").out
    for words in ("--dry_run", "--private", "--license", "--confirm_license", "hf auth login"):
        assert words in shown
    assert shown.count("graftvit push ") >= 4
