"""The demo's runs are the packaged recipes, with the seed where a seed belongs."""

from __future__ import annotations

from pathlib import Path

import pytest
from graftvit.launch.config import load_config
from graftvit.transfer.demo.parts import STUDENTS, demo_parts, recipe


@pytest.mark.parametrize("name", ["pretrain", *STUDENTS])
def test_a_recipe_is_what_the_command_line_makes_of_it(name: str, tmp_path: Path) -> None:
    ours = recipe(f"digits_{name}", tmp_path, {})
    theirs = load_config(f"digits_{name}", {"output_dir": tmp_path, "engine.trackers": ()})
    assert ours == theirs


def test_changes_reach_single_keys_and_leave_their_neighbours(tmp_path: Path) -> None:
    plain = recipe("digits_distill", tmp_path, {})
    changed = recipe("digits_distill", tmp_path, {"data": {"label_seed": 7}, "seed": 3})
    assert changed.data.label_seed == 7
    assert changed.seed == 3
    assert changed.model_copy(update={"data": plain.data, "seed": 0}) == plain


def test_the_teacher_comes_first_then_every_student_of_every_seed(tmp_path: Path) -> None:
    parts = demo_parts(tmp_path, (4, 9), quick=False)
    assert [str(part) for part in parts[:2]] == ["teacher", "scratch, seed 4"]
    assert [(part.name, part.seed) for part in parts[1:]] == [(n, s) for s in (4, 9) for n in STUDENTS]
    assert len({part.folder for part in parts}) == 9
    for part in parts[1:]:
        assert (part.config.seed, part.config.data.label_seed) == (part.seed, part.seed)
        teacher = f"local-dir:{parts[0].folder / 'student'}"
        assert part.config.teacher.source == (None if part.name == "scratch" else teacher)


def test_students_differ_in_nothing_but_what_they_take_from_the_teacher(tmp_path: Path) -> None:
    parts = demo_parts(tmp_path, (0,), quick=False)[1:]
    shared = [part.config.model_dump(exclude={"mode", "output_dir", "teacher", "transfer"}) for part in parts]
    assert all(settings == shared[0] for settings in shared)
    assert [part.config.mode for part in parts] == ["scratch", "finetune", "transfer", "transfer"]


def test_a_quick_demo_shortens_the_teacher_alone_in_folders_of_its_own(tmp_path: Path) -> None:
    full, quick = (demo_parts(tmp_path, (0,), quick=quick) for quick in (False, True))
    assert not {part.folder for part in full} & {part.folder for part in quick}
    assert quick[0].config.optim.epochs < full[0].config.optim.epochs
    for long, short in zip(full[1:], quick[1:], strict=True):
        assert long.config.optim == short.config.optim
        assert long.config.data == short.config.data
