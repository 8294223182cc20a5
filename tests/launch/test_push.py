"""`graftvit push`, as typed: a run of `graftvit train` goes up and comes down again, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from graftvit.launch.cli import main
from graftvit.models.conversion import convert
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from support.hub.hub_client import client_environment, use_hub
from support.hub.hub_server import Fault, Hub, closed_port
from support.hub.hub_uploads import Store, serve_uploads
from support.runs.engine_runs import ARCHITECTURE, ARGUMENTS, config, make_teacher

POOL = "avg"
"""Of a student from scratch; one that starts from the teacher pools as the teacher does."""
LICENSE = "cc-by-nc-4.0"
OF_HUB = {
    "timm": 'timm.create_model("hf-hub:org/vit", pretrained=True)',
    "graftvit": 'graftvit.load("hf-hub:org/vit")',
}
CLIENT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "graftvit":
            raise ModuleNotFoundError(name)
alone, images, logits = sys.argv[1:]
if alone == "timm":
    sys.meta_path.insert(0, Absent())
    try:
        import graftvit
    except ModuleNotFoundError:
        pass
    else:
        raise SystemExit("graftvit is there")
else:
    import graftvit
import timm, torch
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
model = MODEL.eval()
with torch.no_grad():
    save_file({"logits": model(load_file(images)["images"])}, logits)
if alone == "timm" and any(name.partition(".")[0] == "graftvit" for name in sys.modules):
    raise SystemExit("graftvit was loaded")
"""


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


def trained(tmp_path: Path, **sections: Any) -> Path:
    """The student's folder of a run of `graftvit train` on digits, with its teacher beside it."""
    run = config(tmp_path / "run", make_teacher(tmp_path / "teacher"), **sections)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    return tmp_path / "run" / "student"


def downloaded_logits(hub: Hub, tmp_path: Path, images: torch.Tensor, by: str) -> torch.Tensor:
    """What the model of the hub computes in a new process, with an empty cache; by timm: without graftvit."""
    save_file({"images": images}, tmp_path / "images")
    words = [by, str(tmp_path / "images"), str(tmp_path / "logits")]
    done = subprocess.run(
        [sys.executable, "-c", CLIENT.replace("MODEL", OF_HUB[by]), *words],
        capture_output=True, text=True, check=False, timeout=120,
        env=client_environment(hub, tmp_path / "other_home"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return load_file(tmp_path / "logits")["logits"]


def own_logits(folder: Path, images: torch.Tensor, plan: str | None = None, pool: str = POOL) -> torch.Tensor:
    """The logits of the run's own weights, loaded here by none of what is tested."""
    model = timm.create_model(ARCHITECTURE, **ARGUMENTS, num_classes=10, global_pool=pool)
    model = model if plan is None else convert(model, plan)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(images)
    return logits


def names(hub: Hub, repository: str = "org/vit") -> list[str]:
    return hub.names(repository, hub.refs[repository]["main"])


@pytest.mark.slow
def test_a_trained_student_is_loaded_by_timm_alone(
    hub: tuple[Hub, Store], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, images = trained(tmp_path), torch.randn(4, 1, 8, 8)
    capsys.readouterr()
    assert main(["push", str(folder), "org/vit"]) == 0
    said = capsys.readouterr().out
    assert hub[1].commits[0].oid in said
    assert 'timm.create_model("hf-hub:org/vit", pretrained=True)' in said
    assert names(hub[0]) == [".gitattributes", "README.md", "config.json", "model.safetensors"]
    assert torch.equal(downloaded_logits(hub[0], tmp_path, images, "timm"), own_logits(folder, images))
    card = ModelCard(hub[0].files["org/vit", hub[1].commits[0].oid, "README.md"].decode())
    made = json.loads((folder / "config.json").read_text())["graftvit"]
    (top1, *_) = card.data.eval_results
    assert (top1.dataset_name, top1.metric_value) == ("digits", round(made["results"]["top1"], 3))
    assert card.data.library_name == "timm"
    assert str(tmp_path) not in card.content


@pytest.mark.slow
def test_a_trained_and_converted_student_is_loaded_by_graftvit(
    hub: tuple[Hub, Store], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, images = trained(tmp_path, mode="align", student={"plan": "*: linear"}), torch.randn(4, 1, 8, 8)
    assert main(["push", str(folder), "org/vit"]) == 0
    assert 'graftvit.load("hf-hub:org/vit")' in capsys.readouterr().out
    own = own_logits(folder, images, "*: linear", pool="token")
    assert torch.equal(downloaded_logits(hub[0], tmp_path, images, "graftvit"), own)
    plain = timm.create_model(ARCHITECTURE, **ARGUMENTS, num_classes=10, global_pool="token")
    plain.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not torch.equal(plain.eval()(images), own)


def test_a_dry_run_shows_what_would_go_up_and_sends_nothing(
    hub: tuple[Hub, Store], student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(student), "org/vit", "--dry_run", "--private"]) == 0
    shown = capsys.readouterr().out
    size = (student / "model.safetensors").stat().st_size
    assert f"{size:,} bytes" in shown
    for words in (
        "config.json",
        "README.md",
        f"License: {LICENSE}",
        f"license: {LICENSE}",
        "it would be created",
    ):
        assert words in shown
    assert "Not pushed: secret.txt" in shown
    assert {request.method for request in hub[0].requests} <= {"GET", "HEAD"}
    assert not hub[1].created


def test_a_dry_run_works_without_a_network(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_hub(monkeypatch, closed_port(), tmp_path / "home")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert main(["push", str(student), "org/vit", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if line.startswith("On the hub")]
    assert line.startswith("On the hub: unknown, because http://")
    assert line.endswith(" cannot be reached, or it hung up")


def test_a_dry_run_says_what_it_would_replace(
    hub: tuple[Hub, Store], student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(student), "org/vit"]) == 0
    assert main(["push", str(student), "org/vit"]) == 0
    assert "The hub already had all files." in capsys.readouterr().out
    assert main(["push", str(student), "org/vit", "--dry_run"]) == 0
    shown = capsys.readouterr().out
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
    hub: tuple[Hub, Store], student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(student), "org/vit"]) == 0
    assert "not pushed: secret.txt" in capsys.readouterr().err
    assert "secret.txt" not in names(hub[0])


def test_another_license_must_be_confirmed(
    hub: tuple[Hub, Store], student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["push", str(student), "org/vit", "--license", "mit"]
    assert main(words) == 2
    assert "--confirm_license" in capsys.readouterr().err
    assert not hub[1].created
    assert main([*words, "--confirm_license"]) == 0
    assert "license: mit" in capsys.readouterr().out
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
    hub: tuple[Hub, Store], student: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["push", str(student), *words]) == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("graftvit: error: ")
    assert said in sentence
    assert not hub[1].commits


def test_a_hub_that_is_down_is_exit_code_1(
    hub: tuple[Hub, Store], student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub[0].faults.append(Fault(status=503, times=99))
    assert main(["push", str(student), "org/vit"]) == 1


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", "--help"]) == 0
    shown = capsys.readouterr().out
    for words in ("--dry_run", "--private", "--license", "--confirm_license", "hf auth login"):
        assert words in shown
    assert shown.count("graftvit push ") >= 4
