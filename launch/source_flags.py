"""The settings for reading a source of weights, for the commands that take one."""

from __future__ import annotations

from collections.abc import Sequence

from ..models.errors import JsonDict
from ..transfer.config import TeacherConfig
from .load_config import Setting, load_config

NAMES = ("model", "model_args", "revision", "img_size", "position_embedding")
SOURCE_SETTINGS = tuple(f"teacher.{name}" for name in NAMES)
SOURCE_HELP = "timm name, hf-hub:org/name[@revision], run or model folder, weights file; a path may end in #best, #last, #ema, #teacher or #student"  # noqa: E501


def source_keywords(how: TeacherConfig) -> JsonDict:
    """Return the settings as keywords of `load_pretrained`."""
    return {name: getattr(how, name) for name in NAMES}


def keywords_of(settings: Sequence[Setting]) -> JsonDict:
    """Return the settings of a command line as keywords of `load_pretrained`. Raises ConfigError for a wrong value."""
    return source_keywords(load_config(None, settings).teacher)
