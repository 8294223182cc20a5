"""Recipes made small and short: the command line that runs one on photographs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftvit.launch.load_config import load_config, load_stages, read_recipe
from graftvit.transfer import RunConfig
from support.files.photos import CLASSES
from support.models.tiny_weights import write_stand_in

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}


@dataclass(frozen=True)
class Cut:
    """How a recipe is made small and short. What is not named here stays as the recipe has it."""

    model_args: Mapping[str, Any] = field(default_factory=lambda: SMALL)
    img_size: int | None = 64
    batch_size: int | None = 24
    """Three steps an epoch."""
    length: Mapping[str, Any] = field(default_factory=lambda: {"epochs": 2, "warmup_epochs": 0.5})
    stop_after: int = 4
    """Steps of all stages together, before the run is stopped in the middle."""
    workers: int = 0
    more: tuple[str, ...] = ()
    """Further flags."""
    alone: bool = True
    """Whether timm alone loads the student."""
    init: str = ""
    """The architecture of weights that a run of another recipe leaves."""


KEYS = {
    "output_dir", "teacher.source", "teachers", "teacher.img_size", "student.model_args", "student.img_size",
    "student.init", "data.dataset", "data.data_path", "data.num_classes", "data.batch_size", "data.workers",
    "transfer.cache", "optim.epochs", "optim.max_steps", "optim.warmup_epochs", "optim.min_lr", "engine.device",
}  # fmt: skip
"""The only settings that a cut changes."""


def stages_of(recipe: str) -> list[RunConfig]:
    """The configuration of each stage of a recipe; of one without stages, its own."""
    if read_recipe(recipe).stages:
        return [stage.config for stage in load_stages(recipe)]
    return [load_config(recipe)]


def command(recipe: str, cut: Cut, photos: Path, out: Path, weights: list[str]) -> list[str]:
    """The words of `graftvit train`; `weights` are the flags of `stand_ins`."""
    own = stages_of(recipe)[0]
    flags = {"data_path": photos, "output_dir": out, "device": "cpu", "workers": cut.workers, **cut.length}
    if own.data.dataset:
        flags["dataset"] = "folder"
    if own.data.num_classes:
        flags["num_classes"] = len(CLASSES)
    if own.teacher.img_size:
        flags["teacher.img_size"] = cut.img_size
    if own.transfer.cache:
        flags["cache"] = out.parent / "targets"
    if cut.batch_size:
        flags["batch_size"] = cut.batch_size
    if cut.img_size:
        flags["student.img_size"] = cut.img_size
    if cut.model_args:
        flags["student.model_args"] = json.dumps(dict(cut.model_args))
    given = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    return ["train", recipe, *weights, *given, *cut.more]


def stand_ins(recipe: str, cut: Cut, folder: Path, pretrained: str = "") -> list[str]:
    """The flags that put small weights in the place of the recipe's.

    Weights of another recipe's run are `pretrained`, or random ones of the architecture `cut.init`.
    """
    own = stages_of(recipe)[0]
    flags = []
    for flag, source in (("--teacher.source", own.teacher.source), ("--student.init", own.student.init)):
        if source is None or source == "teacher":
            continue
        if cut.init:
            flags += [flag, _stand_in(cut.init, cut, folder / "weights")]
            continue
        if source.startswith("local-dir:"):
            flags += [flag, pretrained]
            continue
        flags += [flag, _stand_in(source, cut, folder / "weights")]
    further = {
        name: {
            **each.model_dump(exclude_defaults=True),
            "source": _stand_in(str(each.source), cut, folder / name),
        }
        for name, each in own.teachers.items()
    }
    return [*flags, "--teachers", json.dumps(further)] if further else flags


def _stand_in(source: str, cut: Cut, folder: Path) -> str:
    if source in CONVOLUTIONS:
        return write_stand_in(CONVOLUTIONS[source], folder, {}, len(CLASSES))
    sized = (
        {} if source.startswith("pvt_v2") else {"img_size": cut.img_size}
    )  # timm's PVTv2 has no such argument
    return write_stand_in(source, folder, {**cut.model_args, **sized}, len(CLASSES))


CONVOLUTIONS = {"regnety_160.deit_in1k": "test_resnet", "convnext_base.fb_in22k_ft_in1k": "test_convnext"}
"""Small networks in place of teachers that are no vision transformers."""
