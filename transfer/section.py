"""The base class of settings sections, and checks for all settings, without torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from ..checkpoints.files import NOT_A_URL, is_url
from ..models.errors import JsonDict

T = TypeVar("T")


@dataclass(frozen=True)
class OneOf:
    """Marks a setting whose valid values are names in a registry, which other packages can extend."""

    names: Callable[[], Iterable[str]]


MAX_WHOLE = 2**63
"""Whole numbers stay below what torch and the file formats hold."""


def check_plain(value: Any, depth: int = 50) -> None:
    """Raise ValueError for non-finite numbers, text with a NUL, and too deep nesting."""
    if depth == 0:
        raise ValueError("it nests too many levels")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("numbers must be finite")
    if isinstance(value, int) and abs(value) >= MAX_WHOLE:
        raise ValueError("whole numbers must be below 2^63")
    if isinstance(value, str | Path) and "\0" in str(value):
        raise ValueError("text and paths must not contain a NUL character")
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set):
        for part in value:
            check_plain(part, depth - 1)


class Section(BaseModel):
    """A group of settings; an unknown key or a value of the wrong kind is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _check_plain(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        if not (
            isinstance(kind, type) and issubclass(kind, Section)
        ):  # its own fields are checked separately
            check_plain(value)
        return value

    @field_validator("*")
    @classmethod
    def _check_name(cls, value: Any, info: ValidationInfo) -> Any:
        for table in cls.model_fields[str(info.field_name)].metadata:
            if isinstance(table, OneOf) and value not in table.names():
                valid = ", ".join(map(repr, table.names()))
                raise PydanticCustomError("one_of", "Input should be one of {valid}", {"valid": valid})
        return value


def check_local(path: T) -> T:
    """Raise ValueError for a URL where a path on this machine is meant."""
    if isinstance(path, str | Path) and is_url(path):
        raise ValueError(NOT_A_URL)
    return path


LOCAL = AfterValidator(check_local)
"""Marks a setting that is a path on this machine."""


def check_size(size: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
    """Raise ValueError for an image size without pixels."""
    if size is not None and min((size,) if isinstance(size, int) else size) <= 0:
        raise ValueError("an image size is a whole number above 0, or two: height, width")
    return size


def check_size_text(size: Any) -> Any:
    """Raise ValueError for an image size such as 72x104, and say how it is written."""
    found = re.fullmatch(r"(\d+) *[x×,] *(\d+)", size) if isinstance(size, str) else None
    if found is not None:
        raise ValueError(f"write height and width as [{found[1]}, {found[2]}]")
    return size


def check_arguments(arguments: JsonDict) -> JsonDict:
    """Raise ValueError for a value that is no JSON, and for a name such as `depth:6`, which YAML reads as a name."""
    for name, value in arguments.items():
        if not name.isidentifier():
            raise ValueError(
                f"{name!r} is not the name of an argument; write '{{depth: 6}}', with a space after the colon"
            )
        try:
            json.dumps(value)
        except TypeError as error:
            raise ValueError(
                f"{name}={value!r} cannot be written to config.yaml: give its name as text"
            ) from error
    return arguments
