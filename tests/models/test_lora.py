"""LoRA adapters: they alone learn, and their merge is the model that they made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import graftvit
import pytest
import timm
import torch
from graftvit.models.conversion import convert, plan_of
from graftvit.models.errors import ConfigError, UnsupportedModelError
from graftvit.models.lora import add_lora, merged
from graftvit.transfer.engine.train import train
from support.runs.engine_runs import config, make_teacher
from torch import nn

SMALL: dict[str, Any] = {
    "embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 16, "patch_size": 4, "num_classes": 3,
}  # fmt: skip
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def vit(name: str = "vit_tiny_patch16_224", **more: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **more}).eval()


@pytest.mark.parametrize("plan", ["*: softmax", "*: linear; 1: softmax"])
def test_the_merge_is_the_model(plan: str) -> None:
    plain = convert(vit(), plan)
    model = convert(vit(), plan)
    add_lora(model, 3)
    torch.testing.assert_close(model(IMAGES), plain(IMAGES))  # B = 0 at the start
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    wanted = model(IMAGES)
    assert not torch.allclose(wanted, plain(IMAGES), atol=1e-3)
    plain.load_state_dict(merged(model.state_dict()))
    torch.testing.assert_close(plain(IMAGES), wanted, rtol=1e-4, atol=1e-5)


def test_adapters_and_the_head_alone_learn() -> None:
    model = convert(vit(), "*: linear")
    add_lora(model, 2)
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapters = {
        f"blocks.{i}.attn.{p}.lora_{m}.default.weight" for i in (0, 1) for p in ("qkv", "proj") for m in "AB"
    }
    assert learned == adapters | {"head.weight", "head.bias"}


def test_a_state_dict_without_adapters_stays_as_it_is() -> None:
    tensors = vit().state_dict()
    found = merged(tensors)
    assert found.keys() == tensors.keys()
    assert all(found[name] is tensor for name, tensor in tensors.items())


def test_a_run_with_adapters_resumes_and_is_saved_without_them(tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    student = {"model": f"local-dir:{teacher}", "plan": "*: linear", "model_args": {}, "drop_path": 0.0}
    how = {
        "mode": "finetune",
        "student": student,
        "optim": {"lora": 2, "ema": 0.9},
        "engine": {"save_every": 5},
    }
    train(config(tmp_path / "run", teacher, **how))
    saved = graftvit.load(str(tmp_path / "run" / "student"))
    assert plan_of(saved) == "*: linear"
    before, after = (
        graftvit.load(source).state_dict() for source in (str(teacher), str(tmp_path / "run" / "student"))
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    attention = {f"blocks.{i}.attn.{p}.weight" for i in (0, 1) for p in ("qkv", "proj")}
    assert changed == attention | {"head.weight", "head.bias"}
    state = tmp_path / "run" / "checkpoints" / "last.safetensors"
    for part, folder in (("", "student"), ("#ema", "student_ema")):
        found = graftvit.load(f"{state}{part}").state_dict()
        wanted = graftvit.load(str(tmp_path / "run" / folder)).state_dict()
        assert all(torch.allclose(found[name], tensor) for name, tensor in wanted.items())
    state.unlink()
    train(config(tmp_path / "run", teacher, **how))
    again = graftvit.load(str(tmp_path / "run" / "student")).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in after.items())


def test_what_cannot_have_adapters_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedModelError, match="layer 0 stores the biases of q and v apart"):
        add_lora(vit("beit_base_patch16_224", num_heads=2), 2)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"needs peft, not installed: pip install 'graftvit\[lora\]'"):
        add_lora(vit(), 2)
