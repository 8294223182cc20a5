"""The cells of a comparison: each a student at an image size, and which of them a job of an array takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ....models.errors import ConfigError, did_you_mean

TEACHER, UNIFORM = "teacher", "uniform"
T = TypeVar("T")


@dataclass(frozen=True)
class Cell:
    """One row of the table: a student by its plan, or the teacher as it is, which has none."""

    name: str
    plan: str | None
    size: int
    """Side of the images in pixels."""

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.size}"


def list_cells(plans: Mapping[str, str], sizes: Sequence[int], *, teacher: bool) -> list[Cell]:
    """All cells: at each size the teacher where there is one, uniform attention, then the plans.

    Raises ConfigError: a name is taken or is no name.
    """
    for name in plans:
        if name in (TEACHER, UNIFORM):
            raise ConfigError(
                f"compare.plans: {name!r} is there without being asked for; choose another name"
            )
        if not re.fullmatch(r"[A-Za-z0-9_+.-]+", name):
            raise ConfigError(f"compare.plans: {name!r} must be of letters, digits, dashes, dots, +")
    everyone: dict[str, str | None] = {TEACHER: None} if teacher else {}
    everyone |= {UNIFORM: "*: uniform", **plans}
    return [Cell(name, plan, size) for size in sizes for name, plan in everyone.items()]


def only_named(cells: Sequence[Cell], names: Sequence[str] | None, origin: str = "--only") -> list[Cell]:
    """The cells of these names, or with these folders; all for None. Raises ConfigError: one is not there."""
    if names is None:
        return list(cells)
    valid = {cell.name for cell in cells} | {cell.folder for cell in cells}
    for name in names:
        if name not in valid:
            raise ConfigError(f"{origin} {name}: there is no such cell; {did_you_mean(name, valid)}")
    return [cell for cell in cells if cell.name in names or cell.folder in names]


def array_share(cells: Sequence[T], environment: Mapping[str, str]) -> list[T]:
    """The cells of this job of a SLURM array, every COUNT-th from its place on; all outside of an array.

    Raises ConfigError: the array's variables contradict each other.
    """
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return list(cells)
    number, first, step, count = (
        _number(environment, f"SLURM_ARRAY_TASK_{name}", default)
        for name, default in (("ID", None), ("MIN", 0), ("STEP", 1), ("COUNT", None))
    )
    place, left = divmod(number - first, max(1, step))
    if left or not 0 <= place < count:
        raise ConfigError(
            f"SLURM_ARRAY_TASK_ID={number} is no place of an array of {count} from {first} in steps of {step}; "
            "submit it as --array=0-7, without gaps"
        )
    return list(cells[place::count])


def _number(environment: Mapping[str, str], name: str, default: Any) -> int:
    text = environment.get(name, default)
    try:
        return int(text)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} is {text!r}, but must be a whole number") from error
