"""`python -m benchmarks.real_transfer`: its cells on a tiny teacher, killed and resumed, its table, its page."""

from __future__ import annotations

import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from graftvit import save

from benchmarks import real_transfer as benchmark

ROOT = Path(__file__).resolve().parent.parent
Cell, Outcome = benchmark.Cell, benchmark.Outcome


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A study of a teacher of two layers and two heads, on images of noise."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    save(
        timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=42, **sizes),
        tmp_path / "teacher",
    )
    monkeypatch.setitem(benchmark.STUDENTS, "small", {"embed_dim": 12, "depth": 1, "num_heads": 1})
    monkeypatch.setattr(benchmark, "BATCH", 8)
    data = benchmark.first_images(noise(tmp_path / "all"), tmp_path / "data", 20)
    return benchmark.Study(tmp_path / "teacher", data, tmp_path / "out", steps=2, side=28)


def noise(root: Path) -> Path:
    """Write 120 training and 30 test images of 28 pixels as the data set's files."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 120), ("t10k", 30)):
        pixels = torch.randint(256, (count * 28 * 28,), dtype=torch.uint8).numpy().tobytes()
        labels = bytes(place % 10 for place in range(count))
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, count, 28, 28) + pixels)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, count) + labels)
    return root


def test_the_first_test_images_are_kept(study: Any, tmp_path: Path) -> None:
    from torchvision.datasets import FashionMNIST

    kept, all_of_them = (FashionMNIST(str(tmp_path / name), train=False) for name in ("data", "all"))
    assert (len(kept), len(all_of_them), len(FashionMNIST(str(study.data)))) == (20, 30, 120)
    assert torch.equal(kept.data, all_of_them.data[:20])
    assert torch.equal(kept.targets, all_of_them.targets[:20])


def test_a_killed_study_is_resumed(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cell, again = (Cell("small", "distill mean", 10, 0, rate) for rate in (1e-3, 2e-3))
    first = study.top1(cell)
    assert not (study.out / "runs" / cell.name / "checkpoints").exists()
    with monkeypatch.context() as killed:
        killed.setattr(benchmark, "save", interrupt)  # after the run, before its result is written
        with pytest.raises(KeyboardInterrupt):
            study.top1(again)
    second = study.top1(again)
    monkeypatch.setattr(benchmark, "run", interrupt)
    assert [study.top1(cell), study.top1(again)] == [first, second]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_every_cell_runs(study: Any) -> None:
    cells = [cell for cell in benchmark.cells(benchmark.STUDENTS, [10], [0]) if cell.method != "scratch"]
    for cell in cells:
        study.top1(Cell(cell.student, cell.method, 10, 0, 1e-3))
    assert len(benchmark.load(study.file)) == 9
    shutil.rmtree(study.out)


def test_cells_begin_with_few_labels_and_end_seeds_together() -> None:
    cells = list(benchmark.cells(["small", "same"], benchmark.LABELS, benchmark.SEEDS))
    assert len(set(cells)) == 3 * 3 * (6 + 5)
    assert {(cell.student, cell.labels, cell.seed) for cell in cells[:4]} == {("small", 10, 0)}
    assert {cell.labels for cell in cells[:33]} == {10}


def test_the_best_rate_of_the_sweep_is_taken(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def top1(_: Any, cell: Any) -> float:
        asked.append(cell)
        return {2.5e-4: 50.0, 5e-4: 60.0, 1e-3: 55.0, 1e-4: 2.0, 3e-4: 3.0}[cell.rate]

    monkeypatch.setattr(benchmark.Study, "top1", top1)
    assert study.rate("copy mean") == study.rate("scratch") == 5e-4
    assert study.rate("finetune") == 3e-4
    assert {cell.seed for cell in asked}.isdisjoint(benchmark.SEEDS)


def test_gains_are_within_seeds_and_bold_beyond_three_standard_errors() -> None:
    tops = {"scratch": (50.0, 60.0, 55.0), "distill mean": (52.0, 62.2, 56.9), "feature": (55.0, 58.0, 56.0)}
    outcomes = [
        Outcome(Cell("small", method, 10, seed, 1e-3), top1)
        for method, each in tops.items()
        for seed, top1 in enumerate(each)
    ]
    assert benchmark.columns(outcomes, "small", "distill mean", 10) == ("57.0 %", "**+2.0 ± 0.1**")
    assert benchmark.columns(outcomes, "small", "feature", 10) == ("56.3 %", "+1.3 ± 2.0")
    assert benchmark.columns(outcomes, "small", "scratch", 10) == ("55.0 %", "")
    assert benchmark.columns(outcomes[:5], "small", "distill mean", 10) == ("57.1 % (seeds: 2)", "+2.1 ± 0.1")
    assert benchmark.columns(outcomes, "same", "copy", 10) == ("", "")


def test_the_mean_gain_is_of_seeds_that_have_every_number_of_labels() -> None:
    tops = {10: {"scratch": (50, 60, 55), "copy": (52, 66, 55)}, 40: {"scratch": (70, 70), "copy": (74, 72)}}
    outcomes = [
        Outcome(Cell("same", method, count, seed, 1e-3), top1)
        for count, methods in tops.items()
        for method, each in methods.items()
        for seed, top1 in enumerate(each)
    ]
    assert benchmark.gains(outcomes, "same", "copy", [10, 40]) == [3, 4]
    assert benchmark.gains(outcomes, "same", "copy", [10]) == [2, 6, 0]
    assert benchmark.mean_gain([3, 4]) == "+3.5 ± 0.5"


def test_results_of_two_kernels_are_compared() -> None:
    found = benchmark.load(benchmark.RESULTS)
    first = next(each for each in found if each.cell.seed == 0)
    moved = replace(first, top1=first.top1 + 3)
    others = [moved if each is first else each for each in found]
    rows = [line.split(" | ") for line in benchmark.kernel_table(found, others).splitlines()[2:]]
    apart = {(row[0].strip("| "), row[1]): row[-2:] for row in rows}
    assert apart.pop((moved.cell.student, moved.cell.method)) == ["1.0", "3.0 |"]
    assert all(each == ["0.0", "0.0 |"] for each in apart.values())


def test_the_page_has_the_table_of_the_results() -> None:
    page = (ROOT / "docs" / "real.md").read_text()
    found = benchmark.load(benchmark.RESULTS)
    assert f"<!-- transfer -->\n{benchmark.table(found)}\n<!-- end -->" in page
    assert {each.cell.method for each in found} >= {"scratch", "copy mean", "distill mean", "feature"}
