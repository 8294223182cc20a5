"""What a run or a command writes follows the user's umask: a group that may read the folder can read the weights."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from graftvit.checkpoints.atomic import write_file, write_folder
from graftvit.launch.cli import main
from graftvit.transfer.engine.train import train
from PIL import Image
from safetensors.torch import save_file
from support.runs.engine_runs import config, make_teacher


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, str]:
    """The permissions of a folder and of all that is in it."""
    return {str(path.relative_to(folder)): oct(path.stat().st_mode & 0o777) for path in folder.rglob("*")}


def wanted(folder: Path, umask: int) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): oct((0o777 if path.is_dir() else 0o666) & ~umask)
        for path in folder.rglob("*")
    }


def test_files_that_a_library_keeps_to_its_user_are_opened(tmp_path: Path, umask: int) -> None:
    def fill(folder: Path) -> None:
        save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
        inner = Path(tempfile.mkdtemp(dir=folder))
        (inner / "config.json").write_text("{}")
        (inner / "config.json").chmod(0o600)

    write_folder(tmp_path / "student", fill, size=8)
    write_file(
        tmp_path / "deep" / "a.safetensors", lambda path: save_file({"a": torch.zeros(2)}, path), size=8
    )
    assert modes(tmp_path) == wanted(tmp_path, umask)


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o027], indirect=True)
def test_all_that_a_run_and_the_commands_write(tmp_path: Path, umask: int) -> None:
    run, image = tmp_path / "run", tmp_path / "image.png"
    Image.new("L", (8, 8), 99).save(image)
    teacher = make_teacher(tmp_path / "teacher")
    train(config(run, teacher, optim={"max_steps": 2}, engine={"trackers": ["tensorboard"]}))
    for words in (
        ["checkpoint", "save", f"{run}#ema", str(tmp_path / "saved")],
        [
            "convert",
            f"local-dir:{teacher}",
            "--plan",
            "*: linear",
            "--output_dir",
            str(tmp_path / "converted"),
        ],
        ["export", str(run), str(tmp_path / "graph.pt2")],
        ["visualize", str(run), str(image), "--output_dir", str(tmp_path / "seen")],
        ["evaluate", str(run), "--workers", "0", "--json", str(tmp_path / "scores.json")],
        [
            "checkpoint",
            "strip",
            str(run / "checkpoints" / "last.safetensors"),
            str(tmp_path / "plain.safetensors"),
        ],
    ):
        assert main(words) == 0
    assert modes(tmp_path) == wanted(tmp_path, umask)
