"""The demo's cells are the packaged recipes, with the seed where a seed belongs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from graftvit.launch.load_config import load_config
from graftvit.models.errors import ConfigError, DataError
from graftvit.transfer.analysis import demo_cells as module
from graftvit.transfer.analysis.demo_cells import (
    DATA_SETS,
    STUDENTS,
    TEACHERS,
    Cell,
    demo_cells,
    find_data,
    recipe,
)
from graftvit.transfer.cells import Ending, save_record
from graftvit.transfer.data.datasets import open_dataset
from graftvit.transfer.data.digits import DigitsSource
from graftvit.transfer.setting import check_effect
from support.files.data_sets import write_fashion


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


@pytest.mark.parametrize("name", DATA_SETS)
@pytest.mark.parametrize("quick", [False, True])
def test_no_cell_has_a_setting_that_changes_nothing(name: str, quick: bool, tmp_path: Path) -> None:
    for cell in demo_cells(tmp_path, (0,), quick, 1, DATA_SETS[name], tmp_path):
        check_effect(cell.config)


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


@pytest.mark.parametrize(("quick", "steps"), [(False, 937), (True, 400)])
def test_how_far_a_teacher_of_one_epoch_is_stands_in_its_log(quick: bool, steps: int, tmp_path: Path) -> None:
    teacher = demo_cells(tmp_path, (0,), quick, 1, DATA_SETS["fashion_mnist"], tmp_path)[0]
    teacher.folder.mkdir(parents=True)
    (teacher.folder / "log.jsonl").write_text('{"epoch": 0, "step": 50}\n{"epoch": 0, "step": 100}\n')
    assert teacher.progress() == 100 / steps
    with (teacher.folder / "log.jsonl").open("a") as log:
        log.write('{"step": "x"}\n{"step": null}\n')
    assert teacher.progress() == 100 / steps
    assert teacher.seconds == pytest.approx(DATA_SETS["fashion_mnist"].seconds["supervised"] * steps / 937)


def test_the_steps_of_an_epoch_are_those_of_the_digits() -> None:
    assert DATA_SETS["digits"].training_images == len(DigitsSource("train", "L"))


def test_a_cell_that_was_run_with_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    cell = demo_cells(tmp_path / "here", (0,), quick=True)[0]
    save_record(Ending(cell.settings), cell.folder)
    assert cell.state() == "done"
    with pytest.raises(ConfigError, match="--threads"):
        demo_cells(tmp_path / "here", (0,), quick=True, threads=2)[0].state()
    (tmp_path / "here").rename(tmp_path / "there")
    assert demo_cells(tmp_path / "there", (0,), quick=True)[0].state() == "done"


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the Debian package would be; it is not installed."""
    monkeypatch.setattr(module, "DEBIAN", tmp_path / "debian")
    return tmp_path / "debian"


def test_photographs_change_what_their_row_says_and_nothing_else(tmp_path: Path) -> None:
    digits = demo_cells(tmp_path, (0,), quick=False)
    others = demo_cells(tmp_path, (0,), False, 1, DATA_SETS["fashion_mnist"], tmp_path / "images")
    differing = {
        "data": {"dataset", "data_path"},
        "student": {"img_size", "model_args"},
        "optim": {"epochs", "warmup_epochs"},
        "engine": {"eval_every"},
    }
    for digit, other in zip(digits, others, strict=True):
        kept = {**differing, "optim": set()} if other.seed is not None else differing
        assert digit.config.model_dump(exclude=kept) == other.config.model_dump(exclude=kept)
        assert (other.config.data.kind, other.config.data.data_path) == (
            "torch/fashion_mnist",
            str(tmp_path / "images"),
        )
        fresh = {**digit.config.student.model_args, "patch_size": 4} if digit.method != "finetune" else {}
        assert other.config.student.model_args == fresh


def test_the_images_of_the_debian_package_are_found_and_unpacked(tmp_path: Path, debian: Path) -> None:
    write_fashion(debian, train=30, test=10, packed=True)
    data, folder = find_data("fashion_mnist", tmp_path / "demo", None, download=False)
    assert folder == tmp_path / "demo" / "data"
    (config,) = {cell.config.data for cell in demo_cells(tmp_path, (0,), True, 1, data, folder)[:1]}
    train, test = (open_dataset(config, split, 1, training=False) for split in ("train", "validation"))
    assert (len(train), len(test)) == (30, 10)  # type: ignore[arg-type]
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*-ubyte")}
    assert find_data("fashion_mnist", tmp_path / "demo", None, download=False) == (data, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*-ubyte")} == written
    (debian / "train-labels-idx1-ubyte.gz").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\.gz is damaged"):
        find_data("fashion_mnist", tmp_path / "again", None, download=False)


def test_the_folder_that_is_named_is_used_as_it_is(tmp_path: Path, debian: Path) -> None:
    write_fashion(debian, packed=True)
    write_fashion(tmp_path / "mine" / "FashionMNIST" / "raw")
    assert find_data("fashion_mnist", tmp_path / "demo", tmp_path / "mine", False)[1] == tmp_path / "mine"
    assert not (tmp_path / "demo").exists()
    with pytest.raises(DataError, match=r"--download.*dataset-fashion-mnist.*--data_path") as caught:
        find_data("fashion_mnist", tmp_path / "demo", tmp_path / "other", False)
    assert "download=True" not in str(caught.value), "no flag of another program's"
    (tmp_path / "mine" / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte").write_bytes(b"\0\0\x08")
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte is missing or damaged: remove it"):
        find_data("fashion_mnist", tmp_path / "demo", tmp_path / "mine", False)


@pytest.mark.parametrize(
    ("name", "path", "download"),
    [("digit", None, False), ("digits", Path("x"), False), ("digits", None, True)],
)
def test_a_data_set_that_cannot_be_is_refused(
    name: str, path: Path | None, download: bool, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="fashion_mnist" if name == "digits" else "digits"):
        find_data(name, tmp_path, path, download)
