"""What a run knows of the weights it came from, and that it goes on with the same ones only."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from graftvit.checkpoints import weight_files
from graftvit.checkpoints.model_folders import Opened, open_source
from graftvit.checkpoints.pretrained import load_pretrained, load_weights
from graftvit.checkpoints.provenance import Pretrained
from graftvit.checkpoints.report import LoadReport
from graftvit.launch.plan_text import describe_plan
from graftvit.models.errors import CheckpointError, ConfigError
from graftvit.models.plain_yaml import parse_yaml
from graftvit.transfer.config import StudentConfig
from graftvit.transfer.engine import build as building
from graftvit.transfer.engine.build import identify_teachers
from graftvit.transfer.engine.resume_check import check_same_code, check_same_weights
from graftvit.transfer.engine.train import train
from safetensors.torch import load_file, save_file
from support.runs.engine_runs import config, make_convnext, make_teacher, several_losses, state

COMMIT, MOVED = "c" * 40, "d" * 40


class Hub:
    """Gives the local teacher as if it came from a hub whose main branch stands at `head`."""

    def __init__(self) -> None:
        self.head = self.commit = COMMIT
        self.asked: list[str | None] = []

    def open(self, source: str, revision: str | None = None) -> Opened:
        self.asked.append(revision)
        self.commit = revision if revision and len(revision) == 40 else self.head
        return open_source(source)

    def load(self, source: Opened, **how: Any) -> Pretrained:
        return replace(load_pretrained(source, **how), revision=self.commit, license="cc-by-nc-4.0")

    def start(self, *given: Any, **how: Any) -> LoadReport:
        return replace(load_weights(*given, **how), revision=self.commit, license="cc-by-nc-4.0")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(building, "open_source", hub.open)
    monkeypatch.setattr(building, "load_pretrained", hub.load)
    monkeypatch.setattr(building, "load_weights", hub.start)
    return hub


def test_the_commit_is_recorded_and_loaded_again(tmp_path: Path, teacher: Path, hub: Hub) -> None:
    run = config(tmp_path, teacher, optim={"max_steps": 3})
    train(run)
    written = parse_yaml((tmp_path / "config.yaml").read_text())
    assert written["teacher"]["revision"] == COMMIT
    hub.head = MOVED
    train(config(tmp_path, teacher, optim={"max_steps": 4}))
    assert hub.asked == [None, COMMIT]
    # the run's own config.yaml continues it too, and then the first command again; another commit does not
    again = run.model_validate(written | {"optim": written["optim"] | {"max_steps": 5}})
    assert train(again).steps == 5
    assert train(config(tmp_path, teacher, optim={"max_steps": 6})).steps == 6
    assert hub.asked[2:] == [COMMIT, COMMIT]
    with pytest.raises(ConfigError, match=r"teacher\.revision='d{40}', but the run .* was started with None"):
        train(config(tmp_path, teacher, optim={"max_steps": 7}).model_copy(
            update={"teacher": run.teacher.model_copy(update={"revision": MOVED})}))  # fmt: skip
    assert state(tmp_path)


@pytest.mark.parametrize("mode", ["transfer", "finetune"])
def test_students_say_what_they_learned_from(tmp_path: Path, teacher: Path, hub: Hub, mode: str) -> None:
    result = train(config(tmp_path, teacher, mode=mode, optim={"epochs": 1}))
    for folder, part in (("student", "student"), ("student_ema", "ema")):
        saved = json.loads((tmp_path / folder / "config.json").read_text())
        made = saved["graftvit"]
        assert made["part"] == part
        assert made["teacher"]["revision"] == COMMIT
        assert made["recipe"]["mode"] == mode
        assert "output_dir" not in made["recipe"]
        prefix = "test_ema_" if part == "ema" else "test_"
        assert (made["init"] or {}).get("revision") == (COMMIT if mode == "finetune" else None)
        assert made["results"]["top1"] == result.metrics[f"{prefix}top1"]
        assert saved["pretrained_cfg"]["license"] == "cc-by-nc-4.0"
        assert load_pretrained(str(tmp_path / folder)).license == "cc-by-nc-4.0"
    (tmp_path / "student" / "config.json").unlink()  # as a run that was stopped has none
    stopped = load_pretrained(str(tmp_path))
    assert stopped.license == "cc-by-nc-4.0"
    assert stopped.provenance["teacher"]["revision"] == COMMIT


def test_processes_that_compute_a_teacher_with_different_code_stop() -> None:
    origins = [{"teacher": {"library": f"timm {version}"}, "init": None} for version in "12"]
    check_same_code(origins[:1] * 2)
    check_same_code([{"teacher": None, "init": None}] * 2)
    with pytest.raises(CheckpointError, match=r"different code \(timm 1, timm 2\)"):
        check_same_code(origins)


@pytest.fixture
def own_teacher(tmp_path: Path) -> Path:
    return make_teacher(tmp_path / "vit")


def change(folder: Path, what: str) -> None:
    """Change the teacher behind a path: its numbers, their precision, its images, or its architecture."""
    if what in ("numbers", "half"):
        tensors = load_file(folder / "model.safetensors")
        tensors["blocks.0.attn.qkv.weight"][0, 0] += 1e-3 * (what == "numbers")
        made = {name: tensor.half() if what == "half" else tensor for name, tensor in tensors.items()}
        save_file(made, folder / "model.safetensors")
        return
    described = json.loads((folder / "config.json").read_text())
    section, values = {
        "mean": ("pretrained_cfg", {"mean": [0.25]}), "activation": ("model_args", {"act_layer": "relu"})
    }[what]  # fmt: skip
    described[section] |= values
    (folder / "config.json").write_text(json.dumps(described))


OTHER_WEIGHTS = "holds other weights than those that the run in .* was started with"


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("numbers", OTHER_WEIGHTS),
        ("half", OTHER_WEIGHTS),
        ("mean", r"teacher\.preprocessing\.mean=\[0\.25\], but the run in .* was started with \[0\.5\]"),
        ("activation", r"teacher\.model_args\.act_layer='relu', but the run in .* was started with None"),
    ],
)
@pytest.mark.parametrize("mode", ["transfer", "finetune"])
def test_another_teacher_behind_the_same_path_is_refused(
    tmp_path: Path, own_teacher: Path, what: str, sentence: str, mode: str
) -> None:
    train(config(tmp_path / "run", own_teacher, mode=mode, optim={"max_steps": 2}))
    change(own_teacher, what)
    longer = config(tmp_path / "run", own_teacher, mode=mode, optim={"max_steps": 3})
    for begin in (train, describe_plan):
        with pytest.raises(ConfigError, match=sentence):
            begin(longer)


def test_the_same_weights_in_another_file_are_the_same_teacher_and_another_precision_is_refused(
    tmp_path: Path, own_teacher: Path
) -> None:
    train(config(tmp_path / "run", own_teacher, optim={"max_steps": 2}))
    tensors = load_file(own_teacher / "model.safetensors")
    (own_teacher / "model.safetensors").unlink()
    torch.save({name: tensors[name] for name in reversed(tensors)}, own_teacher / "pytorch_model.bin")
    assert train(config(tmp_path / "run", own_teacher, optim={"max_steps": 3})).steps == 3
    half = config(tmp_path / "run", own_teacher, optim={"max_steps": 4}, engine={"precision": "bf16"})
    with pytest.raises(ConfigError, match=r"^engine\.precision='bf16', but .* was started with 'fp32'"):
        train(half)


def test_a_run_that_copies_is_made_whole_with_its_own_teacher_only(tmp_path: Path, own_teacher: Path) -> None:
    train(config(tmp_path / "run", own_teacher, optim={"max_steps": 2}, transfer={"method": "copy"}))
    source, student = f"{tmp_path / 'run'}/checkpoints/last.safetensors", tmp_path / "run" / "student"
    described = json.loads((student / "config.json").read_text())
    described["graftvit"]["teacher"]["digest"] = "0" * 64
    (student / "config.json").write_text(json.dumps(described))
    tensors = load_file(student / "model.safetensors")
    exported = {n: tensor + 1 if n.startswith("teacher.") else tensor for n, tensor in tensors.items()}
    save_file(exported, student / "model.safetensors")
    found = load_pretrained(source).model.state_dict()
    name = next(name for name in found if name.startswith("teacher.") and "qkv.weight" in name)
    assert torch.equal(found[name], tensors[name]), "the exported part of another teacher is not taken"
    for file in student.iterdir():
        file.unlink()
    load_pretrained(source)
    change(own_teacher, "numbers")
    with pytest.raises(
        CheckpointError, match="which holds other weights than those that it was trained with"
    ):
        load_pretrained(source)


def test_a_state_that_knows_no_digest_goes_on(tmp_path: Path, own_teacher: Path) -> None:
    known = {"origins": {"teacher": {"source": "x", "revision": None}}, "student": {"mean": [0.5]}}
    now = {"teacher": {"source": "x", "digest": "1" * 64, "preprocessing": {"mean": [0.1]}}, "init": None}
    check_same_weights(known, now, {"mean": [0.5], "model_args": {}}, tmp_path)
    with pytest.raises(ConfigError, match=r"student\.mean=\[0\.1\], but"):
        check_same_weights(known, now, {"mean": [0.1]}, tmp_path)


def test_all_teachers_of_some_runs_are_identified_each_once(tmp_path: Path, own_teacher: Path) -> None:
    convnext = make_convnext(tmp_path / "convnext")
    runs = [config(tmp_path / name, own_teacher, **several_losses(convnext)) for name in ("one", "two")]
    first = identify_teachers(*runs)
    assert len(set(first)) == len(first) == 2
    change(convnext, "mean")
    second = identify_teachers(*runs)
    assert [one == other for one, other in zip(first, second, strict=True)] == [True, False]
    assert identify_teachers(config(tmp_path / "scratch")) == []


@pytest.mark.parametrize("source", ["teacher", "init", "model"])
def test_weights_to_start_from_are_read_once(
    source: str, tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    plain = weight_files.read_tree

    def count(path: Path, kind: str) -> dict[str, Any]:
        read.append(path)
        return plain(path, kind)

    monkeypatch.setattr(weight_files, "read_tree", count)
    run = config(tmp_path, teacher, mode="finetune")
    if source != "teacher":
        own = StudentConfig() if source == "model" else run.student
        student = own.model_copy(update={source: f"local-dir:{teacher}"})
        run = run.model_copy(
            update={"student": student, "teacher": run.teacher.model_copy(update={"source": None})}
        )
    building.build(run)
    assert len(read) == 1
