"""`save_student` and `load`: from any source to a folder and back, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graftvit
import pytest
import timm
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.pretrained import load, load_pretrained
from graftvit.checkpoints.state import TrainingState, write_state
from graftvit.checkpoints.student import save_student, write_student
from graftvit.models.conversion import convert, plan_of
from graftvit.models.errors import CheckpointError
from safetensors.torch import load_file
from torch import Tensor, nn

NAME = "vit_tiny_patch16_224"
ARGUMENTS: dict[str, Any] = {
    "embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": [16, 24], "patch_size": 4, "num_classes": 3,
}  # fmt: skip
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
META = {
    "student": {"architecture": NAME, "model_args": ARGUMENTS, "mean": MEAN, "std": STD},
    "config": {"mode": "transfer", "output_dir": "/home/me/runs", "engine": {"fsdp": False},
               "data": {"dataset": "digits"}},
    "position": {"metrics": {"test_top1": 80.5, "test_top5": 99.0, "test_loss": 0.5, "test_ema_top1": 82.0}},
    "origins": {"teacher": {"source": "vit_x.mae", "revision": "a" * 40, "license": "cc-by-nc-4.0"}, "init": None},
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, tiny: Callable[..., nn.Module]) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
    """A run folder that was stopped, and the weights and averages in it."""
    weights = tiny(**ARGUMENTS).state_dict()
    averages = tiny(**ARGUMENTS).state_dict()
    tensors = {
        **{f"student.{key}": tensor for key, tensor in weights.items()},
        **{f"ema.{key}": tensor for key, tensor in averages.items()},
        "optimizer.0.exp_avg": torch.ones(3),
    }
    write_state(tmp_path / "run" / "checkpoints" / "last.safetensors", TrainingState(tensors, META))
    return tmp_path / "run", weights, averages


def same(model: nn.Module, tensors: dict[str, Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("part", ["student", "ema"])
def test_a_run_gives_its_student_alone(run: Any, tmp_path: Path, part: str) -> None:
    folder, weights, averages = run
    source = folder if part == "student" else f"{folder}#ema"
    written = save_student(source, tmp_path / "out")
    wanted = weights if part == "student" else averages
    assert sorted(path.name for path in written.iterdir()) == ["config.json", "model.safetensors"]
    assert load_file(written / "model.safetensors").keys() == weights.keys()
    assert same(timm.create_model(f"local-dir:{written}", pretrained=True), wanted)
    assert same(load(str(written)), wanted)
    again = load_pretrained(str(written))
    assert (again.mean, again.std, again.license) == (MEAN, STD, "cc-by-nc-4.0")


def test_what_was_learned_from_what_is_in_the_config(run: Any, tmp_path: Path) -> None:
    written = save_student(f"{run[0]}#ema", tmp_path / "out")
    made = json.loads((written / "config.json").read_text())["graftvit"]
    assert made["version"] == graftvit.__version__
    assert made["part"] == "ema"
    assert made["teacher"] == META["origins"]["teacher"]  # type: ignore[index]
    assert made["results"] == {"dataset": "digits", "top1": 82.0}
    assert made["recipe"] == {"mode": "transfer", "data": {"dataset": "digits"}}
    second = save_student(str(written), tmp_path / "again")
    assert json.loads((second / "config.json").read_text())["graftvit"] == made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype(run: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    written = save_student(run[0], tmp_path / "out", dtype=dtype)
    wanted = {key: tensor.to(dtype) for key, tensor in run[1].items()}
    stored = load_file(written / "model.safetensors")
    assert all(torch.equal(stored[key], wanted[key]) for key in wanted)
    assert same(load(str(written), dtype=dtype), wanted)
    if dtype != torch.float64:
        assert same(load(str(written)), {key: tensor.float() for key, tensor in wanted.items()})


def test_large_weights_are_spread_over_files(run: Any, tmp_path: Path) -> None:
    written = save_student(run[0], tmp_path / "out", max_shard_size=8_000)
    names = sorted(path.name for path in written.iterdir())
    assert len(names) > 4
    assert names[-1] == "model.safetensors.index.json"
    assert same(load(str(written)), run[1])
    (written / names[1]).unlink()
    with pytest.raises(CheckpointError, match=r"lists model-00001-of-\d+\.safetensors, which is not there"):
        load(str(written))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("part", ["student", "ema"])
def test_part_dtype_and_shards_together_keep_the_bits(
    run: Any, tmp_path: Path, part: str, dtype: torch.dtype | None
) -> None:
    source = run[0] if part == "student" else f"{run[0]}#ema"
    wanted = {key: tensor.to(dtype) for key, tensor in run[1 if part == "student" else 2].items()}
    whole = save_student(source, tmp_path / "whole", dtype=dtype)
    shards = save_student(str(whole), tmp_path / "shards", dtype=dtype, max_shard_size=4_000)
    assert len(list(shards.glob("model-*.safetensors"))) > 2
    assert same(load(str(shards), dtype=dtype), wanted)
    back = save_student(str(shards), tmp_path / "back", dtype=dtype)
    name = "model.safetensors"
    assert (back / name).read_bytes() == (whole / name).read_bytes()
    assert json.loads((back / "config.json").read_text())["graftvit"]["part"] == part


@pytest.mark.parametrize("shards", [False, True])
def test_a_converted_student_comes_back(tmp_path: Path, tiny: Callable[..., nn.Module], shards: bool) -> None:
    student = convert(tiny(**ARGUMENTS), "*: linear(feature=relu); 1: softmax").eval()
    size = 8_000 if shards else "5GB"
    images = Preprocessing.of(student, mean=MEAN, std=STD)
    write_student(
        student, tmp_path / "out", architecture=NAME, model_args=ARGUMENTS, preprocessing=images, max_shard_size=size
    )  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "graftvit_converted"
    assert config["model_args"]["plan"] == "0: linear(feature=relu); 1: softmax"
    loaded = graftvit.load(str(tmp_path / "out"))
    assert plan_of(loaded) == plan_of(student)
    images = torch.randn(1, 3, 16, 24)
    assert torch.equal(loaded(images), student(images))
    resized = graftvit.load(str(tmp_path / "out"), img_size=(24, 24))
    assert resized(torch.randn(1, 3, 24, 24)).shape == (1, 3)
    # and once more through everything
    save_student(str(tmp_path / "out"), tmp_path / "again")
    assert torch.equal(graftvit.load(str(tmp_path / "again"))(images), student(images))
    if not shards:
        by_timm = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        assert torch.equal(by_timm(images), loaded(images))


def test_a_path_is_a_source_like_its_text(tmp_path: Path, tiny: Callable[..., nn.Module]) -> None:
    model = tiny(**ARGUMENTS)
    images = Preprocessing.of(model, mean=MEAN, std=STD)
    write_student(model, tmp_path, architecture=NAME, model_args=ARGUMENTS, preprocessing=images)
    by_path, by_text = graftvit.load(tmp_path).state_dict(), graftvit.load(str(tmp_path)).state_dict()
    assert all(torch.equal(by_path[name], by_text[name]) for name in by_text)


def test_loaded_models_are_ready_to_use_and_to_train(run: Any) -> None:
    model = load(str(run[0]))
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("verb", [load, lambda model: save_student(model, "q")])
def test_a_model_is_no_source(verb: Any, tiny: Callable[..., nn.Module]) -> None:
    with pytest.raises(CheckpointError, match=r"VisionTransformer.*DualViT\.save.*save_for_hf") as caught:
        verb(tiny())
    assert len(str(caught.value)) < 300


def test_nothing_of_the_user_is_replaced(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="is there and holds no model: give a new folder"):
            save_student(run[0], out, overwrite=overwrite)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    save_student(run[0], out)
    with pytest.raises(CheckpointError, match="already holds a model: give another folder, or --force"):
        save_student(run[0], out)
    save_student(f"{run[0]}#ema", out, overwrite=True)
    assert same(load(str(out)), run[2])


def test_other_peoples_files_become_timm_folders(
    tmp_path: Path, tiny: Callable[..., nn.Module], mae_file: Callable[..., str]
) -> None:
    model = tiny()
    arguments = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 16, "patch_size": 4}
    source = mae_file(model.state_dict(), optimizer={"state": {}}, epoch=3)
    save_student(source, tmp_path / "out", model=NAME, model_args=arguments)
    assert same(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True), model.state_dict())
