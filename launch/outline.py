"""A teacher known by its timm name alone, built without its weights: enough for a plan, and no download."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import timm
from accelerate import init_empty_weights
from timm.models import get_pretrained_cfg, split_model_name_tag
from torch import nn

from ..checkpoints.build import published_config
from ..checkpoints.preprocessing import Preprocessing, input_size
from ..checkpoints.report import LoadReport
from ..checkpoints.sources import TimmSource, parse_source
from ..checkpoints.teacher import Teacher
from ..models.errors import ConfigError
from ..transfer.config import TeacherConfig


def is_timm_name(source: str) -> bool:
    """Whether a teacher's source is a timm model name, which a download would follow."""
    return isinstance(parse_source(source), TimmSource)


def outline_teacher(config: TeacherConfig, size: tuple[int, int], *, empty: bool = True) -> Teacher:
    """The teacher of a timm name at the student's resolution, fresh, or `empty`: parameters without storage.

    Raises:
        ConfigError: if timm refuses the arguments.
    """
    source = str(config.source)
    described = published_config(source)
    wanted = config.image_size(size)
    try:
        model = _create(source, config.model_args | {"img_size": wanted}, empty)
    except ConfigError:
        if wanted != size:
            raise
        model = _create(source, config.model_args, empty)
    pretrained = get_pretrained_cfg(source)
    has_head = bool(pretrained and pretrained.has_weights and pretrained.num_classes)
    return Teacher(
        model=model.eval().requires_grad_(False),
        source=source,
        architecture=split_model_name_tag(source)[0],
        preprocessing=Preprocessing.read(described, input_size(model, described)),
        license=described.get("license"),
        revision=None,
        has_head=has_head,
        report=LoadReport(source, "timm name", 0, notes=("weights not read",)),
    )


def _create(name: str, arguments: dict[str, Any], empty: bool) -> nn.Module:
    try:
        with init_empty_weights() if empty else nullcontext():
            model: nn.Module = timm.create_model(name, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        reason = error or "timm refused them"
        raise ConfigError(f"teacher.source={name!r} cannot be built with {arguments}: {reason}") from error
    return model
