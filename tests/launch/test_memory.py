from __future__ import annotations

import pytest
import timm
import torch
from graftvit.launch.config import load_config
from graftvit.launch.memory import activation_values, describe_memory, estimate_memory, parameter_count
from torch import Tensor, nn

SIZES = {"embed_dim": 48, "depth": 6, "num_heads": 3, "img_size": 64, "patch_size": 8, "num_classes": 10}


def student(**changes: object) -> nn.Module:
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **SIZES | changes)
    return model


def values_kept(model: nn.Module, images: Tensor) -> int:
    """Floats that a real forward pass keeps for the backward pass, parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(images)
        total = sum(kept.values())
        logits.sum().backward()
    return total


@pytest.mark.parametrize("mlp_ratio", [2, 4])
def test_activations_are_about_those_that_torch_keeps(mlp_ratio: int) -> None:
    model = student(mlp_ratio=mlp_ratio)
    batch = 4
    counted = batch * activation_values(load_config(None, ["mode=scratch"]), model, None, 0)
    kept = values_kept(model, torch.randn(batch, 3, 64, 64))
    assert counted == pytest.approx(kept, rel=0.1)


def test_checkpointing_is_counted() -> None:
    plain = load_config(None, ["mode=scratch"])
    checkpointed = load_config(None, ["mode=scratch", "grad_checkpointing=true"])
    model = student(depth=12)
    assert activation_values(checkpointed, model, None, 0) < 0.25 * activation_values(plain, model, None, 0)


def test_an_autoencoder_sees_the_visible_tokens() -> None:
    few = load_config(None, ["mode=pretrain", "mask_ratio=0.75", "decoder_depth=1", "decoder_dim=48"])
    many = load_config(None, ["mode=pretrain", "mask_ratio=0.25", "decoder_depth=1", "decoder_dim=48"])
    whole = activation_values(load_config(None, ["mode=scratch"]), student(), None, 0)
    difference = activation_values(many, student(), None, 0) - activation_values(few, student(), None, 0)
    assert difference == pytest.approx(whole / 2, rel=1e-3)


def sizes(overrides: list[str], **changes: int) -> dict[str, int]:
    model = student()
    model.head.requires_grad_(False)
    settings = {"layers": 4, "shards": 1} | changes
    items = estimate_memory(load_config(None, overrides), model, model, student(), **settings)
    return {item.name: item.size for item in items}


def test_parameters_gradients_and_optimiser_follow_what_is_trained() -> None:
    found = sizes(["batch_size=2"])
    count = parameter_count(student())
    trained = count - (48 * 10 + 10)
    assert found["student"] == found["teacher"] == 4 * count
    assert found["gradients"] == 4 * trained
    assert found["optimiser"] == 8 * trained
    assert "moving average" not in found


def test_what_changes_the_estimate() -> None:
    plain = sizes([])
    assert sizes(["ema=0.99"])["moving average"] == plain["student"]
    assert sizes(["batch_size=64"])["activations"] == 2 * plain["activations"]
    assert sizes(["precision=bf16"])["activations"] * 2 == plain["activations"]
    assert sizes([], layers=0)["activations"] < plain["activations"]
    sharded = sizes([], shards=4)
    assert sharded["optimiser"] == plain["optimiser"] // 4
    assert sharded["teacher"] == plain["teacher"]


def test_the_table_sums_up() -> None:
    model = student()
    lines = describe_memory(estimate_memory(load_config(), model, model, None, 0, 1))
    parts = [float(line.split("MiB")[0].split()[-1]) for line in lines[:-1]]
    assert parts[-1] == pytest.approx(sum(parts[:-1]), abs=0.3)
    assert "not counted" in lines[-1]
