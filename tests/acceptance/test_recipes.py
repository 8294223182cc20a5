"""Every recipe on photographs, with its own augmentation, normalization, precision, losses, schedule and stages.

Only the model is made small and the length cut. Each run is stopped in the middle and goes on; the numbers that it
reports are those that anybody measures with what it leaves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import graftvit
import pytest
import timm
from graftvit.launch.cli import main
from graftvit.launch.load_config import load_config, recipe_names
from graftvit.transfer.config import RunConfig
from graftvit.transfer.setting import find_unread
from support.files.plain_timm import PlainTimm
from support.runs.cut_recipes import KEYS, SMALL, Cut, command, stages_of, stand_ins
from support.runs.interrupting import terminated_after
from support.runs.measure import measure

DEEP = {**SMALL, "depth": 8}
"""For recipes that leave out the last six layers."""
SWIN = {"embed_dim": 12, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4], "window_size": 4}
CSWIN = {
    "embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [2, 2, 4, 8], "split_size": [0, 0, 2, 2],
}  # fmt: skip
PVT = {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "num_heads": [1, 2, 3, 4]}
LIT = {"embed_dim": 12, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4]}
AUTOFORMER = {"embed_dim": 24, "num_heads": [3, 4], "mlp_ratio": [3, 3.5]}
COLOR = {**SWIN, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 6], "patch_size": 2, "in_chans": 3}
STAGES = {"epochs": 2, "warmup_epochs": 0.1}
DIGITS = Cut({}, None, None, {"max_steps": 6, "warmup_epochs": 2})
"""Models that are small already; 40 labels are one step an epoch."""
CONVERTED = Cut(alone=False)
FEW_IMAGES = ("--min_lr", "1e-6")
"""The published floor of the copy recipes is above the peak of so small a batch."""
CUTS = {
    "adala_vit_large": Cut(img_size=56, length=STAGES, stop_after=8, alone=False),
    "attention_copy_vit_base": Cut(alone=False, workers=2, more=FEW_IMAGES),
    "attention_copy_vit_huge": Cut(img_size=56, alone=False, more=FEW_IMAGES),
    "attention_copy_vit_large": Cut(alone=False, more=FEW_IMAGES),
    "attention_copy_vit_large_bf16": Cut(alone=False, more=FEW_IMAGES),
    "attention_distill_vit_base": Cut(DEEP, img_size=224),
    "attention_distill_vit_huge": Cut(DEEP, img_size=56),
    "attention_distill_vit_large": Cut(DEEP),
    "attention_distill_vit_large_bf16": Cut(DEEP),
    "attnzero_deit": Cut(alone=False, more=FEW_IMAGES),
    "attnzero_deit_bias": Cut(alone=False, more=FEW_IMAGES),
    "attnzero_autoformer": Cut(AUTOFORMER, alone=False, more=FEW_IMAGES),
    "attnzero_pvt": Cut(PVT, alone=False),
    "attnzero_pvt_bias": Cut(PVT, alone=False),
    "attnzero_swin": Cut(SWIN, alone=False),
    "attnzero_swin_bias": Cut(SWIN, alone=False),
    "attnzero_swin_384": Cut(SWIN, alone=False, init="attnzero_swin_b"),
    "attnzero_cswin": Cut(CSWIN, alone=False),
    "attnzero_cswin_384": Cut(CSWIN, alone=False, init="attnzero_cswin_b", more=("--min_lr", "1e-8")),
    "cached_teacher_vit_small": Cut(workers=2),
    "cifar100_copy": Cut(alone=False),
    "cifar100_distill": Cut(workers=2),
    "cifar100_lit": Cut(LIT, alone=False),
    "cifar10_copy": Cut(alone=False),
    "cifar10_distill": Cut(),
    "cifar10_lit": Cut({**LIT, "patch_size": 2}, 32, alone=False),
    "copy_same_distill_vit_base": CONVERTED,
    "deit_distilled_base": Cut(),
    "digits_copy": Cut({}, None, None, {"max_steps": 6, "warmup_epochs": 2}, alone=False),
    "digits_distill": DIGITS,
    "digits_finetune": DIGITS,
    "digits_lit": Cut(
        COLOR, 32, length=STAGES, stop_after=8, alone=False, init="swin_tiny_patch4_window7_224"
    ),
    "digits_lit_finetune": Cut(COLOR, 32, alone=False, init="swin_tiny_patch4_window7_224"),
    "digits_lit_teacher": Cut(COLOR, 32),
    "digits_pretrain": Cut({}, None, None, {"epochs": 6, "warmup_epochs": 1}),
    "digits_pyramid_teacher": Cut({}, None, None, {"epochs": 6, "warmup_epochs": 1}),
    "digits_scratch": DIGITS,
    "digits_teacher": Cut({}, None, None, {"epochs": 6, "warmup_epochs": 1}),
    "digits_pvt_teacher": Cut({}, None, None, {"epochs": 6, "warmup_epochs": 1}),
    "ecoformer_pvt_v2_b0": Cut(PVT, img_size=96, length=STAGES, stop_after=8, alone=False),
    "ecoformer_twins_svt_small": Cut(PVT, img_size=96, length=STAGES, stop_after=8, alone=False),
    "efficient_attention_cifar10": Cut(img_size=32, alone=False),
    **{
        f"{kind}_from_swin_tiny": Cut(SWIN, length=STAGES, stop_after=8, alone=False)
        for kind in ("lit", "hilo")
    },
    **{
        f"{kind}_from_pvt_v2_b2": Cut(PVT, length=STAGES, stop_after=8, alone=False)
        for kind in ("lit", "hilo")
    },
    "hedgehog_vit_base": Cut(length=STAGES, stop_after=8, alone=False),
    "lit_base": Cut(LIT, alone=False),
    "lit_medium": Cut(LIT, alone=False),
    "lit_small": Cut(LIT, alone=False),
    "lit_tiny": Cut(PVT, workers=2, alone=False),
    "litv2_base": Cut(LIT, alone=False),
    "litv2_medium": Cut(LIT, alone=False),
    "litv2_small": Cut(LIT, alone=False),
    "mae_finetune_vit_base": Cut(),
    "mae_finetune_vit_huge": Cut(img_size=56),
    "mae_finetune_vit_large": Cut(),
    "mae_finetune_vit_large_bf16": Cut(),
    "recover_swin_tiny": Cut(SWIN, length=STAGES, stop_after=8, alone=False),
    "recover_vit_base": Cut(length=STAGES, stop_after=8, alone=False),
    "t2r_vit_base": CONVERTED,
    "two_teachers_vit_base": Cut(DEEP),
}
ALIKE = {
    "attention_copy_vit_large": "attention_copy_vit_base",
    "attention_copy_vit_huge": "attention_copy_vit_base",
    "attention_distill_vit_huge": "attention_distill_vit_large",
    "mae_finetune_vit_large": "mae_finetune_vit_base",
    "mae_finetune_vit_huge": "mae_finetune_vit_base",
    "lit_medium": "lit_small",
    "litv2_medium": "litv2_base",
    "litv2_small": "litv2_base",
    "cifar10_copy": "cifar100_copy",
    "cifar10_distill": "cifar100_distill",
}
"""By recipe, one whose run it is once both are small: what else differs is in `SIZES`."""
SIZES = {
    "teacher.source", "student.model", "student.init", "student.drop_path", "data.dataset", "data.num_classes",
    "data.batch_size", "optim.epochs", "optim.blr", "optim.layer_decay",
}  # fmt: skip
COMPARED = {
    "digits_compare", "digits_hash_compare", "digits_hash_pyramid_compare", "digits_hash_starts_compare",
    "digits_pyramid_compare", "digits_published_compare", "digits_deit_compare", "digits_lit_compare",
    "attnbench_digits", "attnbench_digits_long", "attnbench_digits_transfer", "attnbench_published",
}  # fmt: skip
"""Recipes of `graftvit compare` (see `test_compare.py`) and of `graftvit programs bench` alone."""

DENSE = [
    name for name in recipe_names() if name.startswith(("coco_", "ade20k_")) or name == "recover_detector"
]
"""Recipes of detectors and segmenters (see `test_dense_recipes.py`)."""


def test_no_recipe_is_left_out() -> None:
    assert set(CUTS) | COMPARED | set(DENSE) == set(recipe_names())


@pytest.fixture(scope="session")
def digits_teacher(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `digits_pretrain` leaves, on photographs."""
    folder = tmp_path_factory.mktemp("digits") / "pretrain"
    assert main(command("digits_pretrain", CUTS["digits_pretrain"], photos, folder, [])) == 0
    return f"local-dir:{folder / 'student'}"


@pytest.mark.parametrize("recipe", sorted(ALIKE))
def test_a_recipe_of_another_size_differs_in_sizes_alone(
    recipe: str, photos: Path, digits_teacher: str, tmp_path: Path
) -> None:
    for own, other in zip(*(map(settings, stages_of(name)) for name in (recipe, ALIKE[recipe])), strict=True):
        assert {key for key in own | other if own.get(key) != other.get(key)} <= SIZES
    weights = stand_ins(recipe, CUTS[recipe], tmp_path, digits_teacher)
    assert main([*command(recipe, CUTS[recipe], photos, tmp_path / "run", weights), "--dry_run"]) == 0


@pytest.mark.parametrize("recipe", sorted(CUTS.keys() - ALIKE.keys()))
def test_a_recipe_on_photographs(
    recipe: str, photos: Path, digits_teacher: str, plain_timm: PlainTimm, tmp_path: Path
) -> None:
    cut, run = CUTS[recipe], tmp_path / "run"
    words = command(recipe, cut, photos, run, stand_ins(recipe, cut, tmp_path, digits_teacher))
    assert main([*words, "--dry_run"]) == 0
    with terminated_after(cut.stop_after):
        assert main(words) == 128 + 15
    assert not (run / "student").exists()
    assert main(words) == 0
    check_settings(recipe, run)
    for part in [path.name for path in (run / "student", run / "student_ema") if path.is_dir()]:
        check_student(recipe, run, part, plain_timm, photos / "validation")


def folders(run: Path) -> list[Path]:
    """The run folder of each stage."""
    return sorted(path.parent for path in run.rglob("config.yaml"))


def check_settings(recipe: str, run: Path) -> None:
    """What ran is the recipe, but for what the table says, and for what this deprives of its effect."""
    for folder, own in zip(folders(run), stages_of(recipe), strict=True):
        config = load_config(folder)
        ran, wanted = settings(config), settings(own)
        if folder.name[:1].isdigit() and folder.name[:2] != "1-":
            for key in ("student.model", "student.plan"):  # goes on from the student of the stage before
                ran[key] = wanted[key]
        changed = {key for key in ran | wanted if ran.get(key) != wanted.get(key)} - KEYS
        assert {key for key in changed if not changes_nothing(config, key, wanted[key])} == set()


def changes_nothing(config: RunConfig, key: str, value: Any) -> bool:
    """Whether the run would refuse this value."""
    section, _, name = key.rpartition(".")
    changed = getattr(config, section).model_copy(update={name: value})
    return key in find_unread(config.model_copy(update={section: changed}))


def settings(config: RunConfig) -> dict[str, Any]:
    """The settings of a run by their keys."""
    found: dict[str, Any] = {}
    for name, value in config.model_dump().items():
        if name in ("teacher", "student", "data", "optim", "engine", "transfer", "align"):
            found |= {f"{name}.{key}": each for key, each in value.items()}
        else:
            found[name] = value
    return found


def check_student(recipe: str, run: Path, part: str, plain_timm: PlainTimm, images: Path) -> None:
    """The reported numbers are those of the log, of `graftvit evaluate` and of anybody's own measurement."""
    config = json.loads((run / part / "config.json").read_text())
    mode = "L" if config["pretrained_cfg"]["input_size"][0] == 1 else "RGB"
    if CUTS[recipe].alone:
        code = f'model = timm.create_model("local-dir:{run / part}", pretrained=True)'
        found = plain_timm.measure(code, images, mode)
    else:
        found = measured_here(run / part, images, mode)
    if not config["num_classes"]:
        assert found == pytest.approx(measured_here(run / part, images, mode), rel=1e-5)
        return
    reported = config["graftvit"]["results"]
    last = folders(run)[-1]
    assert logged(last, "test_ema_" if part == "student_ema" else "test_", reported), reported
    exact = load_config(last).engine.precision == "fp32"
    assert found["loss"] == pytest.approx(reported["loss"], rel=1e-5 if exact else 0.02)
    assert not exact or 100 * found["right"] / found["images"] == pytest.approx(reported["top1"], rel=1e-12)
    evaluated = evaluate(run / part, load_config(last).engine.precision)
    assert (evaluated["top1"], evaluated["samples"]) == (reported["top1"], found["images"])
    assert evaluated["loss"] == pytest.approx(reported["loss"], rel=1e-6)


def measured_here(student: Path, images: Path, mode: str) -> dict[str, Any]:
    """What `graftvit.load` and timm's own transform give."""
    model = graftvit.load(student).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    return measure(model, transform, str(images), mode)


def logged(run: Path, prefix: str, reported: Mapping[str, Any]) -> bool:
    """Whether an epoch of the log has these numbers."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return any(
        all(record.get(prefix + key) == reported[key] for key in ("top1", "top5", "loss"))
        for record in records
    )


def evaluate(source: Path, precision: str) -> dict[str, Any]:
    """What `graftvit evaluate` writes of a student's folder in its run."""
    file = source.parent / "evaluated.json"
    assert (
        main(["evaluate", str(source), "--device", "cpu", "--precision", precision, "--json", str(file)]) == 0
    )
    (found,) = json.loads(file.read_text()).values()
    return dict(found)
