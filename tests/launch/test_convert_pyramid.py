"""`graftvit convert` on pyramids, as typed; and what the other commands say of them."""

from __future__ import annotations

import json
import warnings
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
from graftvit.models.merges import merge_layers
from support.models.pyramids import TINY, arguments, images, tiny
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


def write_swin(tmp_path: Path, size: tuple[int, int]) -> Path:
    model = tiny("swin", size, num_classes=10)
    how = {"architecture": TINY["swin"][0], "model_args": arguments("swin", size, num_classes=10)}
    shown = Preprocessing.of(model, input_size=(3, *size))
    write_student(model, tmp_path / "teacher", **how, preprocessing=shown)
    return tmp_path / "teacher"


def logits(model: nn.Module, size: tuple[int, int] = SIZE) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images(size))  # type: ignore[no-any-return]


def test_a_folder_of_a_converted_pyramid(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plan = tmp_path / "out", "stage1: none; stage2.0: linear; stage2.1: softmax; merge: deformable"
    words = ["--output_dir", str(out), "--without", "bias", "--calibrate", "4", "--dataset", "digits"]
    assert main(["convert", str(teacher), "--plan", plan, *words]) == 0
    said = capsys.readouterr().out
    assert "images of 32x32: stages of 8x8, 4x4 tokens" in said
    feature = f"--mode transfer --method feature --student.model local-dir:{out}"
    assert f"recover it: graftvit train {feature} --teacher.source {teacher} --data_path FOLDER\n" in said
    merges = sum(
        parameter.numel() for each in merge_layers(graftvit.load(str(out))) for parameter in each.parameters()
    )
    (row,) = [line.split() for line in said.splitlines() if line.startswith("merge ")]
    assert row == ["merge", "1", ">", "2", "deformable", f"{merges:,}", "-", "-", "fresh"]
    assert f"{merges:,} of them new" in said, "linear attention and softmax have no parameters"
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


def test_the_command_that_recovers_trains_what_is_new(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Merges are new, and only a stage that runs the whole student trains them."""
    source, out, trained = write_swin(tmp_path, SIZE), tmp_path / "out", tmp_path / "trained"
    plan = "stage1: none; stage2: softmax; merge: deformable"
    assert main(["convert", str(source), "--plan", plan, "--output_dir", str(out)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("recover it: ")]
    words = (
        line.removeprefix("recover it: graftvit ").replace("--data_path FOLDER", "--dataset digits").split()
    )
    settings = "--max_steps 1 --warmup_epochs 0 --lr 0.1 --batch_size 4 --workers 0 --train_samples 8"
    assert main([*words, *settings.split(), "--output_dir", str(trained)]) == 0
    assert "lr 0.1 (as given), 1 steps" in caplog.text
    (before,), (after,) = (merge_layers(graftvit.load(str(each))) for each in (out, trained))
    assert all(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_deformable_merges_of_an_odd_grid_are_told_and_recovered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """36 x 36 pixels have 9 x 9 patches, of which timm's merge makes 5 x 5 and a deformable one 4 x 4."""
    source, out = write_swin(tmp_path, (36, 36)), tmp_path / "out"
    words = ["convert", str(source), "--plan", "stage2: softmax; merge: deformable", "--output_dir", str(out)]
    assert main([*words, "--calibrate", "2", "--dataset", "digits"]) == 2
    why = "stage 2 has 4x4 tokens instead of 5x5, because a deformable merge leaves out the last row"
    assert why in capsys.readouterr().err
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "images of 36x36: stages of 9x9, 5x5 tokens\nthe student: stages of 9x9, 4x4 tokens\n" in said
    assert f"warning: {why}" in said
    assert "recover it: graftvit train --mode transfer --method feature" in said
    train = ["train", "--student.model", f"local-dir:{out}", "--teacher", str(source), "--dataset", "digits"]
    assert main([*train, "--mode", "align", "--dry_run", "--output_dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert why in said
    assert "transfer.method=feature" in said
    assert main([*train, "--method", "feature", "--dry_run", "--output_dir", str(tmp_path / "run")]) == 0


def test_resampling_a_bias_prints_no_warnings_of_torch(tmp_path: Path) -> None:
    source = write_swin(tmp_path, SIZE)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert main(["convert", str(source), "--plan", "stage1-2: softmax", "--dry_run"]) == 0
    assert not [
        each for each in found if "sequence" in str(each.message) or "searchsorted" in str(each.message)
    ]


def test_layers_before_an_odd_merge_are_calibrated(tmp_path: Path) -> None:
    source = write_swin(tmp_path, (36, 36))
    words = ["convert", str(source), "--plan", "stage1: softmax; merge: deformable", "--dry_run"]
    assert main([*words, "--calibrate", "2", "--dataset", "digits"]) == 0


def test_one_image_that_leaves_a_merge_one_token_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_swin(tmp_path, (8, 8)), tmp_path / "out"
    assert main(["convert", str(source), "--plan", "merge: deformable", "--output_dir", str(out)]) == 0
    train = (
        f"train --mode finetune --student.model local-dir:{out} --dataset digits --workers 0 --max_steps 1"
    )
    words = [
        *train.split(),
        "--warmup_epochs",
        "0",
        "--train_samples",
        "8",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    assert main([*words, "--batch_size", "1"]) == 2
    assert "needs two tokens or more to train on" in capsys.readouterr().err
    assert main([*words, "--batch_size", "2"]) == 0


@pytest.mark.slow
def test_a_converted_pyramid_is_loaded_at_another_size_saved_and_exported(
    teacher: Path, tmp_path: Path
) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    assert (
        main(
            ["convert", str(teacher), "--plan", "*: linformer", "--output_dir", str(out), "--without", "bias"]
        )
        == 0
    )
    bigger = graftvit.load(str(out), img_size=48)
    assert image_size(bigger) == (48, 48)
    assert logits(bigger, (48, 48)).shape == (2, 3)
    assert main(["checkpoint", "save", str(out), str(again), "--img_size", "48"]) == 0
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
                "--output_dir",
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


def test_giving_up_a_bias_that_the_model_lacks_is_said(
    teacher: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(teacher), "--plan", "stage2: linear", "--without", "bias", "--dry_run"]
    assert main(words) == 0
    name = type(tiny(kind)).__name__
    note = (
        f"note: without=bias gives up nothing, because {name} has no relative position bias: leave it out\n"
    )
    assert (note in capsys.readouterr().out) != kind.startswith("swin")
