"""`graftvit checkpoint`, as typed."""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.weight_files import read_file
from graftvit.launch.cli import main
from graftvit.models.errors import CheckpointError
from graftvit.transfer.engine.train import train
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.files.hostile import ARCHITECTURE, ARGUMENTS, CORPUS, weights
from support.files.hostile_tensors import valid
from support.runs.engine_runs import config, make_teacher

LOAD: dict[str, Any] = {"model": ARCHITECTURE, "model_args": {**ARGUMENTS, "num_classes": 0}}


@pytest.fixture
def training_file(tmp_path: Path) -> Path:
    """As DINO writes them: two models, an optimizer, settings."""
    student = {f"module.backbone.{name}": tensor for name, tensor in weights().items() if "head" not in name}
    teacher = {f"backbone.{name.split('.', 2)[2]}": tensor + 1 for name, tensor in student.items()}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(1000)}}, "param_groups": [{"lr": 0.1}]}
    tree = {"student": student, "teacher": teacher, "optimizer": optimizer, "epoch": 7}
    path = tmp_path / "full.pth"
    torch.save({**tree, "args": argparse.Namespace(lr=0.1, arch="vit_tiny")}, path)
    return path


def say(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["checkpoint", *map(str, words)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("container", ["safetensors", "zip", "legacy", "npz"])
def test_inspect_lists_every_tensor(
    container: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = valid(container, tmp_path)
    out = say(capsys, "inspect", path)
    for name, tensor in weights().items():
        (line,) = [line for line in out.splitlines() if line.split()[:1] in ([name], [f"model.{name}"])]
        assert "float32" in line
        assert " x ".join(map(str, tensor.shape)) in line
        assert line.endswith(f"{tensor.numel() * 4:,}")
    total = sum(tensor.numel() * 4 for tensor in weights().values())
    assert f"{len(weights())} tensors ({len(weights())} float32), {total:,} bytes" in out
    assert f"{path.stat().st_size:,} bytes" in out


def test_inspect_says_what_else_is_there(training_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = say(capsys, "inspect", training_file)
    assert "optimizer.state.0.exp_avg" in out
    assert "  optimizer: dict of 2, 1 tensors" in out
    assert "  epoch: 7" in out
    assert "  args: settings, arch, lr" in out


def test_inspect_reads_no_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The numbers of a sparse file of a terabyte are never touched."""
    size = 1 << 40
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        try:
            file.truncate(8 + len(header) + size)
        except OSError:
            pytest.skip("the file system has no sparse files of this size")
    assert f"{size:,} bytes" in say(capsys, "inspect", path)


@pytest.mark.parametrize(("part", "shift"), [("teacher", 1), ("student", 0)])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_strip_keeps_one_model(
    training_file: Path, capsys: pytest.CaptureFixture[str], part: str, shift: int, suffix: str
) -> None:
    out = training_file.with_name(f"{part}{suffix}")
    text = say(capsys, "strip", training_file, out, "--part", part)
    assert "left out: " in text
    assert "optimizer" in text
    tree = read_file(out).tree
    tensors = tree if suffix == ".safetensors" else tree.pop("model")
    assert all(isinstance(tensor, torch.Tensor) for tensor in (*tree.values(), *tensors.values()))
    wanted = load_pretrained(f"{training_file}#{part}", **LOAD).model.state_dict()
    found = load_pretrained(str(out), **LOAD).model.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())
    assert torch.equal(found["cls_token"], weights()["cls_token"] + shift)
    assert out.stat().st_size < training_file.stat().st_size / 2


def test_convert_is_bit_exact_and_takes_shared_tensors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = torch.randn(4, 4)
    torch.save(
        {"a": shared, "b": shared, "c": shared.T, "d": torch.ones(2, dtype=torch.int64)}, tmp_path / "a.pth"
    )
    say(capsys, "convert", tmp_path / "a.pth", tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")
    assert torch.equal(found["a"], shared)
    assert torch.equal(found["b"], shared)
    assert torch.equal(found["c"], shared.T)
    assert found["d"].dtype == torch.int64
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "source": "a.pth"}


def test_a_runs_average_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(tmp_path / "run", make_teacher(tmp_path / "teacher"), optim={"max_steps": 2}))
    state, out = tmp_path / "run" / "checkpoints" / "last.safetensors", tmp_path / "ema.safetensors"
    say(capsys, "convert", state, out, "--part", "ema")
    wanted = load_file(tmp_path / "run" / "student_ema" / "model.safetensors")
    found = load_file(out)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())


def test_mistakes(training_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: object) -> str:
        assert main(["checkpoint", *map(str, words)]) == 2
        return capsys.readouterr().err

    assert "did you mean 'strip'" in refused("stripp", training_file)
    assert "convert writes a .safetensors file" in refused("convert", training_file, tmp_path / "a.pth")
    assert "full.pth is there already" in refused("strip", training_file, training_file)
    assert "has the suffix '.txt'; valid" in refused("strip", training_file, tmp_path / "a.txt")
    assert "holds no moving average" in refused("strip", training_file, tmp_path / "a.pth", "--part", "ema")
    assert "holds posix.system" in refused(
        "inspect", CORPUS["code_in_zip_system"](tmp_path, tmp_path / "canary")
    )
    assert not (tmp_path / "canary").exists()
    assert "none.pth cannot be read: No such file" in refused("inspect", tmp_path / "none.pth")
    assert main(["checkpoint", "--help"]) == 0
    assert "graftvit checkpoint inspect" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize(
    "around",
    [
        lambda tensors: {"model": tensors, "epoch": 3},
        lambda tensors: {"state_dict": tensors, "epoch": 3},
        lambda tensors: {"state_dict": tensors, "arch": ARCHITECTURE},
        lambda tensors: {"teacher": tensors, "student": tensors},
        lambda tensors: tensors,
    ],
)
def test_what_is_taken_out_loads_as_before(tmp_path: Path, suffix: str, around: Any) -> None:
    """The dictionary around the weights says how images are prepared: without it, the model would see others."""
    path, out = tmp_path / "all.pth", tmp_path / f"alone.{suffix}"
    torch.save(around(weights()), path)
    assert main(["checkpoint", "strip", str(path), str(out)]) == 0
    before, after = (load_pretrained(str(one), **LOAD) for one in (path, out))
    assert (after.mean, after.std) == (before.mean, before.std)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(after.model(images), before.model(images))


def test_an_average_of_a_run_says_its_normalization(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config(tmp_path / "run", make_teacher(tmp_path / "teacher"), optim={"max_steps": 1}))
    state = tmp_path / "run" / "checkpoints" / "last.safetensors"
    say(capsys, "strip", state, tmp_path / "ema.safetensors", "--part", "ema")
    before, after = load_pretrained(f"{state}#ema"), load_pretrained(str(tmp_path / "ema.safetensors"))
    assert (after.mean, after.std) == (before.mean, before.std)
    assert main(["checkpoint", "strip", str(state), str(tmp_path / "ema.pth"), "--part", "ema"]) == 2
    assert "write .safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    "said", ["[", "[]", '{"architecture": 3}', '{"model_args": 3}', '{"pretrained_cfg": {"mean": "abc"}}']
)
def test_a_damaged_description_is_named(tmp_path: Path, said: str) -> None:
    save_file(weights(), tmp_path / "m.safetensors", metadata={"graftvit.described": said})
    with pytest.raises(CheckpointError, match=r"m\.safetensors is damaged: its graftvit\.described"):
        load_pretrained(str(tmp_path / "m.safetensors"), **LOAD)
