"""docs/real.md shows the results of `python -m benchmarks.real_conversion`, which a stop does not change."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from PIL import Image

from benchmarks import real_conversion as study

PAGE = Path(__file__).resolve().parent.parent / "docs" / "real.md"
SMALL = study.Settings(
    operators=("linear", "performer"), size=28, large=56, best=1, seeds=(0,), layers=(0, 1),
    align=study.Training(2, 1e-3), match=study.Training(1, 1e-4), batch=4, unlabeled=6, train=10, test=10, crops=4,
    few=2, rounds=2, precision="fp32",
)  # fmt: skip


def test_the_page_has_the_tables_of_the_results() -> None:
    tables = study.tables(json.loads(study.RESULTS.read_text()))
    assert f"<!-- conversion -->\n{tables}\n<!-- end -->" in PAGE.read_text()


def test_results_of_two_kernels_are_compared() -> None:
    cells = json.loads(study.RESULTS.read_text())["cells"]
    others = copy.deepcopy(cells)
    for key, cell in others.items():
        if key.endswith("/converted/linear"):
            cell["garments"]["cosine"] -= 0.25
    zero_shot = study.kernel_table(cells, others, study.Settings()).rows[0]
    assert zero_shot[1] == f"{0.25 / len(study.Settings().operators):.3f} / 0.250"
    assert set(zero_shot[2:-1]) == {"0.000 / 0.000", "0.0 / 0.0"}
    assert zero_shot[-1] == "35 of 36", "a quarter is far beyond the seeds"


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Any]:
    """Return what makes a study of a tiny teacher, with garments and crops of noise, and its journal."""
    random = np.random.default_rng(0)
    teacher, fashion = write_teacher(tmp_path / "teacher"), write_garments(tmp_path / "fashion", random)
    crops = write_crops(tmp_path / "crops", random)
    monkeypatch.setattr(study, "make_crops", lambda root: crops)

    def start(name: str, settings: Any = SMALL) -> Any:
        out = tmp_path / name
        journal = study.Journal(settings, out / "found.json", out / "copy.json")
        return study.Study(teacher, fashion, out, settings, journal, out / "pictures")

    return start


def write_teacher(folder: Path) -> Path:
    own = {"img_size": 42, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_dinov2", **own)
    for block in model.blocks:
        block.ls1.gamma.data.fill_(1.0)  # new ones nearly leave attention out
    spec = Preprocessing.of(model, mean=(0.5,) * 3, std=(0.5,) * 3)
    write_student(model, folder, architecture="vit_small_patch14_dinov2", model_args=own, preprocessing=spec)
    return folder


def write_garments(root: Path, random: np.random.Generator) -> Path:
    """Write twenty images of each split in the format of Fashion-MNIST."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        images, labels = random.integers(0, 256, (20, 28, 28)), np.arange(20) % 10
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            head = np.array([0x800 + values.ndim, *values.shape], dtype=">i4").tobytes()
            (raw / f"{split}-{name}-ubyte").write_bytes(head + values.astype(np.uint8).tobytes())
    return root


def write_crops(root: Path, random: np.random.Generator) -> Path:
    for split, name in (("train", "cat"), ("validation", "rocket"), ("validation", "camera")):
        (root / split / name).mkdir(parents=True)
        for place in range(4):
            pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / name / f"{place:02d}.png")
    return root


@pytest.mark.slow
def test_a_study_that_was_stopped_resumes_cell_by_cell(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    numbers = study.SeedCells.numbers

    def stopping(cells: Any, model: Any) -> Any:
        if len(measured) == 5:
            measured.append("stop")
            raise KeyboardInterrupt
        measured.append(type(model).__name__)
        return numbers(cells, model)

    monkeypatch.setattr(study.SeedCells, "numbers", stopping)
    with pytest.raises(KeyboardInterrupt):
        make("stopped").run()
    started = make("stopped")
    assert len(started.journal.cells) == 5 + 2  # and the costs at both sizes
    started.run()
    assert measured.count("stop") == 1
    assert len(measured) == 1 + 2 + 3 * len(SMALL.operators)
    whole = make("whole")
    whole.run()
    resumed, other = (
        {key: cell for key, cell in each.journal.cells.items() if "cost" not in key}
        for each in (started, whole)
    )
    assert resumed == other
    best = [key.rpartition("/")[2] for key in resumed if "/large/" in key]
    assert len(best) == SMALL.best
    assert (started.out / "found.json").read_text() == (started.out / "copy.json").read_text()
    assert {each.name for each in started.pictures.iterdir()} == {"real_converted.png", "real_aligned.png"}
    table = study.tables(json.loads((started.out / "copy.json").read_text()), SMALL)
    assert all(table.count(f"| {name} |") == 5 + (name in best) for name in SMALL.operators)


def test_numbers_of_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    study.Journal(SMALL, path).known("0/teacher", lambda: {"kNN": 1.0})
    assert study.Journal(SMALL, path).cells == {"0/teacher": {"kNN": 1.0}}
    with pytest.raises(SystemExit, match=str(path)):
        study.Journal(study.Settings(), path)
