"""`graftvit checkpoint`, as typed: info, inspect, strip, convert and save."""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.weight_files import read_file
from graftvit.launch.cli import main
from graftvit.models.conversion import convert
from graftvit.models.errors import CheckpointError
from graftvit.transfer.engine.train import train
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.files.hostile import ARCHITECTURE, ARGUMENTS, CORPUS, weights
from support.files.hostile_tensors import valid
from support.models.saved import NAME, save_model, save_vit
from support.runs.engine_runs import config, make_teacher
from support.runs.typed import Typed

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


def say(typed: Typed, *words: object) -> str:
    return typed("checkpoint", *words).out


@pytest.mark.parametrize("container", ["safetensors", "zip", "legacy", "npz"])
def test_inspect_lists_every_tensor(container: str, tmp_path: Path, typed: Typed) -> None:
    path = valid(container, tmp_path)
    out = say(typed, "inspect", path)
    for name, tensor in weights().items():
        (line,) = [line for line in out.splitlines() if line.split()[:1] in ([name], [f"model.{name}"])]
        assert "float32" in line
        assert " x ".join(map(str, tensor.shape)) in line
        assert line.endswith(f"{tensor.numel() * 4:,}")
    total = sum(tensor.numel() * 4 for tensor in weights().values())
    assert f"{len(weights())} tensors ({len(weights())} float32), {total:,} bytes" in out
    assert f"{path.stat().st_size:,} bytes" in out


def test_inspect_says_what_else_is_there(training_file: Path, typed: Typed) -> None:
    out = say(typed, "inspect", training_file)
    assert "optimizer.state.0.exp_avg" in out
    assert "  optimizer: dict of 2, 1 tensors" in out
    assert "  epoch: 7" in out
    assert "  args: settings, arch, lr" in out


def test_inspect_reads_no_tensor(tmp_path: Path, typed: Typed) -> None:
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
    assert f"{size:,} bytes" in say(typed, "inspect", path)


@pytest.mark.parametrize(("part", "shift"), [("teacher", 1), ("student", 0)])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_strip_keeps_one_model(training_file: Path, typed: Typed, part: str, shift: int, suffix: str) -> None:
    out = training_file.with_name(f"{part}{suffix}")
    text = say(typed, "strip", training_file, out, "--part", part)
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


def test_convert_is_bit_exact_and_takes_shared_tensors(tmp_path: Path, typed: Typed) -> None:
    shared = torch.randn(4, 4)
    torch.save(
        {"a": shared, "b": shared, "c": shared.T, "d": torch.ones(2, dtype=torch.int64)}, tmp_path / "a.pth"
    )
    say(typed, "convert", tmp_path / "a.pth", tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")
    assert torch.equal(found["a"], shared)
    assert torch.equal(found["b"], shared)
    assert torch.equal(found["c"], shared.T)
    assert found["d"].dtype == torch.int64
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "source": "a.pth"}


def test_a_runs_average_alone(tmp_path: Path, typed: Typed) -> None:
    train(config(tmp_path / "run", make_teacher(tmp_path / "teacher"), optim={"max_steps": 2}))
    state, out = tmp_path / "run" / "checkpoints" / "last.safetensors", tmp_path / "ema.safetensors"
    say(typed, "convert", state, out, "--part", "ema")
    wanted = load_file(tmp_path / "run" / "student_ema" / "model.safetensors")
    found = load_file(out)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())
    say(typed, "strip", state, tmp_path / "stripped.safetensors", "--part", "ema")
    before, after = load_pretrained(f"{state}#ema"), load_pretrained(str(tmp_path / "stripped.safetensors"))
    assert (after.mean, after.std) == (before.mean, before.std)
    said = typed(f"checkpoint strip {state} {tmp_path}/ema.pth --part ema", code=2).err
    assert "write .safetensors" in said


@pytest.mark.parametrize("action", ["convert", "strip"])
def test_a_copying_student_is_not_written_without_its_teacher(
    tmp_path: Path, typed: Typed, action: str
) -> None:
    copying = {"optim": {"max_steps": 1}, "transfer": {"method": "copy"}}
    train(config(tmp_path / "run", make_teacher(tmp_path / "teacher"), **copying))
    state, out = tmp_path / "run" / "checkpoints" / "last.safetensors", tmp_path / "ema.safetensors"
    said = typed("checkpoint", action, state, out, "--part", "ema", code=2).err
    assert "--bare" in said
    assert not out.exists()
    say(typed, "save", f"{state}#ema", tmp_path / "bare", "--bare")
    load_pretrained(f"local-dir:{tmp_path}/bare")


def test_mistakes(training_file: Path, tmp_path: Path, typed: Typed) -> None:
    code = CORPUS["code_in_zip_system"](tmp_path, tmp_path / "canary")
    for line, said in (
        (f"convert {training_file} {tmp_path}/a.pth", "convert writes a .safetensors file"),
        (f"strip {training_file} {training_file}", "full.pth is there already"),
        (f"strip {training_file} {tmp_path}/a.txt", "has the suffix '.txt'; valid"),
        (f"strip {training_file} {tmp_path}/a.pth --part ema", "holds no moving average"),
        (f"inspect {code}", "holds posix.system"),
    ):
        assert said in typed(f"checkpoint {line}", code=2).err
    assert not (tmp_path / "canary").exists()


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


@pytest.mark.parametrize(
    "said", ["[", "[]", '{"architecture": 3}', '{"model_args": 3}', '{"pretrained_cfg": {"mean": "abc"}}']
)
def test_a_damaged_description_is_named(tmp_path: Path, said: str) -> None:
    save_file(weights(), tmp_path / "m.safetensors", metadata={"graftvit.described": said})
    with pytest.raises(CheckpointError, match=r"m\.safetensors is damaged: its graftvit\.described"):
        load_pretrained(str(tmp_path / "m.safetensors"), **LOAD)


SMALL: dict[str, Any] = {
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "img_size": 16,
    "num_classes": 3,
}


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return save_vit(tmp_path / "model", SMALL)


def test_a_run_is_saved_and_its_loading_line_works(tmp_path: Path, typed: Typed) -> None:
    train(config(tmp_path / "run", make_teacher(tmp_path / "teacher"), optim={"max_steps": 2}))
    out = tmp_path / "out"
    text = typed("checkpoint", "save", f"{tmp_path / 'run'}#ema", out, "--dtype", "bfloat16").out
    line = text.split("load it: ")[1].strip()
    assert line == f'timm.create_model("local-dir:{out}", pretrained=True)'
    loaded = eval(line, {"timm": timm})
    stored = load_file(out / "model.safetensors")
    wanted = load_file(tmp_path / "run" / "student_ema" / "model.safetensors")
    assert all(torch.equal(stored[key], wanted[key].bfloat16()) for key in wanted)
    assert torch.equal(loaded.head.weight, stored["head.weight"].float())


@pytest.mark.parametrize("how", ["converted", "shards", "our own"])
def test_what_plain_timm_cannot_load_says_graftvit(tmp_path: Path, typed: Typed, how: str) -> None:
    name, arguments = ("vit_cifar_nano", {"depth": 1}) if how == "our own" else (NAME, SMALL)
    model = timm.create_model(name, **arguments)
    model = convert(model, "*: linear") if how == "converted" else model
    save_model(tmp_path / "model", model, name, arguments)
    size = "10KB" if how == "shards" else "5GB"
    said = typed(f"checkpoint save {tmp_path}/model {tmp_path}/out --max_shard_size {size}").out
    assert f'load it: graftvit.load("{tmp_path}/out")' in said


def test_force(tmp_path: Path, model_folder: Path, typed: Typed) -> None:
    line = f"checkpoint save {model_folder} {tmp_path}/out"
    typed(line)
    assert "already holds a model" in typed(line, code=2).err
    typed(f"{line} --force")


def test_info_says_what_would_load_and_what_would_not(tmp_path: Path, typed: Typed) -> None:
    tensors = timm.create_model(NAME, **SMALL).state_dict()
    tensors = {key: tensor for key, tensor in tensors.items() if "norm1.bias" not in key}
    tensors["blocks.0.attn.qkv.weight"] = torch.zeros(3, 3)
    tensors["adapter.weight"] = torch.zeros(3)
    torch.save({"model": tensors, "epoch": 3}, tmp_path / "odd.pth")
    arguments = [f"--model_args.{key}={value}" for key, value in SMALL.items()]
    out, err = typed("checkpoint", "info", tmp_path / "odd.pth", "--model", NAME, *arguments, code=2)
    assert "would load    29 of 31 tensors" in out
    assert "would not     missing keys: blocks.*.norm1.bias (2 times)" in out
    assert "would not     unexpected keys: adapter.weight" in out
    assert "would not     wrong tensors: blocks.*.attn.qkv.weight is (3, 3)" in out
    assert err.count("\n") == 1
    assert "does not fit" in err


def test_info_of_weights_of_no_known_architecture(tmp_path: Path, typed: Typed) -> None:
    tensors = timm.create_model(NAME, **SMALL).state_dict()
    torch.save({"model": tensors}, tmp_path / "odd.pth")
    out, err = typed("checkpoint", "info", tmp_path / "odd.pth", code=2)
    assert "tensors       32 with" in out
    assert "architecture  not known" in out
    assert "give its timm name as model" in err
    (tmp_path / "odd.pth").write_bytes(b"no weights")
    out, err = typed("checkpoint", "info", tmp_path / "odd.pth", code=2)
    assert (out, err.count("\n")) == ("", 1)


def test_plain_names_mean_the_source_where_a_command_takes_one(typed: Typed) -> None:
    text = typed("checkpoint", "save", "--help").out
    assert "--model MODEL" in text
    assert "--teacher.model" not in text
    assert "--model MODEL" in typed("evaluate", "--help").out
    for command in ("convert", "evaluate", "visualize", "export", "checkpoint info", "programs search"):
        shown = typed(command, "--help").out.partition("--revision")[2].partition("data:")[0]
        assert "teacher" not in shown.partition("examples:")[0]
    assert "--teacher.model" in typed("train", "--help").out
