"""Model folders whose config.json means harm: what is said there of a model, against the tensors beside it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import timm
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from graftvit.models.conversion import convert, with_plan
from graftvit.models.copied import CopiedTeacher, Copying, copy_attention, with_copying
from graftvit.models.copying.tape import LayerPair
from graftvit.models.copying.teacher_view import Normalization
from support.files.hostile import ARCHITECTURE, ARGUMENTS

HALF = Normalization((0.5,) * 3, (0.5,) * 3)
KINDS = ("plain", "converted", "copied")
HUGE_INTS = (100_000, 1_000_000, 1_000_000_000, 2_000_000_000, 10**30)
WRONG: tuple[Any, ...] = (
    *HUGE_INTS, 2e9, -3, 0, -1e300, 1e300, float("nan"), float("inf"), "abc", [], [10**9], [[1]], {}, {"a": 10**9},
    True, "hf-hub:a/b", "local-dir:/dev", "/dev/zero", "\x00",
)  # fmt: skip
"""Values that are put in place of others."""


def small_model(kind: str) -> tuple[torch.nn.Module, str, dict[str, Any]]:
    """A model of this kind, and the name and arguments that build it."""
    torch.manual_seed(1)
    model = timm.create_model(ARCHITECTURE, **ARGUMENTS)
    if kind == "converted":
        plan = "0: linformer(num_keys=2)"
        name, arguments = with_plan(ARCHITECTURE, ARGUMENTS, plan)
        return convert(model, plan), name, arguments
    if kind == "copied":
        teacher = CopiedTeacher(ARCHITECTURE, ARGUMENTS, HALF)
        copying = Copying("copy", (LayerPair(0, 0),), (((0,), (1,)),), HALF, teacher)
        copy_attention(model, timm.create_model(ARCHITECTURE, **ARGUMENTS), copying)
        return model, *with_copying(ARCHITECTURE, ARGUMENTS, copying)
    return model, ARCHITECTURE, dict(ARGUMENTS)


def write_model(kind: str, folder: Path) -> Path:
    """A good folder with a model of this kind."""
    model, name, arguments = small_model(kind)
    own = Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3)
    write_student(model, folder, architecture=name, model_args=arguments, preprocessing=own)
    return folder


def change(folder: Path, place: tuple[Any, ...], value: Any) -> None:
    """Puts `value` at a place of config.json, such as ("model_args", "depth")."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(changed(config, place, value)))


def changed(tree: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy of a tree of JSON with another value at a place."""
    tree = copy.deepcopy(tree)
    if not place:
        return value
    inner = tree
    for key in place[:-1]:
        inner = inner.setdefault(key, {}) if isinstance(inner, dict) else inner[key]
    inner[place[-1]] = value
    return tree


def places(tree: Any) -> list[tuple[Any, ...]]:
    """Every place of a tree of JSON, the whole tree first."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [(), *((key, *rest) for key, value in children for rest in places(value))]
