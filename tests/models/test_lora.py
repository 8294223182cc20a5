"""LoRA adapters: they alone learn, and their merge is the model that they made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import graftvit
import pytest
import timm
import torch
from graftvit.models.conversion import convert, new_parameters, plan_of
from graftvit.models.errors import ConfigError, UnsupportedModelError
from graftvit.models.lora import add_lora, merged
from graftvit.transfer.config import OptimConfig
from graftvit.transfer.engine.optim import create_optimizer
from graftvit.transfer.engine.train import train
from support.models.pyramids import images, tiny
from support.runs.engine_runs import config, make_teacher
from torch import nn

SMALL: dict[str, Any] = {
    "embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 16, "patch_size": 4, "num_classes": 3,
}  # fmt: skip
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def vit(name: str = "vit_tiny_patch16_224", **more: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **more}).eval()


KINDS = ("pvt", "pvt_li", "svt", "pcpvt", "swin")
PLAN = "0: hedgehog; 1: none; stage2.0: softmax; merge: deformable"
HEADS = {"head.weight", "head.bias", "head.fc.weight", "head.fc.bias"}


def small(kind: str, plan: str | None) -> nn.Module:
    torch.manual_seed(0)
    model = vit() if kind == "vit" else tiny(kind)
    without = [] if kind == "vit" else ["bias"]
    return (model if plan is None else convert(model, plan, without=without)).eval()


@pytest.mark.parametrize(
    ("kind", "plan"),
    [("vit", "*: softmax"), ("vit", "*: linear; 1: softmax"), *((k, p) for k in KINDS for p in (None, PLAN))],
)
def test_the_merge_of_adapters_is_the_model(kind: str, plan: str | None) -> None:
    plain, model = small(kind, plan), small(kind, plan)
    batch = IMAGES if kind == "vit" else images((32, 32))
    operators = {id(parameter) for parameter in new_parameters(model)}
    add_lora(model, 3)
    torch.testing.assert_close(model(batch), plain(batch))  # B = 0 at the start
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    own = {name for name, parameter in model.named_parameters() if id(parameter) in operators}
    adapters = {name for name in learned if ".lora_" in name}
    assert learned - adapters - own <= HEADS
    assert own <= learned
    names = [name for name, _ in plain.named_modules() if ".attn." in f"{name}." and name.endswith("proj")]
    assert {f"{name}.lora_A.default.weight" for name in names} <= adapters
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    wanted = model(batch)
    assert not torch.allclose(wanted, plain(batch), atol=1e-3)
    plain.load_state_dict(merged(model.state_dict()))
    torch.testing.assert_close(plain(batch), wanted, rtol=1e-4, atol=1e-5)


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
    how: dict[str, Any] = {"mode": "finetune", "student": student, "engine": {"save_every": 5}}
    how["optim"] = {"lora": 2, "ema": 0.9}
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
    for model in (vit("beit_base_patch16_224", num_heads=2), tiny("swinv2")):
        with pytest.raises(UnsupportedModelError, match="layer 0 stores the biases of q and v apart"):
            add_lora(model, 2)
    with pytest.raises(ConfigError, match=r"optim\.lora=4611686018427387904"):
        add_lora(vit(), 2**62)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"needs peft, not installed: pip install 'peft>=[\d.]+'"):
        add_lora(vit(), 2)


@pytest.mark.parametrize("kind", [*KINDS, "swinv2"])
def test_layer_decay_goes_through_the_stages(kind: str) -> None:
    """No parameter learns faster than one behind it, and operators learn as fast as their block."""
    model = small(kind, "0: hedgehog; stage2.1: hedgehog")
    optimizer = create_optimizer(model, model, OptimConfig(layer_decay=0.5), 1e-3)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    scales = {name: scale[id(parameter)] for name, parameter in model.named_parameters()}
    order = [scales[name] for name in scales if ".mlp.fc1.weight" in name]
    assert order == sorted(order)
    assert order[0] < order[-1] < scales[next(name for name in scales if name.startswith("head."))] == 1.0
    for name, found in scales.items():
        if ".attn.operator." in name:
            block = name.partition(".attn.")[0]
            assert found == scales[f"{block}.mlp.fc1.weight"]
