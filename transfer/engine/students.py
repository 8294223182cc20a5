"""The student of a run: a plain timm model, from its settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.models import get_pretrained_cfg, is_model, list_models, split_model_name_tag
from torch import nn

from ...checkpoints.teacher import Teacher, load_teacher
from ...models.conversion import with_plan
from ...models.errors import ConfigError, did_you_mean
from ...models.mirror import mirror_arguments
from ..config import StudentConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class StudentPlan:
    """How to make the student, `timm.create_model(architecture, **arguments)`, and how its images are."""

    architecture: str
    arguments: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def meta(self) -> dict[str, Any]:
        """As JSON, for a state file: enough to build the student without the run's settings."""
        return {
            "architecture": self.architecture,
            "model_args": self.arguments,
            "mean": self.mean,
            "std": self.std,
        }

    def create(self, drop_path: float = 0.0) -> nn.Module:
        """A fresh model; ConfigError in timm's words where it refuses the arguments."""
        try:
            model: nn.Module = timm.create_model(
                self.architecture, drop_path_rate=drop_path, **self.arguments
            )
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise ConfigError(
                f"student.model={self.architecture!r} cannot be built with {self.arguments}: "
                f"{error or 'timm refused them'}"
            ) from error
        return model


def find_whole_name(config: StudentConfig) -> str | None:
    """`config.model` where it is a source of a whole model, and not the architecture of a fresh student."""
    text = config.model
    is_source = ":" in text or "/" in text or Path(text).exists()
    return text if is_source and not is_model(split_model_name_tag(text)[0]) else None


def find_whole(config: StudentConfig) -> Teacher | None:
    """The model that the student goes on from; None for a fresh one.

    Raises CheckpointError: it cannot be loaded.
    """
    source = find_whole_name(config)
    return None if source is None else load_teacher(source, img_size=config.img_size)


def input_size(config: StudentConfig, whole: Teacher | None = None) -> tuple[int, int, int]:
    """(channels, height, width) of the student's images, without building it; those of `whole` where it is that.

    Raises ConfigError where timm does not know the architecture.
    """
    if whole is not None:
        model: Any = whole.model
        height, width = model.patch_embed.img_size
        return int(model.patch_embed.proj.in_channels), int(height), int(width)
    base, _ = split_model_name_tag(config.model)
    if not is_model(base):
        raise ConfigError(f"student.model={config.model!r} is not a timm model: {_suggest(base)}")
    pretrained = get_pretrained_cfg(config.model)
    channels, height, width = pretrained.input_size if pretrained else (3, 224, 224)
    size = config.img_size or config.model_args.get("img_size") or (height, width)
    height, width = (size, size) if isinstance(size, int) else size
    return int(config.model_args.get("in_chans", channels)), int(height), int(width)


def _suggest(name: str) -> str:
    family = [model for model in list_models() if model.startswith(("vit_", "deit", "beit", "eva"))]
    return did_you_mean(name, family).split("valid:")[0] + "`timm.list_models()` names the valid ones"


def plan_student(
    config: StudentConfig, num_classes: int, teacher: Teacher | None, whole: Teacher | None = None
) -> StudentPlan:
    """The student with `num_classes` outputs, its images normalised as the teacher's where there is one.

    `whole` is the model that it goes on from, whose architecture, plan and normalisation it keeps.
    """
    if whole is not None:
        size = input_size(config, whole)[1:]
        arguments = {**whole.model_args, "num_classes": num_classes, "img_size": size}
        architecture = whole.architecture
        if config.plan is not None:
            architecture, arguments = with_plan(architecture, arguments, config.plan)
        return StudentPlan(architecture, arguments, whole.mean, whole.std)
    channels, height, width = input_size(config)
    arguments = {
        **config.model_args,
        "num_classes": num_classes,
        "img_size": (height, width),
        "in_chans": channels,
    }
    if config.global_pool is not None:
        arguments["global_pool"] = config.global_pool
    architecture = config.model
    if config.mirror_teacher:
        if teacher is None:
            raise ConfigError("student.mirror_teacher=true needs a teacher: set teacher.source")
        architecture, arguments = mirror_arguments(teacher.model, architecture, arguments)
    if config.plan is not None:
        architecture, arguments = with_plan(architecture, arguments, config.plan)
    mean, std = student_normalization(config, channels, teacher)
    return StudentPlan(architecture, arguments, mean, std)


def student_normalization(
    config: StudentConfig, channels: int, teacher: Teacher | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel: the teacher's, else those of the architecture in timm."""
    if teacher is not None:
        return teacher.mean, teacher.std
    pretrained = get_pretrained_cfg(config.model)
    mean, std = (pretrained.mean, pretrained.std) if pretrained else (IMAGENET_MEAN, IMAGENET_STD)
    return (
        (tuple(mean), tuple(std))
        if len(mean) == channels
        else (tuple(mean[:1]) * channels, tuple(std[:1]) * channels)
    )
