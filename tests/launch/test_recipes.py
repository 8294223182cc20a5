"""Recipes have the values that they name, and run as their headers say."""

from __future__ import annotations

import re
import shlex
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from graftvit.launch.cli import main
from graftvit.launch.load_config import (
    load_comparison,
    load_config,
    load_stages,
    read_recipe,
    recipe_names,
    recipe_summary,
    recipe_text,
)
from graftvit.models.layer_plan import OPERATORS
from graftvit.models.plan_syntax import AS_IT_IS, NONE, parse_plan
from graftvit.transfer.config import AUTO
from graftvit.transfer.engine.build import settle
from graftvit.transfer.engine.optim import peak_learning_rate
from graftvit.transfer.mode_config import TEACHER
from support.files.data_sets import image, write_images
from support.runs.typed import Typed
from timm.data import dataset_factory

SIZES = {"base": "vit_base_patch16_224", "large": "vit_large_patch16_224", "huge": "vit_huge_patch14_224"}
PUBLISHED = [
    f"{kind}_vit_{size}" for kind in ("attention_distill", "attention_copy", "mae_finetune") for size in SIZES
]

AUGMENTATION = {
    "data.reprob": 0.25, "data.mixup": 0.8, "data.cutmix": 1.0, "data.smoothing": 0.1,
    "data.aa": "rand-m9-mstd0.5-inc1", "data.num_classes": 1000,
}  # fmt: skip
# The commands of the README of the attention transfer code, for ViT-L on 8 nodes x 8 GPUs x 32 images.
DISTILL = AUGMENTATION | {
    "mode": "transfer", "transfer.method": "distill", "transfer.layers": ":-6", "transfer.heads": "all",
    "transfer.loss": "ce", "transfer.weight": 3.0, "transfer.reduction": "sum", "transfer.temperature": 1.0,
    "transfer.rows": 1.0, "transfer.share_drop_path": True, "student.init": None, "student.drop_path": 0.2,
    "student.global_pool": "avg", "data.batch_size": 32, "optim.opt": "adamw", "optim.epochs": 200,
    "optim.warmup_epochs": 20, "optim.blr": 1e-4, "optim.lr": None, "optim.min_lr": 1e-6, "optim.layer_decay": 1.0,
    "optim.betas": (0.9, 0.95), "optim.weight_decay": 0.3, "optim.ema": 0.9999, "optim.clip_grad": None,
    "optim.accum_iter": 1, "engine.precision": "fp32",
}  # fmt: skip
COPY = DISTILL | {
    "transfer.method": "copy", "transfer.layers": "all", "transfer.share_drop_path": False,
    "student.drop_path": 0.0, "optim.epochs": 100, "optim.warmup_epochs": 5, "optim.blr": 1e-3,
    "optim.min_lr": 2e-3, "optim.layer_decay": 0.75, "optim.betas": (0.9, 0.999), "optim.weight_decay": 0.05,
}  # fmt: skip
# MAE's FINETUNE.md: epochs, base learning rate, layer decay, drop path, batch a GPU.
FINETUNE: dict[str, tuple[int, float, float, float, int]] = {
    "base": (100, 5e-4, 0.65, 0.1, 32),
    "large": (50, 1e-3, 0.75, 0.2, 32),
    "huge": (50, 1e-3, 0.75, 0.3, 16),
}
# The learning rate that the published command reaches on its published number of GPUs.
LEARNING_RATES = {
    "attention_distill_vit_large": (64, 8e-4),
    "attention_copy_vit_large": (64, 8e-3),
    "mae_finetune_vit_base": (32, 2e-3),
    "mae_finetune_vit_large": (32, 4e-3),
    "mae_finetune_vit_huge": (64, 4e-3),
}


def value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def check(name: str, expected: dict[str, Any]) -> None:
    config = load_config(name)
    assert {key: value(config, key) for key in expected} == expected


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kind", "published"), [("distill", DISTILL), ("copy", COPY)])
def test_distillation_and_copy_have_the_published_values(
    kind: str, published: dict[str, Any], size: str
) -> None:
    own = {"student.model": SIZES[size], "teacher.source": f"{SIZES[size]}.mae"}
    check(f"attention_{kind}_vit_{size}", published | own)


@pytest.mark.parametrize("size", SIZES)
def test_finetuning_has_the_published_values(size: str) -> None:
    epochs, blr, layer_decay, drop_path, batch = FINETUNE[size]
    check(
        f"mae_finetune_vit_{size}",
        AUGMENTATION
        | {
            "mode": "finetune", "teacher.source": None, "student.model": SIZES[size],
            "student.init": f"{SIZES[size]}.mae", "student.drop_path": drop_path, "student.global_pool": "avg",
            "data.batch_size": batch, "optim.opt": "adamw", "optim.epochs": epochs, "optim.warmup_epochs": 5,
            "optim.blr": blr, "optim.min_lr": 1e-6, "optim.layer_decay": layer_decay,
            "optim.betas": (0.9, 0.999), "optim.weight_decay": 0.05, "optim.ema": None,
        },
    )  # fmt: skip


@pytest.mark.parametrize("name", LEARNING_RATES)
def test_the_published_learning_rate_comes_out(name: str) -> None:
    config = load_config(name)
    devices, expected = LEARNING_RATES[name]
    rate, effective = peak_learning_rate(config.optim, config.data.batch_size, devices)
    assert rate == pytest.approx(expected)
    assert effective == devices * config.data.batch_size


def test_the_published_layers_are_the_first_18_of_24() -> None:
    from graftvit.transfer.methods.pairs import resolve_layers

    layers = load_config("attention_distill_vit_large").transfer.layers
    pairs = resolve_layers(layers, [24], [24])
    assert [(pair.teacher, pair.student) for pair in pairs] == [(layer, layer) for layer in range(18)]


def test_the_published_and_the_small_recipes_are_there() -> None:
    small = [f"{data}_{method}" for data in ("cifar10", "cifar100") for method in ("copy", "distill")]
    assert {*PUBLISHED, *small} <= set(recipe_names())


def runs(name: str) -> list[Any]:
    """The configuration of a recipe, or those of its stages."""
    return [stage.config for stage in load_stages(name)] or [load_config(name)]


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_says_where_it_comes_from(name: str) -> None:
    assert recipe_text(name).startswith("# ")
    assert 30 < len(recipe_summary(name)) < 160
    assert runs(name)


def test_a_file_is_named_with_its_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: Typed
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "valid: adala" in typed("train mine", code=2).err
    Path("mine.yaml").write_text("mode: scratch\n")
    assert typed("train mine", code=2).err.endswith(
        "no recipe or file 'mine'; did you mean 'mine.yaml'? valid: mine.yaml\n"
    )


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_name_models_that_timm_has(name: str) -> None:
    import timm

    config = runs(name)[0]
    assert config.student.model == AUTO or timm.is_model(config.student.model)
    if config.student.plan is not None:
        choices = parse_plan(config.student.plan, [6, 6, 6, 6] if "stage" in config.student.plan else 24)
        assert {choice.operator for choice in choices} <= {*OPERATORS, AS_IT_IS, NONE}
    for source in (config.teacher.source, config.student.init):
        if source not in (None, "teacher") and ":" not in source and "/" not in source:
            assert source in timm.list_pretrained()


@pytest.mark.parametrize("name", recipe_names())
def test_no_recipe_pins_what_the_teachers_weights_bring(name: str) -> None:
    for config in runs(name):
        if config.starting_source != TEACHER:
            continue
        student = config.student
        found = (student.model, student.model_args, student.img_size, config.teacher.img_size)
        assert found == (AUTO, {}, None, None)
        # MAE is fine-tuned with another pooling than it was trained with; its encoder has no head to lose.
        assert student.global_pool == ("avg" if name == "digits_finetune" else AUTO)


# "Copy the Same, Distill the Difference": its stated values, and the rate that comes out at its batch of 4096.
def test_output_matching_has_the_published_values() -> None:
    check(
        "copy_same_distill_vit_base",
        {
            "transfer.method": "attention_output", "transfer.weight": 50.0, "transfer.task_weight": 1.0,
            "student.init": "teacher", "student.plan": "*: kernel(feature=relu)", "data.smoothing": 0.1,
            "data.aa": None, "optim.epochs": 300, "optim.warmup_epochs": 50, "optim.weight_decay": 0.05,
            "optim.clip_grad": 3.0, "optim.opt": "adamw",
        },
    )  # fmt: skip
    assert load_config("copy_same_distill_vit_base").optim.blr * 4096 / 256 == pytest.approx(2e-3)


def test_hedgehogs_maps_learn_alone_from_the_teachers_maps() -> None:
    align, finetune = (stage.config for stage in load_stages("hedgehog_vit_base"))
    assert (align.mode, align.align.match, align.optim.trainable) == ("align", "rows", "operator")
    assert (align.optim.lr, align.optim.weight_decay, align.optim.epochs) == (1e-2, 0.0, 2)
    assert finetune.mode == "finetune"


def test_adalas_stages_are_layers_features_task() -> None:
    stages = [stage.config for stage in load_stages("adala_vit_large")]
    assert [stage.mode for stage in stages] == ["align", "transfer", "finetune"]
    assert (stages[1].transfer.method, stages[1].transfer.layers) == ("block_output", "last:1")
    assert stages[1].transfer.task_weight == 0


def test_a_pyramid_is_recovered_stage_by_stage() -> None:
    align, task = (stage.config for stage in load_stages("recover_swin_tiny"))
    assert (align.mode, align.align.match, task.mode) == ("align", "output", "finetune")
    assert align.student.plan == task.student.plan == "stage1: none; stage2,stage3: linear"
    assert (align.student.init, align.student.without) == ("teacher", ("bias",))


@pytest.mark.parametrize(
    "name", ["digits_compare", "digits_hash_compare", "digits_pyramid_compare", "digits_hash_pyramid_compare"]
)
def test_the_students_of_a_comparison_are_built_as_its_teacher(name: str) -> None:
    comparison = load_comparison(name)
    assert comparison.teacher is not None
    teacher = settle(comparison.teacher, None).student
    for stage in comparison.stages:
        student = stage.config.student
        assert (student.model, student.model_args) == (teacher.model, teacher.model_args)
        assert (student.img_size, student.global_pool) == (teacher.img_size, teacher.global_pool)


def test_a_stage_without_a_teacher_may_stand_beside_one_with_it() -> None:
    hard, alone = (stage.config for stage in load_comparison("digits_deit_compare").stages)
    assert str(hard.teacher.source).endswith("teacher/student")
    assert (alone.mode, alone.teacher.source) == ("scratch", None)


def test_published_conversions_have_as_many_epochs_as_what_they_are_compared_with() -> None:
    epochs = {stage.name: stage.config.optim.epochs for stage in load_stages("digits_published_compare")}
    own = read_recipe("digits_published_compare").compare["stages"]
    assert {sum(epochs[stage] for stage in stages) for stages in own.values()} == {17}


@pytest.mark.parametrize("name", ["digits_hash_compare", "digits_hash_pyramid_compare"])
def test_transfer_and_finetuning_have_as_many_epochs(name: str) -> None:
    epochs = {stage.name: stage.config.optim.epochs for stage in load_stages(name)}
    own = read_recipe(name).compare["stages"]
    assert {plan: sum(epochs[stage] for stage in stages) for plan, stages in own.items()} == dict.fromkeys(
        own, 8
    )


@pytest.mark.parametrize(
    ("name", "model", "rates", "clip"),
    [
        ("ecoformer_pvt_v2_b0", "pvt_v2_b0", (2.5e-5, 2.5e-5), None),
        ("ecoformer_twins_svt_small", "twins_svt_small", (2.5e-5, 1.25e-4), 5.0),
    ],
)
def test_ecoformer_has_the_published_values(
    name: str, model: str, rates: tuple[float, float], clip: float | None
) -> None:
    softmax, hashed = (stage.config for stage in load_stages(name))
    hashes = "hash(mode=reference, fitting=published)"
    plans = ("*: softmax", f"stage1-3: {hashes}; stage4: softmax")
    for stage, epochs, rate, plan in zip((softmax, hashed), (100, 30), rates, plans, strict=True):
        expected = AUGMENTATION | {
            "mode": "finetune", "student.model": model, "student.init": f"{model}.in1k", "student.plan": plan,
            "student.drop_path": 0.0, "data.batch_size": 32, "optim.opt": "adamw", "optim.epochs": epochs,
            "optim.warmup_epochs": 5, "optim.min_lr": 1e-6, "optim.weight_decay": 0.05, "optim.clip_grad": clip,
        }  # fmt: skip
        assert {key: value(stage, key) for key in expected} == expected
        assert peak_learning_rate(stage.optim, 32, 8) == (pytest.approx(rate), 256)
    assert hashed.student.calibrate == 32


def test_recipes_travel_with_the_package() -> None:
    assert (resources.files("graftvit.cfgs") / "attention_distill_vit_large.yaml").is_file()


def test_the_command_lists_and_prints(typed: Typed) -> None:
    table = typed("list", "recipes").out.splitlines()
    assert [line.split()[0] for line in table] == recipe_names()
    printed = typed("list", "recipes", "attention_copy_vit_base").out
    (schema,) = re.findall(r"\$schema=(.*)", printed)
    assert Path(schema).is_file()
    assert printed.replace(schema, "schema.json") == recipe_text("attention_copy_vit_base")


# By recipe: the model, its drop path, epochs of warm-up, clipping, and how often an epoch shows an image.
LIT: dict[str, tuple[str, float, float, float | None, int]] = {
    "lit_tiny": ("lit_ti", 0.1, 5, None, 3),
    "lit_small": ("lit_s", 0.2, 20, 5.0, 1),
    "lit_medium": ("lit_m", 0.3, 20, 5.0, 1),
    "lit_base": ("lit_b", 0.5, 20, 5.0, 1),
    "litv2_small": ("litv2_s", 0.2, 20, 5.0, 1),
    "litv2_medium": ("litv2_m", 0.3, 20, 5.0, 1),
    "litv2_base": ("litv2_b", 0.5, 20, 5.0, 1),
}


@pytest.mark.parametrize("name", LIT)
def test_lit_has_the_published_values(name: str) -> None:
    model, drop_path, warmup, clip, repeats = LIT[name]
    check(
        name,
        AUGMENTATION
        | {
            "mode": "scratch", "student.model": model, "student.drop_path": drop_path, "data.batch_size": 128,
            "optim.opt": "adamw", "optim.epochs": 300, "optim.warmup_epochs": warmup, "optim.min_lr": 1e-5,
            "optim.weight_decay": 0.05, "optim.clip_grad": clip, "optim.betas": (0.9, 0.999),
            "optim.scales": {r"conv_offset\.weight": 0.01}, "data.aug_repeats": repeats, "optim.ema": None,
        },
    )  # fmt: skip
    assert peak_learning_rate(load_config(name).optim, 128, 8) == (1e-3, 1024)


@pytest.mark.parametrize("teacher", ["swin_tiny", "pvt_v2_b2"])
@pytest.mark.parametrize("kind", ["lit", "hilo"])
def test_a_pyramid_becomes_lit_in_three_stages_with_transfer(kind: str, teacher: str) -> None:
    align, features, task = (stage.config for stage in load_stages(f"{kind}_from_{teacher}"))
    assert [align.mode, features.mode, task.mode] == ["align", "transfer", "transfer"]
    assert (features.transfer.method, features.transfer.task_weight) == ("block_output", 0.0)
    assert task.transfer.method == "logits"
    third = {"lit": "softmax", "hilo": "hilo"}[kind]
    choices = parse_plan(str(align.student.plan), [1, 1, 1, 1])
    assert [choice.operator for choice in choices] == [NONE, NONE, third, "softmax"]
    assert str(align.student.plan).endswith("merge: deformable")


def test_transfer_and_fine_tuning_of_lit_on_digits_have_equal_budgets() -> None:
    stages = [stage.config for stage in load_stages("digits_lit")]
    alone = load_config("digits_lit_finetune")
    assert sum(stage.optim.epochs for stage in stages) == alone.optim.epochs
    for stage in stages:
        assert stage.student == alone.student
        assert stage.data == alone.data
        assert (stage.optim.lr, stage.optim.clip_grad) == (alone.optim.lr, alone.optim.clip_grad)


# AttnZero's code: model, epochs of warm-up, drop path, largest gradient, images a GPU, rates at both ends.
ATTNZERO = {
    "attnzero_deit": ("attnzero_deit_t", 20, 0.0, 5.0, 512, 4e-3, 4e-5),
    "attnzero_deit_bias": ("attnzero_deit_t_bias", 20, 0.0, 5.0, 512, 4e-3, 4e-5),
    "attnzero_autoformer": ("attnzero_autoformer_t", 20, 0.0, 5.0, 512, 4e-3, 4e-5),
    "attnzero_pvt": ("attnzero_pvt_t", 5, 0.1, None, 128, 1e-3, 2e-5),
    "attnzero_pvt_bias": ("attnzero_pvt_t_bias", 5, 0.1, None, 128, 1e-3, 2e-5),
    "attnzero_swin": ("attnzero_swin_t", 20, 0.2, 5.0, 128, 1e-3, 1e-5),
    "attnzero_swin_bias": ("attnzero_swin_t_bias", 20, 0.2, 5.0, 128, 1e-3, 1e-5),
    "attnzero_swin_384": ("attnzero_swin_b", 5, 0.5, 5.0, 32, 1e-5, 1e-7),
}


@pytest.mark.parametrize("name", ATTNZERO)
def test_attnzero_has_the_published_values(name: str) -> None:
    model, warmup, drop_path, clip, batch, rate, last = ATTNZERO[name]
    tuned = name == "attnzero_swin_384"
    check(
        name,
        AUGMENTATION
        | {
            "mode": "finetune" if tuned else "scratch", "student.model": model, "student.drop_path": drop_path,
            "student.img_size": 384 if tuned else None,
            "student.model_args": {"window_size": 12} if tuned else {},
            "student.global_pool": {"deit": "token", "autoformer": "avg"}.get(name.split("_")[1], AUTO),
            "teacher.position_embedding": "published" if tuned else "timm",
            "data.batch_size": batch, "data.crop_pct": 1.0 if tuned else 0.875,
            "optim.opt": "adamw", "optim.epochs": 30 if tuned else 300, "optim.warmup_epochs": warmup,
            "optim.min_lr": last, "optim.weight_decay": 1e-8 if tuned else 0.05, "optim.clip_grad": clip,
            "optim.betas": (0.9, 0.999), "optim.ema": None, "engine.precision": "fp32",
        },
    )  # fmt: skip
    found, steps = peak_learning_rate(load_config(name).optim, batch, 8)
    assert (found, steps) == (pytest.approx(rate), 8 * batch)


@pytest.mark.parametrize("tuned", [False, True])
def test_cswin_of_attnzero_has_the_published_values(tuned: bool) -> None:
    """The ten epochs of cooldown at the last rate are left out, and the moving average is kept."""
    name, batch = ("attnzero_cswin_384", 32) if tuned else ("attnzero_cswin", 128)
    check(
        name,
        AUGMENTATION
        | {
            "mode": "finetune" if tuned else "scratch", "student.drop_path": 0.7 if tuned else 0.2,
            "student.model": "attnzero_cswin_b" if tuned else "attnzero_cswin_t",
            "student.img_size": 384 if tuned else None,
            "student.model_args": {"split_size": [0, 0, 12, 12]} if tuned else {},
            "data.batch_size": batch, "data.crop_pct": 0.875, "optim.opt": "adamw", "optim.clip_grad": None,
            "optim.epochs": 20 if tuned else 300, "optim.warmup_epochs": 0 if tuned else 20,
            "optim.min_lr": 2.5e-7 if tuned else 2e-5, "optim.weight_decay": 1e-8 if tuned else 0.05,
            "optim.betas": (0.9, 0.999), "optim.ema": 0.9998 if tuned else 0.99984, "engine.precision": "fp32",
        },
    )  # fmt: skip
    found, steps = peak_learning_rate(load_config(name).optim, batch, 8)
    assert (found, steps) == (pytest.approx(2.5e-6 if tuned else 1e-3), 8 * batch)


SHORT = ["--max_steps", "1", "--warmup_epochs", "0", "--batch_size", "2", "--workers", "0", "--device", "cpu"]
SHORT += ["--trackers", "none", "--no-progress", "--student.model_args.depth=2"]
LINES = recipe_text("efficient_attention_cifar10").splitlines()
HEADER = " ".join(line.lstrip("# ") for line in LINES if line.startswith("#"))


class Cifar:
    """As torchvision's."""

    classes = tuple("abcdefghij")
    targets = tuple(range(10))

    def __init__(self, root: str, train: bool, download: bool) -> None:
        assert (root, download) == ("data", True)

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return image(index, 32), index


@pytest.mark.parametrize("plan", ["linformer", "hybrid"])
def test_on_cifar(plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "graftvit train efficient_attention_cifar10 --plan '*: performer'" in HEADER
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(dataset_factory._TORCH_BASIC_DS, "cifar10", Cifar)
    assert main(["train", "efficient_attention_cifar10", "--plan", f"*: {plan}", *SHORT]) == 0
    assert (tmp_path / "runs" / "efficient_attention_cifar10" / "student").is_dir()


def test_on_a_folder(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in range(12):  # more than CIFAR-10 has
            write_images(tmp_path / "set" / split / f"class{name}", 1)
    words = (
        HEADER.split("layout of ImageNet-100: ")[1]
        .split(". There")[0]
        .replace("FOLDER", str(tmp_path / "set"))
    )
    output = ["--output_dir", str(tmp_path / "run")]
    assert main(["train", "efficient_attention_cifar10", *shlex.split(words), *SHORT, *output]) == 0
