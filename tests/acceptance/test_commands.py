"""The other commands on the same photographs, as a newcomer types them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import graftvit
import pytest
import timm
from graftvit.launch.cli import main
from graftvit.launch.slurm.folder import JobFolder
from PIL import Image
from support.files.photos import CLASSES
from support.files.plain_timm import PlainTimm
from support.models.tiny_weights import write_stand_in
from support.runs.cut_recipes import SMALL, Cut, command
from support.runs.measure import measure
from support.runs.patience import until
from support.runs.typed import Typed

DISTILL = "cifar10_distill"
TRAINED = 'model = timm.create_model("local-dir:{}", pretrained=True)'


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A stand-in for a classifier of somebody else."""
    folder = tmp_path_factory.mktemp("weights") / "deit"
    return write_stand_in("deit_base_patch16_224.fb_in1k", folder, {**SMALL, "img_size": 64}, len(CLASSES))


@pytest.fixture(scope="session")
def converted(teacher: str, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The classifier with linear attention, its new parts fitted to photographs."""
    out = tmp_path_factory.mktemp("converted") / "out"
    images = ["--calibrate", "8", "--data_path", str(photos)]
    assert main(["convert", teacher, "--plan", "*: linformer", "--output_dir", str(out), *images]) == 0
    return f"local-dir:{out}"


def run_elsewhere(words: list[str], home: Path) -> subprocess.Popen[str]:
    """`graftvit` in a process of its own."""
    own = {f"XDG_{name}_HOME": str(home / name.lower()) for name in ("CONFIG", "STATE")} | {
        "OMP_NUM_THREADS": "1"
    }
    return subprocess.Popen(
        [sys.executable, "-m", "graftvit.launch", *words],
        env={**os.environ, **own}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def reported(student: Path) -> dict[str, Any]:
    return dict(json.loads((student / "config.json").read_text())["graftvit"]["results"])


def check(student: Path, photos: Path, plain_timm: PlainTimm) -> None:
    """timm alone gives the number that the run reports."""
    found = plain_timm.measure(TRAINED.format(student), photos / "validation")
    assert 100 * found["right"] / found["images"] == pytest.approx(reported(student)["top1"])
    assert found["loss"] == pytest.approx(reported(student)["loss"], rel=1e-5)


def test_a_process_that_is_stopped_goes_on(
    teacher: str, photos: Path, plain_timm: PlainTimm, tmp_path: Path
) -> None:
    def words(epochs: int) -> list[str]:
        cut = Cut(length={"epochs": epochs, "warmup_epochs": 1}, workers=2)
        return command(DISTILL, cut, photos, tmp_path / "run", ["--teacher.source", teacher])

    first = run_elsewhere(words(100_000), tmp_path)
    log = tmp_path / "run" / "log.jsonl"
    until(lambda: log.exists() and log.read_text().count("\n") > 1, "training")
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate()
    assert first.returncode == 128 + signal.SIGTERM, said
    assert "the same command continues from there" in said
    done = json.loads(log.read_text().splitlines()[-1])["epoch"] + 1
    assert main(words(done + 1)) == 0
    check(tmp_path / "run" / "student", photos, plain_timm)


def test_submit_on_this_machine(teacher: str, photos: Path, plain_timm: PlainTimm, tmp_path: Path) -> None:
    words = command(DISTILL, Cut(), photos, tmp_path / "run", ["--teacher.source", teacher])[1:]
    here = ["--cluster", "local", "--nodes", "1", "--gpus_per_node", "0"]
    submitted = run_elsewhere(["submit", *words, *here], tmp_path)
    _, said = submitted.communicate()
    assert submitted.returncode == 0, said
    folder = JobFolder(tmp_path / "run")
    until(lambda: [attempt.outcome for attempt in folder.attempts()] == ["finished"], "the end")
    check(tmp_path / "run" / "student", photos, plain_timm)


def test_evaluate_somebody_elses_model_as_it_wants_to_be(
    teacher: str, converted: str, photos: Path, plain_timm: PlainTimm, tmp_path: Path
) -> None:
    file = tmp_path / "found.json"
    words = ["--data_path", str(photos), "--device", "cpu", "--workers", "0", "--json", str(file)]
    assert main(["evaluate", teacher, converted, *words]) == 0
    found = json.loads(file.read_text())
    assert found.keys() == {teacher, converted, "ensemble"}
    anybody = plain_timm.measure(TRAINED.format(teacher.removeprefix("local-dir:")), photos / "validation")
    assert 100 * anybody["right"] / anybody["images"] == pytest.approx(found[teacher]["top1"])
    assert anybody["loss"] == pytest.approx(found[teacher]["loss"], rel=1e-5)


def test_hybrid(teacher: str, converted: str, photos: Path, tmp_path: Path, typed: Typed) -> None:
    words = ["--data_path", photos, "--batch_size", "8", "--workers", "0", "--keep", "2,1", "--device", "cpu"]
    out = tmp_path / "mix"
    said = typed("hybrid", teacher, "--student", f"linear={converted}", *words, "--output_dir", out).out
    rows = dict(re.findall(r"^(teacher|\*: linear|keep 1|keep 2) +(.+)$", said, re.MULTILINE))
    top1, error = ({name: float(row.split()[place]) for name, row in rows.items()} for place in (0, 1))
    assert error["*: linear"] > error["keep 1"] >= error["keep 2"] == error["teacher"] == 0
    assert top1["keep 2"] == top1["teacher"]
    assert (out / "keep-1" / "model.safetensors").exists()


def test_benchmark(converted: str, tmp_path: Path, typed: Typed) -> None:
    line = f"benchmark models {converted} --img_size 64 --batch 2 --repeats 2 --output_dir {tmp_path}"
    typed(line, "--plan", "*: linear")
    assert "linear" in (tmp_path / "table.md").read_text()


def test_visualize_odd_formats_beside_the_teacher(
    teacher: str, converted: str, photos: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "odd", tmp_path / "out"
    folder.mkdir()
    files = sorted((photos / "validation" / CLASSES[0]).iterdir())
    for place in (3, 6, 9):  # CMYK, transparent, 3000 x 40
        shutil.copy(files[place], folder)
    words = [str(folder), "--teacher", teacher, "--layers", "-1", "--output_dir", str(out)]
    assert main(["visualize", converted, *words]) == 0
    numbers = json.loads((out / "numbers.json").read_text())
    assert len(numbers["js"]) == SMALL["depth"]
    assert all(0 <= each < 0.7 for each in numbers["js"])  # at most ln 2
    assert len(list(out.glob("*_teacher.png"))) == 3


def test_data_says_what_is_there_and_draws_it(photos: Path, tmp_path: Path, typed: Typed) -> None:
    picture, file = tmp_path / "look.png", tmp_path / "found.json"
    said = typed("data", photos, "--out", picture, "--json", file).out
    assert all(name in said for name in CLASSES)
    assert Image.open(picture).size > (100, 100)


def test_align_on_photographs_without_classes_keeps_the_head(
    teacher: str, photos: Path, plain_timm: PlainTimm, tmp_path: Path
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for place, path in enumerate(sorted((photos / "train").rglob("*.*"))):
        shutil.copy(path, flat / f"{place:03d}{path.suffix}")
    run, file = tmp_path / "run", tmp_path / "found.json"
    line = (
        f"train --mode align --teacher {teacher} --init teacher --plan *:linformer --student.img_size 64 "
        f"--max_steps 3 --model deit_base_patch16_224 --global_pool token --data_path {flat} "
        f"--batch_size 24 --workers 0 --device cpu --output_dir {run}"
    )
    assert main([*line.split(), "--student.model_args", json.dumps(SMALL)]) == 0
    held = json.loads((run / "student" / "config.json").read_text())
    assert held["num_classes"] == len(CLASSES)
    scored = ["--data_path", str(photos), "--workers", "0", "--device", "cpu", "--json", str(file)]
    metrics = ["--metrics", "top1,knn,probe,distance", "--against", teacher]
    assert main(["evaluate", str(run / "student"), *scored, *metrics]) == 0
    model = graftvit.load(run / "student").eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    found = measure(model, transform, str(photos / "validation"))
    scores = json.loads(file.read_text())[str(run / "student")]
    assert 100 * found["right"] / found["images"] == pytest.approx(scores["top1"])
