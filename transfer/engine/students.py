"""The student of a run: a plain timm model, from its settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import timm
from timm.models import get_pretrained_cfg, is_model, list_models, split_model_name_tag
from torch import nn

from ...checkpoints.class_names import KEY as LABEL_NAMES
from ...checkpoints.preprocessing import Preprocessing
from ...checkpoints.pretrained import Pretrained, load_pretrained, read_preprocessing
from ...checkpoints.timm_models import published_config
from ...models.conversion import with_plan
from ...models.copied import Copying, copying_of, with_copying
from ...models.errors import ConfigError, did_you_mean
from ...models.families import check_patches
from ...models.json_types import JsonDict
from ...models.mirror import mirror_arguments
from ..config import RunConfig, StudentConfig
from ..data.augment import with_settings


@dataclass(frozen=True)
class StudentPlan:
    """How to make the student, `timm.create_model(architecture, **arguments)`, and how its images are."""

    architecture: str
    arguments: JsonDict
    preprocessing: Preprocessing
    copying: Copying | None = None
    """The part of its teacher that it runs with, once that is resolved."""
    label_names: tuple[str, ...] | None = None
    """The classes of its head in their order, where they are known."""

    def meta(self) -> JsonDict:
        """As JSON, for a state file: enough to build what the run leaves without the run's settings."""
        name, arguments = self.architecture, self.arguments
        if self.copying is not None:
            name, arguments = with_copying(name, arguments, self.copying)
        known = {} if self.label_names is None else {LABEL_NAMES: list(self.label_names)}
        return {"architecture": name, "model_args": arguments, **self.preprocessing.described(), **known}

    def create(self, drop_path: float = 0.0) -> nn.Module:
        """A fresh model; ConfigError in timm's words where it refuses the arguments.

        UnsupportedModelError: it does not take images of this size.
        """
        try:
            model: nn.Module = timm.create_model(
                self.architecture, drop_path_rate=drop_path, **self.arguments
            )
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise ConfigError(
                f"student.model={self.architecture!r} cannot be built with {self.arguments}: "
                f"{error or 'timm refused them'}"
            ) from error
        check_patches(model)
        return model


def find_whole_name(config: StudentConfig) -> str | None:
    """`config.model` where it is a source of a whole model, and not the architecture of a fresh student."""
    text = config.model
    is_source = ":" in text or "/" in text or Path(text.partition("#")[0]).exists()
    return text if is_source and not is_model(split_model_name_tag(text)[0]) else None


def find_whole(config: StudentConfig) -> Pretrained | None:
    """Return the model that the student continues; None for a fresh student.

    Raises CheckpointError: it cannot be loaded. ConfigError: it runs with its teacher's attention.
    """
    source = find_whole_name(config)
    whole = None if source is None else load_pretrained(source, img_size=config.img_size)
    copying = None if whole is None else copying_of(whole.model)
    if copying is not None:
        raise ConfigError(
            f"student.model={source!r} runs with its teacher's attention, and is not trained further so: write its own "
            f"weights alone with `graftvit save {source} DIR --bare`, and start from DIR with "
            f"transfer.method={copying.method} with the same teacher"
        )
    return whole


def input_size(config: StudentConfig, whole: Pretrained | None = None) -> tuple[int, int, int]:
    """(channels, height, width) of the student's images, without building it; those of `whole` where it is that.

    Raises ConfigError where timm does not know the architecture.
    """
    if whole is not None:
        return whole.preprocessing.input_size
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
    config: StudentConfig,
    num_classes: int,
    teacher: Pretrained | None,
    preprocessing: Preprocessing,
    whole: Pretrained | None = None,
) -> StudentPlan:
    """The student with `num_classes` outputs.

    `whole` is the model that it continues, whose architecture and plan it keeps.
    """
    channels, height, width = preprocessing.input_size
    if whole is not None:
        arguments = {**whole.model_args, "num_classes": num_classes, "img_size": (height, width)}
        architecture = whole.architecture
        if config.plan is not None:
            architecture, arguments = with_plan(architecture, arguments, config.plan)
        return StudentPlan(architecture, arguments, preprocessing)
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
    return StudentPlan(architecture, arguments, preprocessing)


def resolve_preprocessing(
    config: RunConfig, teacher: Pretrained | None, whole: Pretrained | None = None
) -> Preprocessing:
    """How the student's images are made, in training, in evaluation and for users of the student.

    As the weights say that it starts from (`whole`, student.init), else as its teacher's, else as timm says of the
    architecture; `data.crop_pct`, `data.crop_mode` and `data.interpolation` stand above that.
    """
    init = config.student.init
    if whole is not None:
        own = whole.preprocessing
    elif init not in (None, "teacher"):
        own = read_preprocessing(init)
    elif teacher is not None:
        own = teacher.preprocessing
    else:
        own = Preprocessing.read(published_config(config.student.model))
    own = Preprocessing.read(own.described(), input_size(config.student, whole))
    return with_settings(own, config.data)
