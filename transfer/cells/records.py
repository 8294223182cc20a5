"""The record of a cell in its folder, `cell.json`, and how far the cell is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ...checkpoints.atomic import write_shared, write_text
from ...checkpoints.files import read_if_there
from ...models.errors import ConfigError

CELL_FILE = "cell.json"
State = Literal["done", "failed", "begun", "to do"]
Whole = Annotated[int, Field(ge=0, lt=1 << 63)]
R = TypeVar("R")


@dataclass(frozen=True)
class Ending:
    """What every record holds; an application's own record has more fields."""

    __pydantic_config__ = ConfigDict(allow_inf_nan=False, str_max_length=20_000)
    settings: str
    """The digest of all settings that the cell's numbers depend on."""
    error: str | None = None
    """Why the cell failed; None where it is done."""


def digest(settings: Any) -> str:
    """Return the digest of settings, as plain data."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def cell_state(folder: Path, settings: str, differing: str = "settings", flag: str = "--output_dir") -> State:
    """Return how far the cell in `folder` is, by its record.

    Raises ConfigError: the cell was done with other settings than those of the digest, in words `differing`, and
    `flag` names another folder; or its record is damaged.
    """
    record = load_record(Ending, folder)
    if record is None:
        return "begun" if folder.exists() else "to do"
    if record.error is not None:
        return "failed"
    if record.settings != settings:
        raise ConfigError(f"{folder} was measured with other {differing}; take another {flag}, or remove it")
    return "done"


def save_record(record: Any, folder: Path) -> None:
    """Write a dataclass as the record of a cell. Raises WriteFailedError as `write_file`."""
    write_text(folder / CELL_FILE, _text(record))


def save_first(record: R, folder: Path) -> R:
    """Write a dataclass as the record of a cell that several processes may run; return the record of the first one.

    Raises WriteFailedError as `write_file`.
    """
    write_shared(folder / CELL_FILE, _text(record).encode(), replace=False)
    return load_record(type(record), folder) or record


def _text(record: Any) -> str:
    return json.dumps(dataclasses.asdict(record), indent=1) + "\n"


def load_record(kind: type[R], folder: Path) -> R | None:
    """Return the record of a cell; None where the cell has not ended.

    Raises ConfigError: the record is damaged.
    """
    path = folder / CELL_FILE
    text = read_if_there(path, refusal=ConfigError)
    try:
        return None if text is None else TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"{path} is no record of a cell; remove it, and the cell runs again") from error
