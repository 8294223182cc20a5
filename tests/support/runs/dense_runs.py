"""Runs of detectors and segmenters on a few composed scenes of several sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graftvit.models.dense import DESIGNS, SEGMENTATION, Kind
from graftvit.transfer.config import RunConfig
from support.files.dense_scenes import composed, write_ade20k, write_coco
from support.runs.engine_runs import config

PVT: dict[str, Any] = {
    "depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32], "num_heads": [1, 2, 3, 4], "img_size": 64,
}  # fmt: skip
VIT: dict[str, Any] = {"depth": 2, "embed_dim": 24, "num_heads": 3, "patch_size": 8, "img_size": 64}
SHAPES = ((64, 96), (96, 64), (72, 72))


def scenes() -> dict[str, Any]:
    """Return 12 scenes to train on and 5 to validate."""
    return {split: composed(split, count, SHAPES) for split, count in (("train", 12), ("validation", 5))}


def small_coco(folder: Path) -> Path:
    return write_coco(folder, scenes())


def small_ade20k(folder: Path) -> Path:
    splits = scenes()
    return write_ade20k(folder, {"training": splits["train"], "validation": splits["validation"]})


def run(folder: Path, images: Path, head: Kind = "retinanet", **sections: Any) -> RunConfig:
    """Two epochs of three steps on images of several sizes."""
    segments = DESIGNS[head].task == SEGMENTATION
    student = {"model": "pvt_v2_b0", "model_args": PVT, "drop_path": 0.1}
    base: dict[str, Any] = {
        "student": student,
        "dense": {"head": head, "width": 16, "short": [48, 64], "long": 96},
        "data": {"dataset": "ade20k" if segments else "coco", "data_path": str(images), "batch_size": 4,
                 "eval_batch_size": 4, "train_samples": None, "hflip": 0.5},
    }  # fmt: skip
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values} if isinstance(values, dict) else values
    return config(folder, **base)
