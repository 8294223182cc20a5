"""Who teaches a student: one `DualViT` at a time, and never the student itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

from torch import nn
from torch.utils.hooks import RemovableHandle

from ...models.errors import TransferError
from ...models.grid_hosts import release_layers
from .drop_path import release_drop_paths


@dataclass
class Changes:
    """What a `DualViT` changed in its student beside the hosts of its attention and its drop paths."""

    hooks: list[RemovableHandle] = field(default_factory=list)
    frozen: list[nn.Parameter] = field(default_factory=list)


class _Lesson(NamedTuple):
    dual: ReferenceType[Any]
    changes: Changes


_lessons: WeakKeyDictionary[nn.Module, _Lesson] = WeakKeyDictionary()
_taught_by: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()
"""The students of each teacher."""


def begin_lesson(
    teachers: Iterable[nn.Module], student: nn.Module, dual: nn.Module, changes: Changes
) -> None:
    """Note that `dual` teaches `student`, and what it changed in it."""
    _lessons[student] = _Lesson(ref(dual), changes)
    for teacher in teachers:
        _taught_by.setdefault(teacher, WeakSet()).add(student)


def end_lesson(model: nn.Module) -> None:
    """Put a model back as timm made it: its own attention, drop paths and gradients."""
    lesson = _lessons.pop(model, None)
    if lesson is not None:
        for hook in lesson.changes.hooks:
            hook.remove()
        for parameter in lesson.changes.frozen:
            parameter.requires_grad_(True)
    release_drop_paths(model)
    release_layers(model)


def check_free(teacher: nn.Module, student: nn.Module) -> None:
    """Raise `TransferError` where one of the two has another part in a `DualViT` in use, or both share weights."""
    shared = {id(parameter) for parameter in teacher.parameters()}
    if any(id(parameter) in shared for parameter in student.parameters()):
        raise TransferError(
            "teacher and student share their weights, and a teacher is frozen: give the student weights of its own, "
            "such as copy.deepcopy(teacher)"
        )
    for role, model in (("student", student), ("teacher", teacher)):
        if _is_taught(model):
            raise TransferError(
                f"the {role} is the student of another DualViT, which would stop to teach it: call release() of that "
                "one first"
            )
    if any(_is_taught(other) for other in _taught_by.get(student, ())):
        raise TransferError(
            "the student is the teacher of another DualViT, and a teacher is frozen: give it weights of its own, such "
            "as copy.deepcopy(student).requires_grad_(True)"
        )


def _is_taught(model: nn.Module) -> bool:
    lesson = _lessons.get(model)
    return lesson is not None and lesson.dual() is not None
