"""`graftvit checkpoint save` and `graftvit checkpoint info`, as typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from graftvit.launch.cli import main
from graftvit.models.conversion import convert
from graftvit.transfer.engine.train import train
from safetensors.torch import load_file
from support.runs.engine_runs import config, make_teacher

NAME = "vit_tiny_patch16_224"
SMALL: dict[str, Any] = {
    "embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "img_size": 16, "num_classes": 3,
}  # fmt: skip


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    model = timm.create_model(NAME, **SMALL)
    write_student(
        model,
        tmp_path / "model",
        architecture=NAME,
        model_args=SMALL,
        preprocessing=Preprocessing.of(model, mean=(0.5,) * 3, std=(0.5,) * 3),
    )
    return tmp_path / "model"


def test_a_run_is_saved_and_its_loading_line_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config(tmp_path / "run", make_teacher(tmp_path / "teacher"), optim={"max_steps": 2}))
    out = tmp_path / "out"
    assert main(["checkpoint", "save", f"{tmp_path / 'run'}#ema", str(out), "--dtype", "bfloat16"]) == 0
    text = capsys.readouterr().out
    line = text.split("load it: ")[1].strip()
    assert line == f'timm.create_model("local-dir:{out}", pretrained=True)'
    loaded = eval(line, {"timm": timm})
    stored = load_file(out / "model.safetensors")
    wanted = load_file(tmp_path / "run" / "student_ema" / "model.safetensors")
    assert all(torch.equal(stored[key], wanted[key].bfloat16()) for key in wanted)
    assert torch.equal(loaded.head.weight, stored["head.weight"].float())


def test_an_architecture_of_our_own_says_graftvit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = timm.create_model("vit_cifar_nano", depth=1)
    described = Preprocessing.of(model, mean=(0.5,) * 3, std=(0.5,) * 3)
    folder = tmp_path / "model"
    write_student(
        model, folder, architecture="vit_cifar_nano", model_args={"depth": 1}, preprocessing=described
    )
    assert main(["checkpoint", "save", str(folder), str(tmp_path / "out")]) == 0
    assert 'load it: graftvit.load("' in capsys.readouterr().out


@pytest.mark.parametrize("how", ["converted", "shards"])
def test_what_plain_timm_cannot_load_says_graftvit(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    out, size = tmp_path / "out", "5GB"
    if how == "converted":
        model = convert(timm.create_model(NAME, **SMALL), "*: linear")
        write_student(
            model,
            model_folder,
            architecture=NAME,
            model_args=SMALL,
            preprocessing=Preprocessing.of(model, mean=(0.5,) * 3, std=(0.5,) * 3),
        )
    else:
        size = "10KB"
    assert main(["checkpoint", "save", str(model_folder), str(out), "--max_shard_size", size]) == 0
    assert f'load it: graftvit.load("{out}")' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--dtype", "int8"], "--dtype"),
        (["--max_shard_size", "5"], "write a number with KB, MB, GB or TB"),
        (["--max_shard_size", "0GB"], "write a number with KB, MB, GB or TB"),
        (["--max_shard_size", "GB"], "write a number with KB, MB, GB or TB"),
        (["--blr", "1"], "--blr has no effect on this command"),
        (["--model", "vit_base_patch16_224"], "says it is 'vit_tiny_patch16_224'"),
        (["--revision", "v1"], "revision='v1' is of the hub"),
    ],
)
def test_mistakes_end_in_one_sentence(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    assert main(["checkpoint", "save", str(model_folder), str(tmp_path / "out"), *more]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_force(tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "save", str(model_folder), str(tmp_path / "out")]) == 0
    assert main(["checkpoint", "save", str(model_folder), str(tmp_path / "out")]) == 2
    assert "already holds a model" in capsys.readouterr().err
    assert main(["checkpoint", "save", str(model_folder), str(tmp_path / "out"), "--force"]) == 0


def test_info_says_what_would_load_and_what_would_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = timm.create_model(NAME, **SMALL).state_dict()
    tensors = {key: tensor for key, tensor in tensors.items() if "norm1.bias" not in key}
    tensors["blocks.0.attn.qkv.weight"] = torch.zeros(3, 3)
    tensors["adapter.weight"] = torch.zeros(3)
    torch.save({"model": tensors, "epoch": 3}, tmp_path / "odd.pth")
    arguments = [f"--model_args.{key}={value}" for key, value in SMALL.items()]
    assert main(["checkpoint", "info", str(tmp_path / "odd.pth"), "--model", NAME, *arguments]) == 2
    out, err = capsys.readouterr()
    assert "would load    29 of 31 tensors" in out
    assert "would not     missing keys: blocks.*.norm1.bias (2 times)" in out
    assert "would not     unexpected keys: adapter.weight" in out
    assert "would not     wrong tensors: blocks.*.attn.qkv.weight is (3, 3)" in out
    assert err.count("\n") == 1
    assert "does not fit" in err


def test_info_of_weights_of_no_known_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = timm.create_model(NAME, **SMALL).state_dict()
    torch.save({"model": tensors}, tmp_path / "odd.pth")
    assert main(["checkpoint", "info", str(tmp_path / "odd.pth")]) == 2
    out, err = capsys.readouterr()
    assert "tensors       32 with" in out
    assert "architecture  not known" in out
    assert "give its timm name as teacher.model" in err
    (tmp_path / "odd.pth").write_bytes(b"no weights")
    assert main(["checkpoint", "info", str(tmp_path / "odd.pth")]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


def test_plain_names_mean_the_source_where_a_command_takes_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "save", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--model MODEL" in text
    assert "--teacher.model" not in text
    assert main(["evaluate", "--help"]) == 0
    assert "--model MODEL" in capsys.readouterr().out
    assert main(["train", "--help"]) == 0
    assert "--teacher.model" in capsys.readouterr().out
