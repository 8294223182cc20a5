"""Every recipe of detection and segmentation on photographs with cut-out objects: small, stopped, and gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graftvit.checkpoints.dense_models import load_dense
from graftvit.checkpoints.files import read_records
from graftvit.launch.cli import main
from graftvit.launch.load_config import load_config, load_stages, read_recipe, recipe_names
from graftvit.models.conversion import plan_of
from graftvit.transfer.config import RunConfig
from graftvit.transfer.data.dense import DenseAugment, create_dense_eval_loader
from graftvit.transfer.metrics.dense_scores import BoxScores, MeanIoU
from support.files.dense_scenes import composed, write_ade20k, write_coco
from support.models.tiny_weights import write_stand_in
from support.runs.interrupting import terminated_after

SWIN = {"embed_dim": 12, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4], "window_size": 4}
PVT = {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 3, 4]}
CUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "coco_retinanet_1x": ("pvt_v2_b2.in1k", PVT),
    "coco_mask_rcnn_1x": ("pvt_v2_b2.in1k", PVT),
    "coco_mask_rcnn_3x": ("swin_tiny_patch4_window7_224.ms_in1k", SWIN),
    "ade20k_semantic_fpn_40k": ("pvt_v2_b2.in1k", PVT),
    "ade20k_semantic_fpn_80k": ("swin_tiny_patch4_window7_224.ms_in1k", SWIN),
    "ade20k_upernet_160k": ("swin_tiny_patch4_window7_224.ms_in1k", SWIN),
    "recover_detector": (
        "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        {"depth": 2, "embed_dim": 24, "num_heads": 3},
    ),
}
"""By recipe, the weights that stand for those of its backbone, and their size."""
SMALL = {
    "dense.width": "16", "dense.short": "[64]", "dense.long": "96", "data.batch_size": "4", "data.eval_batch_size": "1",
    "data.workers": "0",
}  # fmt: skip
KEPT = {
    "mode", "dense.head", "dense.norms", "dense.cropped", "dense.scale", "dense.distort", "student.drop_path",
    "optim.opt", "optim.lr", "optim.min_lr", "optim.weight_decay", "optim.schedule", "optim.power", "optim.milestones",
    "engine.precision",
}  # fmt: skip
"""Settings that a run has as its recipe does."""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same scenes as COCO and as ADE20K have theirs."""
    root = tmp_path_factory.mktemp("scenes")
    splits = {
        name: composed(name, count, ((96, 128), (128, 80)))
        for name, count in (("train", 24), ("validation", 6))
    }
    coco = write_coco(root / "coco", splits)
    return {"coco": coco, "ade20k": write_ade20k(root / "ade", {"training": splits["train"], **splits})}


def dense_recipes() -> set[str]:
    return {
        name for name in recipe_names() if name.startswith(("coco_", "ade20k_")) or name == "recover_detector"
    }


def test_no_recipe_is_left_out() -> None:
    assert dense_recipes() == set(CUTS)


def words_of(recipe: str, data: Path, run: Path, folder: Path) -> list[str]:
    source, arguments = CUTS[recipe]
    sized = {} if source.startswith("pvt") else {"img_size": 64}
    flags = {**SMALL, "data.data_path": str(data), "output_dir": str(run), "engine.device": "cpu"}
    flags["optim.epochs"] = "2"
    if recipe == "recover_detector":
        detector = [
            "train",
            "coco_retinanet_1x",
            "--mode",
            "scratch",
            "--teacher.source",
            "none",
            "--dense.source",
            "none",
        ]
        more = {
            "student.model": "vit_tiny_patch16_224",
            "student.model_args": json.dumps({**arguments, **sized}),
        }
        made = {**flags, **more, "output_dir": str(folder / "detector"), "optim.warmup_steps": "1"}
        assert main([*detector, *flat(made)]) == 0
        flags |= {"teacher.source": str(folder / "detector"), "dense.source": str(folder / "detector")}
        return ["train", recipe, *flat(flags)]
    flags["teacher.source"] = write_stand_in(source, folder / "weights", {**arguments, **sized}, 6)
    if load_config(recipe).optim.max_steps:
        flags["optim.max_steps"] = "12"
        del flags["optim.epochs"]
    return ["train", recipe, *flat(flags)]


def flat(flags: dict[str, str]) -> list[str]:
    return [word for key, value in flags.items() for word in (f"--{key}", value)]


@pytest.mark.parametrize("recipe", sorted(CUTS))
def test_a_dense_recipe_on_photographs(recipe: str, scenes: dict[str, Path], tmp_path: Path) -> None:
    data = scenes["ade20k" if recipe.startswith("ade") else "coco"]
    run = tmp_path / "run"
    words = words_of(recipe, data, run, tmp_path)
    assert main([*words, "--dry_run"]) == 0
    with terminated_after(8):
        assert main(words) == 128 + 15
    assert main(words) == 0
    stages = sorted(path.parent for path in run.rglob("config.yaml"))
    own = (
        [each.config for each in load_stages(recipe)] if read_recipe(recipe).stages else [load_config(recipe)]
    )
    for folder, wanted in zip(stages, own, strict=True):
        ran = load_config(folder)
        assert {key for key in KEPT if value(ran, key) != value(wanted, key)} == set()
    check_numbers(stages[-1], load_config(stages[-1]))
    if recipe == "recover_detector":
        check_recovered(tmp_path / "detector", run)


def check_recovered(detector: Path, run: Path) -> None:
    """The backbone is linear and has learned; neck and head are those of the detector, a few small steps on."""
    models = load_dense(detector), load_dense(run)
    assert [plan_of(each.backbone.body) for each in models] == [None, "*: linear"]
    for in_backbone in (True, False):
        before, after = (
            torch.cat(
                [
                    each.flatten()
                    for name, each in model.named_parameters()
                    if name.startswith("backbone.") == in_backbone and each.ndim > 1
                ]
            )
            for model in models
        )
        assert 0 < (before - after).norm() < 0.1 * before.norm()


def value(config: RunConfig, key: str) -> Any:
    section, _, name = key.rpartition(".")
    return getattr(getattr(config, section) if section else config, name)


def check_numbers(run: Path, config: RunConfig) -> None:
    """The last numbers of the log are those of the model that the run left, measured apart, image by image."""
    model = load_dense(run)
    masks = model.kind == "mask_rcnn"
    augment = DenseAugment(short=tuple(config.dense.short), long=config.dense.long)
    data = config.data.model_copy(update={"batch_size": 1, "workers": 0, "eval_batch_size": 1})
    classes = model.num_classes
    scores = MeanIoU(classes) if model.task == "segmentation" else BoxScores(classes, masks=masks)
    with torch.no_grad():
        for batch in create_dense_eval_loader(data, augment, masks=masks):
            prepared = model.prepare(batch.images)
            sizes = [target["original_size"] for target in batch.targets]
            scores.add(model.predict(prepared, model.backbone(prepared.tensors), sizes), batch.targets)
    last = [each for each in read_records(run / "log.jsonl") if any(key.startswith("test_") for key in each)][
        -1
    ]
    for name, number in scores.result(lambda part: [part]).items():
        assert np.isclose(last[f"test_{name}"], number, atol=1e-4), name
