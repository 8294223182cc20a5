"""A recipe with a cache on photographs: the second run is the first one, and no teacher runs in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from graftvit.models.copying.teacher_view import WholeModel
from support.runs.cut_recipes import Cut, command, stand_ins
from support.runs.typed import Typed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

RECIPE, CUT = "cached_teacher_vit_small", Cut(workers=2)


def test_a_teacher_sees_photographs_once(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    typed: Typed,
) -> None:
    passes, forward = [0], WholeModel.forward

    def counted(view: WholeModel, images: Tensor) -> None:
        passes[0] += not isinstance(images, FakeTensor)
        forward(view, images)

    monkeypatch.setattr(WholeModel, "forward", counted)
    weights = stand_ins(RECIPE, CUT, tmp_path)
    seen, saved = [], []
    for name, flags in [
        ("without", ["--cache", "none"]),
        ("first", []),
        ("second", []),
        ("other", ["--seed", "1"]),
    ]:
        words = command(RECIPE, CUT, photos, tmp_path / name, weights)
        plan = typed(*words, *flags, "--views", "2", "--dry_run").out
        assert ("complete: no teacher runs" in plan) == (name == "second")
        passes[0] = 0
        typed(*words, *flags, "--views", "2", "--no-report")  # whose verdict runs the teacher once more
        seen.append(passes[0])
        saved.append((tmp_path / name / "student" / "model.safetensors").read_bytes())
    assert seen == [6, 6, 0, 6], "72 images in two views, 24 in a batch"
    assert saved[0] == saved[1] == saved[2] != saved[3]
