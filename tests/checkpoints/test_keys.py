from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from graftvit.checkpoints.pretrained import load_weights
from graftvit.models.conversion import convert
from graftvit.models.errors import CheckpointError
from safetensors.torch import load_file, save_file
from support.runs.engine_runs import make_teacher, tiny_vit


def test_operators_stay_fresh_where_the_weights_are_of_softmax(tmp_path: Path) -> None:
    student = convert(tiny_vit(), "0: focused")
    before = {key: value.clone() for key, value in student.named_parameters() if ".operator." in key}
    report = load_weights(student, f"local-dir:{make_teacher(tmp_path)}")
    assert set(report.missing) == set(before)
    assert before
    assert set(report.missing.values()) == {
        "a fresh operator: the weights are of a layer with softmax attention"
    }
    after = student.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_half_an_operator_is_still_refused(tmp_path: Path) -> None:
    student = convert(tiny_vit(), "*: focused")
    tensors = dict(load_file(make_teacher(tmp_path) / "model.safetensors"))
    tensors |= {
        key: value for key, value in student.state_dict().items() if "blocks.0.attn.operator.v" in key
    }
    save_file(tensors, tmp_path / "half.safetensors")
    with pytest.raises(CheckpointError, match=r"missing keys: blocks\.0\.attn\.operator\.feature"):
        load_weights(student, str(tmp_path / "half.safetensors"))


def test_a_plain_model_still_needs_all_its_weights(tmp_path: Path) -> None:
    tensors = dict(load_file(make_teacher(tmp_path) / "model.safetensors"))
    del tensors["blocks.1.attn.qkv.weight"]
    save_file(tensors, tmp_path / "cut.safetensors")
    arguments = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **arguments)
    with pytest.raises(CheckpointError, match=r"missing keys: blocks\.1\.attn\.qkv\.weight"):
        load_weights(model, str(tmp_path / "cut.safetensors"))
