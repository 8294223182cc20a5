"""Learning rate, layer scales, what is frozen, the state of optimizers, and the moving average."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from graftvit.launch.load_config import load_config
from graftvit.models.conversion import convert, new_parameters
from graftvit.models.errors import ConfigError
from graftvit.models.lora import add_lora
from graftvit.models.mae import MaskedAutoencoder
from graftvit.transfer.config import OptimConfig, RunConfig
from graftvit.transfer.engine.dry_run import dry_run
from graftvit.transfer.engine.optim import (
    Schedule,
    WeightAverage,
    check_adapters,
    create_optimizer,
    describe_batch,
    freeze,
    plan_schedule,
    set_learning_rate,
)
from graftvit.transfer.engine.run_state import collect_optimizer, restore_optimizer
from graftvit.transfer.engine.train import train
from graftvit.transfer.first_checks import check_first
from support.runs.engine_runs import ARCHITECTURE, ARGUMENTS, config, make_teacher
from torch import nn

DEPTH = 3


def vit(global_pool: str = "avg") -> nn.Module:
    sizes = {"img_size": 32, "embed_dim": 16, "depth": DEPTH, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", global_pool=global_pool, **sizes)


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


def test_layer_scales_are_those_of_mae_but_for_the_final_norm_of_token_pooling() -> None:
    for pool in ("avg", "token"):
        model = vit(pool)
        optimizer = create_optimizer(model, model, OptimConfig(layer_decay=0.5), 1e-3)
        set_learning_rate(optimizer, 1.0)
        found = scales(model, optimizer)
        assert found.keys() == dict(model.named_parameters()).keys()
        for name, (scale, decay) in found.items():
            wanted = pytest.approx(0.5 ** (DEPTH + 1 - mae_layer(name)), rel=1e-12)
            assert (scale == wanted) == (pool == "avg" or name not in ("norm.weight", "norm.bias")), name
            exempt = name in ("cls_token", "pos_embed") or model.get_parameter(name).ndim <= 1
            assert decay == (0.0 if exempt else 0.05), name


@pytest.mark.parametrize("decay", [1.0, 0.75])
def test_options_reach_the_optimizer_and_what_learns_outside_the_student_has_scale_one(decay: float) -> None:
    student, projector = vit(), nn.Linear(16, 8)
    task = nn.ModuleList([student, projector])
    config = OptimConfig(layer_decay=decay, opt="adamw", betas=(0.8, 0.7), weight_decay=0.3)
    optimizer = create_optimizer(task, student, config, 1e-3)
    set_learning_rate(optimizer, 2e-3)
    groups = [g for g in optimizer.param_groups if any(p is projector.weight for p in g["params"])]
    assert [group["lr"] for group in groups] == [2e-3]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(task.parameters()))
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.7)}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.3}
    assert isinstance(create_optimizer(task, student, OptimConfig(opt="sgd"), 1e-3), torch.optim.SGD)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"opt": "adamww"}, r"optim.opt='adamww'.*did you mean 'adamw'"),
        ({"opt": "adan", "betas": (0.5, 0.6)}, "optim.betas=.*does not fit optim.opt='adan'"),
        ({"opt": "sgd", "betas": (0.5, 0.6)}, "optim.betas=.*does not fit optim.opt='sgd'"),
        ({"opt": "kron"}, "keeps lists of matrices"),
        ({"opt": "adahessian"}, "second derivatives"),
        ({"betas": (0.9, 1.5)}, "cannot be used here: .*1.5"),
        ({"scales": {"(": 2.0}}, r"optim.scales='\(' is not a regular expression"),
    ],
)
def test_an_optimizer_that_cannot_run_is_refused(settings: dict[str, Any], sentence: str) -> None:
    model = vit()
    with pytest.raises(ConfigError, match=sentence):
        create_optimizer(model, model, OptimConfig(**settings), 0.1)


def test_warm_up_starts_at_zero_and_the_cosine_ends_at_the_minimum() -> None:
    rate = Schedule(1, 10, 110, peak=1.0, minimum=0.1, warmup_steps=10, effective_batch=8).rate
    assert rate(0) == 0
    assert rate(5) == pytest.approx(0.5)
    assert rate(10) == 1.0
    assert rate(60) == pytest.approx(0.55)
    assert rate(110) == pytest.approx(0.1)
    assert rate(35) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_a_rate_falls_by_steps_or_by_a_power() -> None:
    config = OptimConfig(
        lr=1.0, min_lr=0.005, epochs=4, schedule="steps", milestones=[1, 2.5, 3], warmup_steps=2
    )
    plan = plan_schedule(config, 4, batch_size=8, world_size=1)
    rates = [plan.rate(step) for step in range(16)]
    assert rates[:2] == [0.0, 0.5]
    assert rates[2:] == pytest.approx([1.0] * 2 + [0.1] * 6 + [0.01] * 2 + [0.005] * 4)
    config = OptimConfig(lr=1.0, min_lr=0.1, epochs=4, schedule="poly", power=2.0, warmup_steps=0)
    plan = plan_schedule(config, 4, batch_size=8, world_size=1)
    assert [plan.rate(step) for step in (0, 4, 8, 16)] == pytest.approx(
        [1.0, 0.1 + 0.9 * 0.5625, 0.1 + 0.9 * 0.25, 0.1]
    )


def test_lr_follows_the_effective_batch_unless_it_is_given() -> None:
    plan = plan_schedule(OptimConfig(blr=1e-3, accum_iter=4, epochs=2), 10, batch_size=32, world_size=8)
    assert plan.effective_batch == 1024
    assert plan.peak == pytest.approx(4e-3)
    assert (plan.accum, plan.steps_per_epoch, plan.total_steps) == (4, 2, 4)
    assert plan_schedule(OptimConfig(lr=0.5), 10, 32, 8).peak == 0.5
    assert plan_schedule(OptimConfig(epochs=9, max_steps=7), 5, 32, 1).total_steps == 7
    plan = plan_schedule(OptimConfig(accum_iter=8, epochs=3), 2, 32, 1)  # fewer batches than accumulation
    assert (plan.accum, plan.steps_per_epoch, plan.total_steps) == (2, 1, 3)


@pytest.mark.parametrize(
    ("values", "rates"),
    [
        ({"max_steps": 1}, [0.5]),
        ({"max_steps": 1, "warmup_epochs": 0.5}, [0.5]),
        ({"epochs": 1, "warmup_epochs": 0.9}, [0.5]),
    ],
)
def test_a_run_of_one_step_trains_at_the_peak(values: dict[str, float], rates: list[float]) -> None:
    plan = plan_schedule(OptimConfig.model_validate({"lr": 0.5, **values}), len(rates), 32, 1)
    assert [plan.rate(step) for step in range(plan.total_steps)] == rates


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ({"epochs": 100}, 100), ({"epochs": 50}, 100), ({"epochs": 3}, 6), ({"epochs": 1}, 2), ({"max_steps": 30}, 3),
        ({"epochs": 3, "warmup_epochs": 2.5}, 50), ({"epochs": 3, "warmup_epochs": 0}, 0),
        ({"max_steps": 30, "warmup_epochs": 1}, 20), ({"max_steps": 20, "warmup_epochs": 1}, 2),
    ],
)  # fmt: skip
def test_a_warm_up_that_is_not_given_is_five_epochs_and_at_most_a_tenth(
    values: dict[str, float], steps: float
) -> None:
    plan = plan_schedule(OptimConfig.model_validate({"lr": 0.5, **values}), 20, 32, 1)
    assert plan.warmup_steps == pytest.approx(steps)


@pytest.mark.parametrize("name", ["lr", "blr"])
def test_a_rate_of_zero_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"optim.{name} is 0"):
        load_config(None, {f"optim.{name}": 0})


def test_freeze_keeps_the_head_and_what_matches_and_does_not_thaw() -> None:
    model = vit()
    model.get_parameter("blocks.0.attn.qkv.bias").requires_grad_(False)
    freeze(model, r"attn\.qkv")
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted = {name for name, _ in model.named_parameters() if "attn.qkv" in name or name.startswith("head.")}
    assert learning == wanted - {"blocks.0.attn.qkv.bias"}
    for pattern, message in (("blocks.9", "matches no parameter"), ("(", "not a regular expression")):
        with pytest.raises(ConfigError, match=rf"optim.trainable=.*{message}"):
            freeze(vit(), pattern)


@pytest.mark.parametrize(
    ("lr", "blr", "refused"), [(None, 1e-3, True), (None, 0.1, False), (1e-4, 1.0, True)]
)
def test_a_floor_above_the_peak_is_refused(lr: float | None, blr: float, refused: bool) -> None:
    message = "optim.min_lr=0.002 is above the peak of the learning rate, 0.0001"
    with pytest.raises(ConfigError, match=message) if refused else nullcontext():
        assert plan_schedule(OptimConfig(lr=lr, blr=blr, min_lr=2e-3), 10, 32, 1).total_steps


OF_2048 = {"recipe_batch": 2048}


@pytest.mark.parametrize(
    ("options", "batch", "processes", "words"),
    [
        ({}, 32, 1, ""),
        (OF_2048, 32, 64, ""),
        ({**OF_2048, "accum_iter": 64}, 32, 1, ""),
        (OF_2048, 32, 1, "32 images, .* 2,048: .* is 0.000125, .*'s 0.008; --accum_iter 64"),
        ({**OF_2048, "lr": 1e-3}, 32, 8, "256 images, and .* 2,048, for its .*; --accum_iter 8"),
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
    few = describe_batch(OptimConfig(blr=1e-3, accum_iter=8, recipe_batch=1024), 128, 1, 72)
    assert few.startswith("the data set has too few images for a step of 1,024, so a step has 72")
    assert "for 1,024 (0.004)" in few


def autoencoder(**options: bool) -> MaskedAutoencoder:
    return MaskedAutoencoder(vit("token"), decoder_dim=8, decoder_depth=1, decoder_heads=2, **options)


def test_layer_decay_in_pretraining_scales_the_encoder_and_leaves_the_decoder() -> None:
    model, encoder, found = autoencoder(), vit("token"), {}
    for each in (model, encoder):
        optimizer = create_optimizer(each, each, OptimConfig(layer_decay=0.5), 1e-3)
        set_learning_rate(optimizer, 1.0)
        found[each] = {name: scale for name, (scale, _) in scales(each, optimizer).items()}
    wanted = {f"encoder.{name}": scale for name, scale in found[encoder].items()}
    assert found[model] == {name: wanted.get(name, 1.0) for name in found[model]}
    assert wanted.keys() < found[model].keys()


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


@pytest.mark.parametrize(
    ("values", "refused"),
    [
        ({"warmup_epochs": 5, "epochs": 5}, True),
        ({"warmup_epochs": 5.0, "epochs": 3}, True),
        ({"warmup_epochs": 1.5, "epochs": 1}, True),
        ({"warmup_epochs": 0, "epochs": 1}, False),
        ({"warmup_epochs": 5, "max_steps": 3}, False),
        ({"warmup_epochs": 0.9, "epochs": 1}, False),
        ({"epochs": 1}, False),
    ],
)
def test_a_warm_up_as_long_as_the_run_is_refused(values: dict[str, float], refused: bool) -> None:
    run = RunConfig.model_validate({"mode": "scratch", "optim": values})
    message = r"^optim.warmup_epochs=\S+ is not below optim.epochs=\d"
    with pytest.raises(ConfigError, match=message) if refused else nullcontext():
        check_first(run)


@pytest.mark.parametrize(("trainable", "refused"), [("head", True), (r"blocks\.0", False), ("lora_", False)])
def test_adapters_of_which_none_learns_are_refused(trainable: str, refused: bool) -> None:
    pytest.importorskip("peft")
    model, config = vit(), OptimConfig(lora=2, trainable=trainable)
    add_lora(model, 2)
    freeze(model, trainable)
    with pytest.raises(ConfigError, match=r"optim.lora=2 changes nothing") if refused else nullcontext():
        check_adapters(model, config)


NAMES = ["adamw", "sgd", "lamb", "adan", "adamp", "muon", "adafactor", "lion", "nadamw", "radamw"]


def make(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    return model, create_optimizer(model, model, OptimConfig(opt=name), 1e-2)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    images = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))
    model(images).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", NAMES)
def test_a_restored_optimizer_goes_on_bit_for_bit(name: str) -> None:
    model, optimizer = make(name)
    for seed in range(3):
        step(model, optimizer, seed)
    slots, counters, numbers = collect_optimizer(model, optimizer)
    tensors = {name: tensor.clone() for name, tensor in {**slots, **counters}.items()}
    tensors = {key: value.clone() for key, value in tensors.items()}
    other, restored = make(name)
    other.load_state_dict(model.state_dict())
    restore_optimizer(tensors, numbers, other, restored)
    for seed in (3, 4):
        step(model, optimizer, seed)
        step(other, restored, seed)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["adamp", "muon"])
def test_the_dry_run_counts_slots_of_an_optimizer_that_looks_at_numbers(name: str, tmp_path: Path) -> None:
    built = dry_run(
        config(tmp_path / "run", make_teacher(tmp_path / "teacher"), optim={"opt": name}), 1, here=True
    )
    learning = sum(p.numel() for p in built.parts.task.parameters() if p.requires_grad)
    assert built.footprint.optimizer >= 4 * learning


def test_a_loss_that_nothing_trained_changes_is_refused_in_one_sentence(tmp_path: Path) -> None:
    frozen = {"transfer": {"layers": "0", "task_weight": 0.0}, "optim": {"trainable": r"blocks\.1"}}
    run = config(tmp_path / "run", make_teacher(tmp_path / "teacher"), **frozen)
    for call in (partial(dry_run, run, 1, here=True), partial(train, run)):
        with pytest.raises(ConfigError, match="no trained parameter changes the loss"):
            call()


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_it_is_the_average_of_the_equation() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    average = WeightAverage(model, decay=0.9)
    expected = {name: each.clone() for name, each in model.state_dict().items() if each.is_floating_point()}
    for _ in range(5):
        moved(model)
        average.update()
        for name, tensor in expected.items():
            tensor.mul_(0.9).add_(model.state_dict()[name], alpha=0.1)
    assert average.updates == 5
    assert average.average.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(average.average[name], tensor, rtol=1e-12, atol=1e-14)


def test_applied_gives_the_weights_back_bit_for_bit() -> None:
    model = nn.Linear(3, 4)
    average, before = WeightAverage(model, decay=0.5), model.weight.detach().clone()
    moved(model)
    assert torch.equal(average.average["weight"], before), "it shares no memory"
    own = model.weight.detach().clone()
    images = torch.randn(2, 3)
    with average.applied():
        assert torch.equal(model.weight, average.average["weight"])
        expected = model(images)
    assert torch.equal(model.weight, own)
    assert model.weight.requires_grad
    with torch.no_grad():
        assert torch.equal(average.predictor(model)(images), expected)
        assert not torch.equal(model(images), expected)


def test_new_parameters_learn_faster() -> None:
    model = convert(timm.create_model(ARCHITECTURE, **ARGUMENTS), "*: hedgehog; 1: window(window=1)")
    optimizer = create_optimizer(model, model, OptimConfig(scales={r"\.operator\.": 20.0}), 1e-3)
    scales = {id(p): group.get("lr_scale", 1.0) for group in optimizer.param_groups for p in group["params"]}
    new = {id(parameter) for parameter in new_parameters(model)}
    assert new
    assert all(scale == (20.0 if key in new else 1.0) for key, scale in scales.items())


def test_factors_of_several_expressions_multiply(caplog: pytest.LogCaptureFixture) -> None:
    model = timm.create_model(ARCHITECTURE, **ARGUMENTS)
    scales = {r"blocks\.0": 0.5, r"mlp\.fc1\.weight": 4.0, "nowhere": 3.0}
    optimizer = create_optimizer(model, model, OptimConfig(scales=scales, layer_decay=0.5), 1e-3)
    plain = create_optimizer(model, model, OptimConfig(layer_decay=0.5), 1e-3)
    found, without = (
        {id(p): group["lr_scale"] for group in each.param_groups for p in group["params"]}
        for each in (optimizer, plain)
    )
    names = {name: id(parameter) for name, parameter in model.named_parameters()}
    for name, factor in (
        ("blocks.0.mlp.fc1.weight", 2.0), ("blocks.0.mlp.fc1.bias", 0.5), ("blocks.1.mlp.fc1.weight", 4.0),
        ("head.bias", 1.0),
    ):  # fmt: skip
        assert found[names[name]] == factor * without[names[name]]
    assert found.keys() == without.keys()
    assert "optim.scales: 'nowhere' matches the name of no parameter that learns" in caplog.text
