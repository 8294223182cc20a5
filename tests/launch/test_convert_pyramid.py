"""`graftvit convert` on pyramids, as typed; and what the other commands say of them."""

from __future__ import annotations

import json
from pathlib import Path

import graftvit
import pytest
import timm
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from graftvit.launch.cli import main
from graftvit.models.conversion import convert, plan_of
from graftvit.models.families import image_size
from pyramids import TINY, arguments, images, tiny
from torch import nn

SIZE = (32, 32)


@pytest.fixture(params=["pvt", "pvt1", "svt", "swin", "swinv2"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def teacher(tmp_path: Path, kind: str) -> Path:
    model = tiny(kind)
    shown = Preprocessing.of(model, input_size=(3, *SIZE), mean=(0.4,) * 3, std=(0.2,) * 3)
    write_student(
        model, tmp_path / "teacher", architecture=TINY[kind][0], model_args=arguments(kind), preprocessing=shown
    )  # fmt: skip
    return tmp_path / "teacher"


def logits(model: nn.Module, size: tuple[int, int] = SIZE) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images(size))  # type: ignore[no-any-return]


def test_a_folder_of_a_converted_pyramid(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plan = tmp_path / "out", "stage1: none; stage2.0: linear; stage2.1: softmax; merge: deformable"
    words = ["--out", str(out), "--without", "bias", "--calibrate", "4", "--dataset", "digits"]
    assert main(["convert", str(teacher), "--plan", plan, *words]) == 0
    said = capsys.readouterr().out
    assert "images of 32x32: stages of 8x8, 4x4 tokens" in said
    assert f"recover it: graftvit train --mode align --student.model local-dir:{out}" in said
    rows = [line.split()[:3] for line in said.splitlines() if line.split()[:1] in (["0"], ["2"])]
    assert rows[0] == ["0", "1", "none"]
    loaded = graftvit.load(str(out))
    expected = convert(graftvit.load(str(teacher)), plan, without=["bias"])
    assert plan_of(loaded) == plan_of(expected) is not None
    drawn = {key: t for key, t in loaded.state_dict().items() if ".dconv." in key}
    expected.load_state_dict(drawn, strict=False)  # merges are new
    assert drawn
    torch.testing.assert_close(logits(loaded), logits(expected))
    config = json.loads((out / "config.json").read_text())
    assert config["model_args"]["img_size"] == list(SIZE)
    again = timm.create_model(f"local-dir:{out}", pretrained=True)
    torch.testing.assert_close(logits(again), logits(loaded))


@pytest.mark.slow
def test_a_converted_pyramid_is_loaded_at_another_size_saved_and_exported(
    teacher: Path, tmp_path: Path
) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    assert (
        main(["convert", str(teacher), "--plan", "*: linformer", "--out", str(out), "--without", "bias"]) == 0
    )
    bigger = graftvit.load(str(out), img_size=48)
    assert image_size(bigger) == (48, 48)
    assert logits(bigger, (48, 48)).shape == (2, 3)
    assert main(["save", str(out), str(again), "--img_size", "48"]) == 0
    assert torch.equal(logits(graftvit.load(str(again)), (48, 48)), logits(bigger, (48, 48)))
    assert main(["export", str(out), str(tmp_path / "model.pt2")]) == 0


def test_converting_again_is_refused_where_parts_are_lost(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert (
        main(
            [
                "convert",
                str(teacher),
                "--plan",
                "stage1: none; stage2: linear",
                "--out",
                str(out),
                "--without",
                "bias",
            ]
        )
        == 0
    )
    assert main(["convert", str(out), "--plan", "stage1: linear", "--dry_run", "--without", "bias"]) == 2
    assert "layer 0 was converted to none and has lost its attention" in capsys.readouterr().err
    assert main(["convert", str(out), "--plan", "stage2: none", "--dry_run"]) == 0
    assert "already converted by 0" in capsys.readouterr().out


def test_a_dry_run_of_a_name_downloads_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["--plan", "stage1: none; stage2: linear", "--dry_run"]
    assert main(["convert", "pvt_v2_b0.in1k", *plan, "--img_size", "256"]) == 0
    said = capsys.readouterr().out
    assert "images of 256x256: stages of 64x64, 32x32, 16x16, 8x8 tokens" in said
    assert "3,666,760 -> " in said
    assert main(["convert", "swin_tiny_patch4_window7_224.ms_in1k", *plan]) == 2
    assert (
        "layer 2 has a relative position bias, which linear does not support; give it up by --without bias"
        in (capsys.readouterr().err)
    )


def test_a_plan_that_changes_nothing_names_what_a_pyramid_can_have(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["convert", "pvt_v2_b0", "--plan", "stage3: linear; 4-5: keep", "--dry_run"]) == 2
    assert "keeps every layer: name an operator or merge: deformable" in capsys.readouterr().err
