"""Every setting changes the run, or the run refuses it.

Each setting gets another value in each of several situations, and the run is built there without the check. The check
must refuse the value exactly where nothing differs that is built, drawn, computed or scheduled.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from graftvit.launch.fields import leaves
from graftvit.models.errors import ConfigError, GraftError
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine.build import build, check_settings
from graftvit.transfer.engine.modes import MODES, mode_of
from graftvit.transfer.engine.optim import create_optimizer, plan_schedule
from graftvit.transfer.mode_config import MODE_FACTS, Mode
from graftvit.transfer.setting import check_effect, find_rule, find_unread, rule_of, without
from support.runs.engine_runs import ARCHITECTURE, ARGUMENTS, make_teacher
from torch import Tensor

IN_THE_LOOP = {
    "student.compile", "teacher.compile", "teacher.dtype", "student.grad_checkpointing", "student.calibrate",
    "data.stage", "transfer.cache", "transfer.cache_type", "transfer.cache_top", "transfer.cache_pool",
    "optim.clip_grad", "optim.ema", "optim.recipe_batch", "data.eval_batch_size",
    "engine.precision", "engine.tf32", "engine.fsdp", "teacher.shard", "engine.patience",
    "engine.evaluate_teacher", "engine.evaluate_start", "engine.eval_every",
}  # fmt: skip
"""Settings that are read after the run is built: tests of the engine see that they change it."""
BY_VALUE = {
    "teacher.position_embedding": "where a grid of patches is resampled",
    "transfer.interpolate_grid": "between different grids",
    "data.num_classes": "where the data set does not say it",
    "data.max_bad_images": "where images are damaged",
    "teacher.model": "for a file that does not name its architecture",
    "teacher.model_args": "where they differ from those of the weights",
    "teacher.revision": "on the hub",
    "transfer.share_drop_path": "where a block is dropped before the last one that teaches",
    "student.pos_embed_std": "where the weights bring no head: it moves the draws of a fresh one",
}
"""Settings whose effect depends on what is read, which the check does not open: they count as read."""
SWITCHES = [leaf for leaf in leaves().values() if leaf.is_switch and not rule_of(leaf.field).outside]
OTHER: dict[str, Any] = {
    **{leaf.key: not leaf.field.default for leaf in SWITCHES},
    "seed": 1, "teacher.source": "OTHER", "teacher.revision": "main", "teacher.model": ARCHITECTURE,
    "teacher.model_args": {"qk_norm": False}, "teacher.img_size": 16, "teacher.position_embedding": "mae",
    "teacher.dtype": "bf16",
    "teachers": {"other": {"source": "TEACHER"}},
    "student.model": "vit_small_patch16_224", "student.model_args": {**ARGUMENTS, "qk_norm": True},
    "student.plan": "1: kernel", "student.calibrate": 3, "student.init": "OTHER", "student.img_size": 16,
    "student.global_pool": "token", "student.without": ("bias",),
    "student.drop_path": 0.5, "student.pos_embed_std": 0.3,
    "transfer.method": "attention_output", "transfer.layers": "0", "transfer.heads": [0], "transfer.loss": "kl",
    "transfer.feature_loss": "smooth_l1", "transfer.logits_loss": "hard", "transfer.logits_head": "distillation",
    "transfer.tokens": "patches", "transfer.standardize": "dimension", "transfer.standardize_images": 9,
    "transfer.weight": 0.5, "transfer.reduction": "mean", "transfer.temperature": 2.0, "transfer.rows": 0.5,
    "transfer.losses": [{"method": "feature"}], "transfer.task_weight": 0.5,
    "transfer.cache": "/tmp", "transfer.cache_limit": 1.0, "transfer.cache_type": "int8", "transfer.cache_top": 3,
    "transfer.cache_pool": 2, "align.match": "map",
    "data.dataset": "torch/cifar10", "data.data_path": "/tmp", "data.stage": "/tmp", "data.train_split": "validation",
    "data.val_split": "train", "data.download": True, "data.image_column": "x", "data.label_column": "y",
    "data.classes": ["0", "1"], "data.num_classes": 10, "data.train_samples": 20, "data.label_seed": 1,
    "data.val_samples": 20,
    "data.batch_size": 6, "data.views": 0, "data.eval_batch_size": 3, "data.crop_scale": (0.3, 0.5), "data.hflip": 0.9,
    "data.aa": "rand-m9", "data.color_jitter": 0.9, "data.interpolation": "bilinear", "data.crop_pct": 0.5,
    "data.crop_mode": "border", "data.reprob": 0.9, "data.mixup": 0.4, "data.cutmix": 0.7, "data.smoothing": 0.3,
    "data.aug_repeats": 2,
    "optim.epochs": 7, "optim.max_steps": 5, "optim.opt": "sgd", "optim.lr": 0.3, "optim.blr": 0.2,
    "optim.min_lr": 1e-5, "optim.warmup_epochs": 2.0, "optim.weight_decay": 0.2, "optim.betas": (0.8, 0.9),
    "optim.layer_decay": 0.5, "optim.clip_grad": 0.5, "optim.accum_iter": 2, "optim.recipe_batch": 99,
    "optim.ema": 0.5, "optim.scales": {".": 3.0}, "optim.lora": 2, "optim.trainable": r"blocks\.1",
    "optim.schedule": "poly", "optim.milestones": [1.0], "optim.power": 2.0, "optim.warmup_steps": 3,
    "dense.head": "retinanet", "dense.source": "/tmp", "dense.frozen": True, "dense.width": 8, "dense.norms": [1],
    "dense.anchor_scale": 2.0, "dense.samples": 64, "dense.short": [64], "dense.long": 96, "dense.cropped": [64],
    "dense.scale": (0.5, 2.0), "dense.crop": 32, "dense.distort": True,
    "engine.precision": "bf16", "engine.eval_every": 2,
    "engine.metric": "loss", "engine.patience": 2,
    "pretrain.mask_ratio": 0.5, "pretrain.decoder_dim": 12, "pretrain.decoder_depth": 2, "pretrain.decoder_heads": 1,
}  # fmt: skip
"""By setting, another value than its default; of a switch, the other one."""
SITUATIONS: dict[str, dict[str, Any]] = {
    "distill": {},
    "copy": {"transfer.method": "copy", "student.drop_path": 0.3},
    "feature": {"transfer.method": "feature", "transfer.task_weight": 0.0},
    "logits": {
        "transfer.method": "logits",
        "student.init": "teacher",
        "student.global_pool": "avg",
        "data.aa": None,
    },
    "align": {"mode": "align", "student.plan": "*: kernel", "student.global_pool": "token"},
    "finetune": {
        "mode": "finetune",
        "student.global_pool": "avg",
        "data.aa": "rand-m9",
        "optim.max_steps": 4,
        "optim.warmup_epochs": 0,
    },
    "continued": {
        "mode": "finetune",
        "student.model": "TEACHER",
        "student.model_args": {},
        "teacher.source": None,
    },
    "scratch": {"mode": "scratch", "teacher.source": None, "data.aa": "affine", "data.val_split": None},
    "pretrain": {"mode": "pretrain", "teacher.source": None, "optim.lr": 0.1, "data.train_samples": None},
}
"""Configurations in which each setting gets its other value."""
TINY = {"pretrain.decoder_dim": 8, "pretrain.decoder_depth": 1, "pretrain.decoder_heads": 2}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sources")
    return {
        name: f"local-dir:{make_teacher(folder / name, mean=(mean,))}"
        for name, mean in (("TEACHER", 0.5), ("OTHER", 0.4))
    }


def made(settings: dict[str, Any], sources: dict[str, str]) -> RunConfig:
    """A run of tiny models on digits with these settings."""
    base: dict[str, Any] = {
        "teacher.source": "TEACHER", "student.model": ARCHITECTURE, "student.model_args": ARGUMENTS,
        "data.dataset": "digits", "data.batch_size": 8, "data.workers": 0, "data.train_samples": 24, "data.aa": None,
        "engine.device": "cpu", **(TINY if settings.get("mode") == "pretrain" else {}), **settings,
    }  # fmt: skip
    tree: dict[str, Any] = {}
    for key, value in base.items():
        section, _, name = key.rpartition(".")
        given = sources.get(value, value) if isinstance(value, str) else value
        (tree.setdefault(section, {}) if section else tree)[name] = given
    if "teachers" in settings:
        tree["teachers"] = {"other": {"source": sources["OTHER"]}}
    return RunConfig.model_validate(tree)


def digest(*tensors: Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        found.update(tensor.detach().double().contiguous().numpy().tobytes())
    return found.hexdigest()


def fingerprint(config: RunConfig) -> dict[str, Any]:
    """Everything that a run is made of, up to the gradients of its first step and its learning rates."""
    parts = build(config)
    origins = {
        "teacher": parts.origins["teacher"],
        "init": parts.origins["init"],
        **parts.origins.get("teachers", {}),
    }
    task, optim, data = parts.task, config.optim, config.data
    images, targets = next(iter(parts.train_loader.epoch(0)))
    torch.manual_seed(0)
    task.train()
    losses = task(images, targets)
    losses["loss"].backward()
    schedule = plan_schedule(optim, parts.train_loader.batches_per_epoch, data.batch_size, 1)
    optimizer = create_optimizer(task, task.trainable, optim, schedule.peak)
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    teachers = {name: each.model for name, each in parts.teachers.items()}
    tests = None if parts.eval_loader is None else next(iter(parts.eval_loader))
    return {
        "spec": parts.spec,
        "plan": parts.plan.meta(),
        "origins": {name: (each["source"], each.get("digest")) for name, each in origins.items() if each},
        "batch": digest(images, targets),
        "tests": None if tests is None else digest(*tests),
        "sizes": (parts.train_loader.num_samples, getattr(parts.eval_loader, "num_samples", None)),
        "weights": digest(*task.saved.state_dict().values()),
        "teachers": {name: digest(*each.state_dict().values()) for name, each in teachers.items()},
        "losses": {name: float(loss.detach()) for name, loss in losses.items()},
        "gradients": digest(*(p.grad for p in task.parameters() if p.grad is not None)),
        "groups": sorted(
            (names[id(p)], group["weight_decay"], group.get("lr_scale", 1.0), str(group.get("betas")))
            for group in optimizer.param_groups
            for p in group["params"]
        ),
        "optimizer": type(optimizer).__name__,
        "schedule": [schedule.rate(step) for step in range(schedule.total_steps)],
        "choice": (parts.choice, parts.classified, parts.reference_loader is not None),
    }


def test_every_setting_that_changes_numbers_has_another_value() -> None:
    outside = {key for key, leaf in leaves().items() if rule_of(leaf.field).outside}
    assert leaves().keys() - outside - {"mode", "engine.device"} <= OTHER.keys(), "add another value to OTHER"
    assert all(leaves()[key].field.default != value for key, value in OTHER.items())
    assert IN_THE_LOOP | BY_VALUE.keys() <= leaves().keys()


def test_every_mode_has_its_facts_and_its_class() -> None:
    assert MODE_FACTS.keys() == MODES.keys() == set(get_args(Mode))


@pytest.mark.parametrize(
    ("values", "refused"), [({}, False), ({"hflip": 0.0}, False), ({"hflip": 0.3}, True)]
)
def test_defaults_and_what_is_off_are_never_refused(values: dict[str, Any], refused: bool) -> None:
    config = RunConfig.model_validate({"data": {"aa": "affine", **values}})
    assert bool(find_unread(config)) == refused


def test_the_error_names_setting_value_and_reason() -> None:
    config = RunConfig.model_validate({"optim": {"blr": 0.5, "lr": 0.1}})
    with pytest.raises(ConfigError, match=r"^optim.blr=0.5 changes nothing beside optim.lr=0.1, which is"):
        check_effect(config)
    assert find_unread(config).keys() == {"optim.blr"}
    assert without(config, ["optim.blr", "optim.lr"]) == RunConfig()


def test_the_rule_of_a_key_is_found_within_entries() -> None:
    held = {"teachers.compile.source", "transfer.losses[0].weight", "student.model_args.depth", "nosuch.key"}
    assert all(find_rule(RunConfig, key).resume == "held" for key in held)
    assert find_rule(RunConfig, "teachers.compile.compile").resume == "free"
    assert find_rule(RunConfig, "transfer.losses[0].standardize_images").needs


def attempt(call: Callable[[], Any]) -> Any:
    """What `call` gives, or the sentence with which it refuses."""
    try:
        return call()
    except GraftError as error:
        return f"refused: {error}"


@pytest.mark.parametrize(
    "situation",
    [
        name if name in ("align", "scratch") else pytest.param(name, marks=pytest.mark.slow)
        for name in SITUATIONS
    ],
)
def test_a_setting_changes_the_run_or_is_refused(
    situation: str, sources: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SITUATIONS[situation]
    check_settings(mode_of(made(settings, sources)))
    monkeypatch.setattr("graftvit.transfer.engine.build.check_settings", lambda mode: None)
    plain = fingerprint(made(settings, sources))
    wrong = []
    for key, value in OTHER.items():
        if settings.get(key) == value or key in ("transfer.losses", "transfer.method"):
            continue  # they decide what other settings do
        changed = made({**settings, key: value}, sources)
        refused = key in find_unread(changed)
        if not refused and (key in IN_THE_LOOP or key in BY_VALUE):
            continue
        found = attempt(functools.partial(fingerprint, changed))
        if isinstance(found, str):
            continue  # in its own words, where it is not part of the run
        if refused != (found == plain):
            wrong.append(
                f"{key}={value!r} is {'refused' if refused else 'accepted'}: {differing(found, plain)}"
            )
    assert not wrong, "\n".join(wrong)


def differing(found: dict[str, Any], plain: dict[str, Any]) -> str:
    names = [name for name in plain if found[name] != plain[name]]
    return f"{', '.join(names)} differ" if names else "nothing differs"
