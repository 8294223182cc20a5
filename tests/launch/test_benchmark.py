"""`graftvit benchmark`, as typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.runs.engine_runs import make_teacher
from support.runs.typed import Typed


def test_operators_are_measured_and_the_second_time_kept(tmp_path: Path, typed: Typed) -> None:
    line = "benchmark operators --heads 1 --head_dim 8 --repeats 2 --tokens 16 36 --batch 1 2"
    words = ["--operators", "kernel(feature=relu)", "ttt", "--output_dir", tmp_path / "new"]
    shown = typed(line, *words)
    assert "| kernel(feature=relu) |" in shown.out
    assert "[8/8] ttt, 36 tokens, batch 2" in shown.err
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "latency.png", "results.csv", "results.json", "table.md",
    ]  # fmt: skip
    assert "8 of 8 cells are done" in typed(line, *words).err


def test_operators_and_models_go_to_a_folder_each(
    tmp_path: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    typed("benchmark operators --operators linear --heads 1 --head_dim 8 --repeats 2 --tokens 16 --batch 1")
    typed("benchmark models vit_tiny_patch16_224 --plan '*: linear' --img_size 32 --batch 1 --repeats 2")
    assert sorted(path.name for path in (tmp_path / "benchmark").iterdir()) == ["models", "operators"]


def test_models_are_measured(tmp_path: Path, typed: Typed) -> None:
    words = ["--plan", "*: linear", "0: kernel(feature=relu)"]
    line = (
        f"benchmark models vit_tiny_patch16_224 --img_size 32 --batch 2 --repeats 2 --output_dir {tmp_path}"
    )
    assert "| 0: kernel(feature=relu) |" in typed(line, *words).out


def test_neither_batch_one_nor_224_pixels_alone_is_the_default(typed: Typed) -> None:
    assert "batch sizes (default: 1 16)" in " ".join(typed("benchmark", "models", "--help").out.split())
    shown = " ".join(typed("benchmark", "operators", "--help").out.split())
    assert "batch sizes (default: 1 8)" in shown
    assert "(default: 64 196 576 1024 2304 4096)" in shown
    assert "examples: graftvit benchmark operators" in shown


EcoFormer = "stage1: hash; stage2: hash; stage3: hash"


def cells(out: str) -> list[list[str]]:
    lines = [line for line in out.splitlines() if "| --" not in line]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_published_row_of_pvt(typed: Typed) -> None:
    words = ["pvt_v2_b0", "--plan", EcoFormer, "--accounting", "published"]
    _, first, second = cells(typed("benchmark", "energy", *words).out.strip())
    assert first[:2] == ["pvt_v2_b0", "as it is"]
    assert second[1:4] == [EcoFormer, "0.53539", "0.56479"]
    assert second[5] == "2.4893"


def test_prices_accounting_and_size_change_the_numbers(tmp_path: Path, typed: Typed) -> None:
    source = f"local-dir:{make_teacher(tmp_path / 'teacher')}"
    changes = {
        "": "",
        "energy": "--multiplication_pj 1 --addition_pj 1",
        "area": "--multiplication_area 1e6 --addition_area 1e6",
        "published": "--accounting published",
        "size": "--img_size 16",
    }
    rows = {
        name: cells(typed(f"benchmark energy {source} {words}").out.strip())[1]
        for name, words in changes.items()
    }
    assert rows["energy"][:5] == rows["area"][:5] == rows[""][:5]
    assert rows["energy"][6] == rows[""][6]
    assert rows["area"][5] == rows[""][5]
    assert rows["area"][6] != rows[""][6]
    assert rows["size"][4] != rows[""][4]
    assert rows["published"] != rows[""]
