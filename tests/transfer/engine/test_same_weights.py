"""A run goes on with the teacher that it was started with: the weights behind the same path, and how they are used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from graftvit.checkpoints.pretrained import load_teacher
from graftvit.launch.plan_text import describe_plan
from graftvit.models.errors import CheckpointError, ConfigError
from graftvit.transfer.engine.build import identify_teachers
from graftvit.transfer.engine.resume_check import check_same_teacher, check_same_weights
from graftvit.transfer.engine.train import train
from safetensors.torch import load_file, save_file
from support.runs.engine_runs import config, make_convnext, make_teacher, several_losses


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return make_teacher(tmp_path / "vit")


def other_numbers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["blocks.0.attn.qkv.weight"][0, 0] += 1e-3
    save_file(tensors, folder / "model.safetensors")


def half_precision(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / "model.safetensors")


def saved_again(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({name: tensors[name] for name in reversed(tensors)}, folder / "pytorch_model.bin")


def other_mean(folder: Path) -> None:
    described = json.loads((folder / "config.json").read_text())
    described["pretrained_cfg"]["mean"] = [0.25]
    (folder / "config.json").write_text(json.dumps(described))


def other_activation(folder: Path) -> None:
    described = json.loads((folder / "config.json").read_text())
    described["model_args"]["act_layer"] = "relu"
    (folder / "config.json").write_text(json.dumps(described))


CHANGES = [
    (other_numbers, "holds other weights than those that the run in .* was started with"),
    (half_precision, "holds other weights than those that the run in .* was started with"),
    (other_mean, r"teacher\.preprocessing\.mean=\[0\.25\], but the run in .* was started with \[0\.5\]"),
    (other_activation, r"teacher\.model_args\.act_layer='relu', but the run in .* was started with None"),
]


@pytest.mark.parametrize(("change", "sentence"), CHANGES)
@pytest.mark.parametrize("mode", ["transfer", "finetune"])
def test_another_teacher_behind_the_same_path_is_refused(
    tmp_path: Path, teacher: Path, change: Callable[[Path], None], sentence: str, mode: str
) -> None:
    run = config(tmp_path / "run", teacher, mode=mode, optim={"max_steps": 2})
    train(run)
    change(teacher)
    longer = config(tmp_path / "run", teacher, mode=mode, optim={"max_steps": 3})
    with pytest.raises(ConfigError, match=sentence):
        train(longer)
    with pytest.raises(ConfigError, match=sentence):
        describe_plan(longer)


def test_the_same_weights_in_another_file_are_the_same_teacher(tmp_path: Path, teacher: Path) -> None:
    train(config(tmp_path / "run", teacher, optim={"max_steps": 2}))
    saved_again(teacher)
    assert train(config(tmp_path / "run", teacher, optim={"max_steps": 3})).steps == 3


def test_another_precision_is_refused(tmp_path: Path, teacher: Path) -> None:
    train(config(tmp_path / "run", teacher, optim={"max_steps": 2}))
    with pytest.raises(ConfigError, match=r"^engine\.precision='bf16', but .* was started with 'fp32'"):
        train(config(tmp_path / "run", teacher, optim={"max_steps": 3}, engine={"precision": "bf16"}))


def test_an_unfinished_run_that_copies_is_made_whole_with_its_own_teacher_only(
    tmp_path: Path, teacher: Path
) -> None:
    run = config(tmp_path / "run", teacher, optim={"max_steps": 2}, transfer={"method": "copy"})
    train(run)
    for file in (tmp_path / "run" / "student").iterdir():
        file.unlink()
    load_teacher(f"{tmp_path / 'run'}/checkpoints/last.safetensors")
    other_numbers(teacher)
    with pytest.raises(
        CheckpointError, match="which holds other weights than those that it was trained with"
    ):
        load_teacher(f"{tmp_path / 'run'}/checkpoints/last.safetensors")


def test_the_exported_part_of_another_teacher_is_not_taken(tmp_path: Path, teacher: Path) -> None:
    run = config(tmp_path / "run", teacher, optim={"max_steps": 2}, transfer={"method": "copy"})
    train(run)
    described = json.loads((tmp_path / "run" / "student" / "config.json").read_text())
    described["graftvit"]["teacher"]["digest"] = "0" * 64
    (tmp_path / "run" / "student" / "config.json").write_text(json.dumps(described))
    path = tmp_path / "run" / "student" / "model.safetensors"
    tensors = load_file(path)
    save_file(
        {name: tensor + 1 if name.startswith("teacher.") else tensor for name, tensor in tensors.items()},
        path,
    )
    found = load_teacher(f"{tmp_path / 'run'}/checkpoints/last.safetensors").model.state_dict()
    name = next(name for name in found if name.startswith("teacher.") and "qkv.weight" in name)
    assert not torch.equal(found[name], tensors[name] + 1)
    assert torch.equal(found[name], tensors[name])


def test_a_state_that_knows_no_digest_goes_on(tmp_path: Path, teacher: Path) -> None:
    known = {"origins": {"teacher": {"source": "x", "revision": None}}, "student": {"mean": [0.5]}}
    now = {"teacher": {"source": "x", "digest": "1" * 64, "preprocessing": {"mean": [0.1]}}, "init": None}
    check_same_weights(known, now, {"mean": [0.5], "model_args": {}}, tmp_path)
    with pytest.raises(ConfigError, match=r"student\.mean=\[0\.1\], but"):
        check_same_weights(known, now, {"mean": [0.1]}, tmp_path)


def test_processes_that_read_different_weights_stop() -> None:
    origins = [{"teacher": {"revision": None, "digest": digit * 64}, "init": None} for digit in "12"]
    with pytest.raises(CheckpointError, match=r"different weights .*11111.*22222.*every machine"):
        check_same_teacher(origins)


def test_all_teachers_of_some_runs_are_identified_each_once(tmp_path: Path, teacher: Path) -> None:
    convnext = make_convnext(tmp_path / "convnext")
    runs = [config(tmp_path / name, teacher, **several_losses(convnext)) for name in ("one", "two")]
    first = identify_teachers(*runs)
    assert len(set(first)) == len(first) == 2
    other_mean(convnext)
    second = identify_teachers(*runs)
    assert [one == other for one, other in zip(first, second, strict=True)] == [True, False]
    assert identify_teachers(config(tmp_path / "scratch")) == []
