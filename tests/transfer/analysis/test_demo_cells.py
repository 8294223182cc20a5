"""The demo's cells are the packaged recipes, with the seed where a seed belongs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from graftvit.launch.load_config import load_config
from graftvit.models.errors import ConfigError
from graftvit.transfer.analysis.demo_cells import STUDENTS, TEACHERS, Cell, demo_cells, recipe
from graftvit.transfer.cells import Ending, save_record


@pytest.mark.parametrize(
    "name", [*TEACHERS.values(), *dict.fromkeys(f"digits_{method}" for method, _ in STUDENTS)]
)
def test_a_recipe_is_what_the_command_line_makes_of_it(name: str, tmp_path: Path) -> None:
    ours = recipe(name, tmp_path, {})
    theirs = load_config(name, {"output_dir": tmp_path, "engine.trackers": (), "engine.report": False})
    assert ours == theirs


def test_changes_reach_single_keys_and_leave_their_neighbors(tmp_path: Path) -> None:
    plain = recipe("digits_distill", tmp_path, {})
    changed = recipe("digits_distill", tmp_path, {"data": {"label_seed": 7}, "seed": 3})
    assert changed.data.label_seed == 7
    assert changed.seed == 3
    assert changed.model_copy(update={"data": plain.data, "seed": 0}) == plain


def test_the_teachers_come_first_then_every_student_of_every_seed(tmp_path: Path) -> None:
    cells = demo_cells(tmp_path, (4, 9), quick=False)
    assert [str(cell) for cell in cells[:4]] == [
        "supervised teacher",
        "mae teacher",
        "scratch seed 4",
        "copy (supervised teacher) seed 4",
    ]
    assert [(cell.method, cell.teacher, cell.seed) for cell in cells[2:]] == [
        (method, teacher, seed) for seed in (4, 9) for method, teacher in STUDENTS
    ]
    assert len({cell.folder for cell in cells}) == len(cells)
    folders = {cell.teacher: cell.folder for cell in cells[:2]}
    for cell in cells[2:]:
        assert (cell.config.seed, cell.config.data.label_seed) == (cell.seed, cell.seed)
        source = None if cell.teacher is None else f"local-dir:{folders[cell.teacher] / 'student'}"
        assert cell.config.teacher.source == source
        assert cell.needs == (None if cell.teacher is None else folders[cell.teacher])


def test_the_supervised_teacher_reads_the_image_as_its_students_do(tmp_path: Path) -> None:
    cells = demo_cells(tmp_path, (0,), quick=False)
    assert {cell.config.student.global_pool for cell in cells if cell.config.mode != "pretrain"} == {"avg"}
    assert cells[0].config.data.train_samples is None


def test_students_differ_in_nothing_but_what_they_take_from_the_teacher(tmp_path: Path) -> None:
    cells = demo_cells(tmp_path, (0,), quick=False)[2:]
    taken = {"mode": True, "output_dir": True, "teacher": True, "transfer": True}
    shape = {"student": {"model", "model_args", "img_size"}}  # of the teacher where its weights are taken
    shared = [cell.config.model_dump(exclude=taken | shape) for cell in cells]
    assert all(settings == shared[0] for settings in shared)
    assert {cell.config.student.model for cell in cells if cell.config.mode == "finetune"} == {"auto"}
    assert (
        len({cell.config.student.model_dump_json() for cell in cells if cell.config.mode != "finetune"}) == 1
    )
    modes = ["scratch", "transfer", "transfer", "finetune", "transfer", "transfer"]
    assert [cell.config.mode for cell in cells] == modes


def test_a_quick_demo_shortens_the_teachers_alone_in_folders_of_its_own(tmp_path: Path) -> None:
    full, quick = (demo_cells(tmp_path, (0,), quick=quick) for quick in (False, True))
    assert not {cell.folder for cell in full} & {cell.folder for cell in quick}
    for long, short in zip(full[:2], quick[:2], strict=True):
        assert short.config.optim.epochs < long.config.optim.epochs
        assert short.seconds < long.seconds
    for long, short in zip(full[2:], quick[2:], strict=True):
        assert long.config.optim == short.config.optim
        assert long.config.data == short.config.data


def write_log(cell: Cell, *records: dict[str, float]) -> None:
    cell.folder.mkdir(parents=True)
    text = "".join(json.dumps({"n_parameters": 1, **record}) + "\n" for record in records)
    (cell.folder / "log.jsonl").write_text(text)


def test_how_far_a_cell_is_stands_in_its_log(tmp_path: Path) -> None:
    teacher, _, student = demo_cells(tmp_path, (0,), quick=False)[:3]
    assert (teacher.progress(), teacher.curve()) == (0.0, [])
    write_log(teacher, {"epoch": 0, "step": 20}, {"epoch": 14, "step": 300, "test_top1": 90.0})
    assert teacher.progress() == 15 / teacher.config.optim.epochs
    assert teacher.curve() == [(300, 90.0)]
    write_log(student, {"epoch": 74, "step": 75})
    assert student.progress() == 75 / 300


def test_a_cell_that_was_run_with_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    cell = demo_cells(tmp_path / "here", (0,), quick=True)[0]
    save_record(Ending(cell.settings), cell.folder)
    assert cell.state() == "done"
    with pytest.raises(ConfigError, match="--threads"):
        demo_cells(tmp_path / "here", (0,), quick=True, threads=2)[0].state()
    (tmp_path / "here").rename(tmp_path / "there")
    assert demo_cells(tmp_path / "there", (0,), quick=True)[0].state() == "done"
