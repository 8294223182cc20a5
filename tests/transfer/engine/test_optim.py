"""Learning rate, layer scales and what is frozen."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext

import pytest
import timm
import torch
from graftvit.launch.load_config import load_config
from graftvit.models.errors import ConfigError
from graftvit.models.lora import add_lora
from graftvit.models.mae import MaskedAutoencoder
from graftvit.transfer.config import OptimConfig
from graftvit.transfer.engine.optim import (
    check_adapters,
    check_schedule,
    create_optimizer,
    describe_batch,
    freeze,
    learning_rate,
    plan_schedule,
    set_learning_rate,
)
from torch import nn

DEPTH = 3


def vit(global_pool: str = "avg") -> nn.Module:
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        embed_dim=16,
        depth=DEPTH,
        num_heads=2,
        num_classes=5,
        global_pool=global_pool,
    )
    return model


def mae_layer(name: str) -> int:
    """MAE's rule: embeddings 0, block i is i + 1, everything after the blocks is depth + 1."""
    if name.startswith(("cls_token", "pos_embed", "patch_embed")):
        return 0
    block = re.match(r"blocks\.(\d+)", name)
    return int(block[1]) + 1 if block else DEPTH + 1


def scales(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_layer_scales_are_those_of_mae_for_average_pooling() -> None:
    model = vit()
    optimizer = create_optimizer(model, model, OptimConfig(layer_decay=0.5), 1e-3)
    set_learning_rate(optimizer, 1.0)
    found = scales(model, optimizer)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, (scale, decay) in found.items():
        assert scale == pytest.approx(0.5 ** (DEPTH + 1 - mae_layer(name)), rel=1e-12), name
        exempt = name in ("cls_token", "pos_embed") or model.get_parameter(name).ndim <= 1
        assert decay == (0.0 if exempt else 0.05), name


def test_timm_differs_from_mae_only_in_the_final_norm_of_token_pooling() -> None:
    model = vit("token")
    optimizer = create_optimizer(model, model, OptimConfig(layer_decay=0.5), 1e-3)
    set_learning_rate(optimizer, 1.0)
    differing = {
        name
        for name, (scale, _) in scales(model, optimizer).items()
        if scale != pytest.approx(0.5 ** (DEPTH + 1 - mae_layer(name)))
    }
    assert differing == {"norm.weight", "norm.bias"}


@pytest.mark.parametrize("decay", [1.0, 0.75])
def test_what_learns_outside_the_student_has_scale_one(decay: float) -> None:
    student, projector = vit(), nn.Linear(16, 8)
    task = nn.ModuleList([student, projector])
    optimizer = create_optimizer(task, student, OptimConfig(layer_decay=decay), 1e-3)
    set_learning_rate(optimizer, 2e-3)
    groups = [g for g in optimizer.param_groups if any(p is projector.weight for p in g["params"])]
    assert [group["lr"] for group in groups] == [2e-3]
    counted = sum(len(group["params"]) for group in optimizer.param_groups)
    assert counted == len(list(task.parameters()))


def test_options_reach_the_optimizer() -> None:
    model = vit()
    config = OptimConfig(opt="adamw", betas=(0.8, 0.7), weight_decay=0.3)
    optimizer = create_optimizer(model, model, config, 1e-3)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.7)}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.3}
    assert isinstance(create_optimizer(model, model, OptimConfig(opt="sgd"), 1e-3), torch.optim.SGD)


def test_an_unknown_optimizer_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"optim.opt='adamww'.*did you mean 'adamw'"):
        create_optimizer(vit(), vit(), OptimConfig(opt="adamww"), 1e-3)


def test_betas_that_an_optimizer_does_not_take_are_refused() -> None:
    for opt in ("adan", "sgd"):
        create_optimizer(vit(), vit(), OptimConfig(opt=opt), 1e-3)
        with pytest.raises(ConfigError, match=rf"optim.betas=.*does not fit optim.opt='{opt}'"):
            create_optimizer(vit(), vit(), OptimConfig(opt=opt, betas=(0.5, 0.6)), 1e-3)


def test_warm_up_starts_at_zero_and_the_cosine_ends_at_the_minimum() -> None:
    def rate(step: int) -> float:
        return learning_rate(step, peak=1.0, minimum=0.1, warmup_steps=10, total_steps=110)

    assert rate(0) == 0
    assert rate(5) == pytest.approx(0.5)
    assert rate(10) == 1.0
    assert rate(60) == pytest.approx(0.55)
    assert rate(110) == pytest.approx(0.1)
    assert rate(35) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_lr_follows_the_effective_batch_unless_it_is_given() -> None:
    plan = plan_schedule(OptimConfig(blr=1e-3, accum_iter=4, epochs=2), 10, batch_size=32, world_size=8)
    assert plan.effective_batch == 1024
    assert plan.peak == pytest.approx(4e-3)
    assert (plan.accum, plan.steps_per_epoch, plan.total_steps) == (4, 2, 4)
    assert plan_schedule(OptimConfig(lr=0.5), 10, 32, 8).peak == 0.5


@pytest.mark.parametrize(
    "values",
    [{"max_steps": 1}, {"max_steps": 1, "warmup_epochs": 0.5}, {"epochs": 1, "warmup_epochs": 0.9}],
)
def test_a_run_of_one_step_trains_at_the_peak(values: dict[str, float]) -> None:
    plan = plan_schedule(OptimConfig.model_validate({"lr": 0.5, **values}), 1, 32, 1)
    assert (plan.total_steps, plan.rate(0)) == (1, 0.5)


@pytest.mark.parametrize("name", ["lr", "blr"])
def test_a_rate_of_zero_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"optim.{name} is 0"):
        load_config(None, {f"optim.{name}": 0})


def test_a_run_of_two_steps_keeps_its_warm_up() -> None:
    plan = plan_schedule(OptimConfig(lr=0.5, max_steps=2, warmup_epochs=1), 2, 32, 1)
    assert [plan.rate(step) for step in range(2)] == [0, 0.25]


def test_fewer_batches_than_accumulation_make_one_step() -> None:
    plan = plan_schedule(OptimConfig(accum_iter=8, epochs=3), 2, 32, 1)
    assert (plan.accum, plan.steps_per_epoch, plan.total_steps) == (2, 1, 3)


def test_max_steps_overrides_epochs() -> None:
    assert plan_schedule(OptimConfig(epochs=9, max_steps=7), 5, 32, 1).total_steps == 7


def test_freeze_keeps_the_head_and_what_matches() -> None:
    model = vit()
    freeze(model, r"attn\.qkv")
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {n for n in dict(model.named_parameters()) if "attn.qkv" in n or n.startswith("head.")}


def test_freeze_does_not_thaw() -> None:
    model = vit()
    model.get_parameter("cls_token").requires_grad_(False)
    freeze(model, ".*")
    assert not model.get_parameter("cls_token").requires_grad


@pytest.mark.parametrize(
    ("pattern", "message"), [("blocks.9", "matches no parameter"), ("(", "not a regular expression")]
)
def test_freeze_refuses_a_useless_pattern(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"optim.trainable=.*{message}"):
        freeze(vit(), pattern)


@pytest.mark.parametrize(
    ("lr", "blr", "refused"), [(None, 1e-3, True), (None, 0.1, False), (1e-4, 1.0, True)]
)
def test_a_floor_above_the_peak_is_refused(lr: float | None, blr: float, refused: bool) -> None:
    config = OptimConfig(lr=lr, blr=blr, min_lr=2e-3)
    if not refused:
        assert plan_schedule(config, 10, 32, 1).total_steps
        return
    with pytest.raises(
        ConfigError, match=r"optim.min_lr=0.002 is above the peak of the learning rate, 0.0001"
    ):
        plan_schedule(config, 10, 32, 1)


@pytest.mark.parametrize(
    ("options", "batch", "processes", "words"),
    [
        ({}, 32, 1, ""),
        ({"recipe_batch": 2048}, 32, 64, ""),
        ({"recipe_batch": 2048, "accum_iter": 64}, 32, 1, ""),
        (
            {"recipe_batch": 2048},
            32,
            1,
            "32 images, .* 2,048: .* is 0.000125, .*'s 0.008; --accum_iter 64",
        ),
        (
            {"recipe_batch": 2048, "lr": 1e-3},
            32,
            8,
            "256 images, and the recipe's 2,048, for its .*; --accum_iter 8",
        ),
        ({"recipe_batch": 100}, 32, 2, "--batch_size and --accum_iter whose product over 2 processes is 100"),
    ],
)
def test_a_batch_that_is_not_the_recipes_is_described(
    options: dict[str, float], batch: int, processes: int, words: str
) -> None:
    config = OptimConfig(**options)
    described = describe_batch(config, batch, processes, batch * config.accum_iter * processes)
    assert bool(described) == bool(words)
    assert re.search(words, described)


def test_a_batch_that_the_data_cannot_fill_is_described() -> None:
    described = describe_batch(OptimConfig(blr=1e-3, accum_iter=8, recipe_batch=1024), 128, 1, 72)
    assert described.startswith("the data set has too few images for a step of 1,024, so a step has 72")
    assert "for 1,024 (0.004)" in described


def autoencoder(**options: bool) -> MaskedAutoencoder:
    return MaskedAutoencoder(vit("token"), decoder_dim=8, decoder_depth=1, decoder_heads=2, **options)


def test_layer_decay_in_pretraining_scales_the_encoder_and_leaves_the_decoder() -> None:
    model, encoder = autoencoder(), vit("token")
    found = {}
    for each in (model, encoder):
        optimizer = create_optimizer(each, each, OptimConfig(layer_decay=0.5), 1e-3)
        set_learning_rate(optimizer, 1.0)
        found[each] = {name: scale for name, (scale, _) in scales(each, optimizer).items()}
    inner = {
        name.removeprefix("encoder."): scale for name, scale in found[model].items() if "encoder." in name
    }
    assert inner == found[encoder]
    assert {scale for name, scale in found[model].items() if not name.startswith("encoder.")} == {1.0}


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_pretraining_decays_tokens_as_mae_does_unless_told_otherwise(layer_decay: float) -> None:
    config = OptimConfig(layer_decay=layer_decay)
    exempt = {}
    for decayed in (True, False):
        model = autoencoder(decay_tokens=decayed)
        found = scales(model, create_optimizer(model, model, config, 1e-3))
        exempt[decayed] = {name for name, (_, decay) in found.items() if decay == 0}
    assert exempt[False] - exempt[True] == {"encoder.cls_token", "encoder.pos_embed", "mask_token"}
    assert all(model.get_parameter(name).ndim == 1 for name in exempt[True])


@pytest.mark.parametrize(("warmup", "epochs", "steps"), [(5, 5, None), (5.0, 3, None), (1.5, 1, None)])
def test_a_warm_up_as_long_as_the_run_is_refused(warmup: float, epochs: int, steps: int | None) -> None:
    config = OptimConfig(warmup_epochs=warmup, epochs=epochs, max_steps=steps)
    with pytest.raises(
        ConfigError, match=rf"optim.warmup_epochs={warmup:g} is not below optim.epochs={epochs}"
    ):
        check_schedule(config)


@pytest.mark.parametrize(
    "values", [{"warmup_epochs": 0}, {"warmup_epochs": 5, "max_steps": 3}, {"warmup_epochs": 0.9}]
)
def test_a_shorter_warm_up_none_and_one_in_a_run_of_steps_are_accepted(values: dict[str, float]) -> None:
    check_schedule(OptimConfig.model_validate({"epochs": 1, **values}))


@pytest.mark.parametrize(("trainable", "refused"), [("head", True), (r"blocks\.0", False), ("lora_", False)])
def test_adapters_of_which_none_learns_are_refused(trainable: str, refused: bool) -> None:
    pytest.importorskip("peft")
    model, config = vit(), OptimConfig(lora=2, trainable=trainable)
    add_lora(model, 2)
    freeze(model, trainable)
    with pytest.raises(ConfigError, match=r"optim.lora=2 changes nothing") if refused else nullcontext():
        check_adapters(model, config)
