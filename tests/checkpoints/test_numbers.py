"""Numbers that are finite in a file and infinite in the kind of number that they become are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.pretrained import load, load_pretrained, load_weights
from graftvit.checkpoints.student import save_student
from graftvit.models.errors import CheckpointError
from safetensors.torch import load_file, save_file
from support.files.hostile import ARCHITECTURE, ARGUMENTS, weights
from support.files.hostile_configs import small_model, write_model
from torch import Tensor


def with_value(tensors: dict[str, Tensor], name: str, value: float) -> dict[str, Tensor]:
    """The tensors in float64, with one number of another value."""
    wide = {key: tensor.double() for key, tensor in tensors.items()}
    wide[name].view(-1)[0] = value
    return wide


@pytest.mark.parametrize("value", [1e300, -1e39, float(torch.finfo(torch.float32).max) * 1.01])
@pytest.mark.parametrize("name", ["blocks.0.attn.qkv.weight", "pos_embed", "norm.bias"])
def test_a_number_beyond_float32_is_refused(name: str, value: float, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(with_value(weights(), name, value), path)
    with pytest.raises(CheckpointError, match=f"values that are not finite as float32 in {name}"):
        load_pretrained(str(path), model=ARCHITECTURE, model_args=ARGUMENTS)
    model, _, _ = small_model("plain")
    with pytest.raises(CheckpointError, match=f"not finite as float32 in {name}"):
        load_weights(model, str(path))


def test_a_number_beyond_float32_in_the_part_of_a_teacher_is_refused(tmp_path: Path) -> None:
    path = write_model("copied", tmp_path / "m") / "model.safetensors"
    name = "teacher.model.blocks.0.attn.qkv.weight"
    save_file(with_value(load_file(path), name, 1e300), path)
    with pytest.raises(CheckpointError, match=f"not finite as float32 in {name}"):
        load(tmp_path / "m")


def test_numbers_of_float64_within_float32_load(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(with_value(weights(), "norm.bias", 3e38), path)
    model = load_pretrained(str(path), model=ARCHITECTURE, model_args=ARGUMENTS).model
    assert model.state_dict()["norm.bias"][0] == torch.tensor(3e38)


def test_a_smaller_kind_of_number_that_cannot_hold_the_weights_is_refused(tmp_path: Path) -> None:
    folder = write_model("plain", tmp_path / "m")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["norm.bias"][0] = 1e6
    save_file(tensors, path)
    assert load(folder, dtype=torch.bfloat16).norm.bias.isfinite().all()
    with pytest.raises(CheckpointError, match=r"not finite as float16 in norm\.bias"):
        load(folder, dtype=torch.float16)
    with pytest.raises(CheckpointError, match=r"not finite as float16 in norm\.bias"):
        save_student(folder, tmp_path / "half", dtype=torch.float16)
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize("name", ["mean", "std"])
def test_two_numbers_for_three_channels_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="2 numbers for 3 channels"):
        Preprocessing.read({"input_size": (3, 32, 32), name: [0.9, 0.1]})
    assert Preprocessing.read({"input_size": (3, 32, 32), name: [0.9]}).described()[name] == [0.9] * 3
    assert Preprocessing.read({"input_size": (1, 32, 32), name: [0.9, 0.5, 0.1]}).described()[name] == [0.9]
