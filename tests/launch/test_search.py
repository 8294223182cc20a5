"""`graftvit programs search`, as typed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from graftvit.launch.cli import main
from graftvit.transfer.search.program_search import ARCHIVE
from PIL import Image
from safetensors.torch import load_file, save_file
from support.files.hostile import ARCHITECTURE, ARGUMENTS


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A search over a random teacher."""
    torch.manual_seed(0)
    model = timm.create_model(ARCHITECTURE, **ARGUMENTS)
    shown = Preprocessing.of(model, mean=(0.4,) * 3, std=(0.2,) * 3)
    write_student(
        model, tmp_path / "teacher", architecture=ARCHITECTURE, model_args=ARGUMENTS, preprocessing=shown
    )
    return [
        "programs",
        "search",
        str(tmp_path / "teacher"),
        "--dataset",
        "digits",
        "--images",
        "4",
        "--population",
        "5",
        "--workers",
        "1",
    ]


def test_a_search_prints_its_front_and_resumes(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--generations", "2", "--output_dir", str(tmp_path / "found")]) == 0
    said = capsys.readouterr().out
    assert "generation 2 of 2: 10 programs" in said
    archive = json.loads((tmp_path / "found" / "archive.json").read_text())
    assert archive["evaluated"] == 10
    assert all(each["program"] in said for each in archive["front"])
    assert all(name in said for name in ("softmax", "elu + 1", "values", "attnzero_105"))
    assert main([*words, "--generations", "2", "--output_dir", str(tmp_path / "found")]) == 0
    assert capsys.readouterr().out == said
    assert main([*words, "--generations", "2", "--at_random", "--output_dir", str(tmp_path / "found")]) == 2
    out = tmp_path / "found"
    assert (
        f"{out} has a search with at_random False, not True; take another --output_dir"
        in capsys.readouterr().err
    )
    assert main([*words, "--population", "6", "--output_dir", str(out)]) == 2
    assert "has a search with population 5, not 6" in capsys.readouterr().err
    (out / "settings.json").write_text('{"seed"')
    assert main([*words, "--generations", "2", "--output_dir", str(out)]) == 2
    assert "settings.json is not readable" in capsys.readouterr().err


def test_a_search_goes_on_with_the_same_teacher_alone(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*words, "--generations", "1", "--output_dir", str(tmp_path / "found")]
    assert main(words) == 0
    path = tmp_path / "teacher" / "model.safetensors"
    tensors = load_file(path)
    tensors["blocks.0.attn.qkv.weight"][0, 0] += 1e-3
    save_file(tensors, path)
    assert main(words) == 2
    assert "other recorded layers: the weights or the images have changed" in capsys.readouterr().err


def test_a_search_names_the_images_that_there_are(words: list[str], tmp_path: Path) -> None:
    folder, out = tmp_path / "photos", tmp_path / "found"
    for name in range(6):
        (folder / "train" / "one").mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), 40 * name).save(folder / "train" / "one" / f"{name}.png")
    words = [*words[:3], "--data_path", str(folder), *words[5:], "--images", "4000"]
    assert main([*words, "--generations", "1", "--output_dir", str(out)]) == 0
    assert json.loads((out / "settings.json").read_text())["images"] == f"6 of {folder}"


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_search_killed_three_times_ends_in_the_same_archive(
    words: list[str], tmp_path: Path, workers: str
) -> None:
    """Two processes end in the archive of one."""
    assert main([*words, "--generations", "4", "--output_dir", str(tmp_path / "whole")]) == 0
    out = tmp_path / "killed"
    code = "import sys; from graftvit.launch.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [
        sys.executable,
        "-c",
        code,
        *words,
        "--generations",
        "4",
        "--workers",
        workers,
        "--output_dir",
        str(out),
    ]
    for records in (3, 8, 14):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and len(list(out.glob("cells/*/cell.json"))) < records:
                time.sleep(0.02)
            process.kill()
        assert not (out / ARCHIVE).exists()
    assert subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == 0
    assert (out / ARCHIVE).read_bytes() == (tmp_path / "whole" / ARCHIVE).read_bytes()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            ["teacher", "--output_dir", "x"],
            "a search needs images: give --data_path FOLDER, or --dataset digits",
        ),
        (
            ["teacher", "--output_dir", "x", "--dataset", "digits", "--population", "0"],
            "--population: give a whole number, 1 or more",
        ),
        (["teacher", "--dataset", "digits"], "--output_dir"),
        (["report", "gone"], "gone has no search: give the --output_dir"),
        (
            ["teacher", "--output_dir", "x", "--dataset", "digits", "--workers", "0"],
            "--workers: give a whole number",
        ),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["programs", "search", *words]) == 2
    assert reason in capsys.readouterr().err
