"""`graftvit convert`, as typed: plain models, operators that are fitted, and pyramids."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shlex
import signal
import warnings
from pathlib import Path
from typing import Any

import graftvit
import pytest
import timm
import torch
from graftvit.checkpoints.student import FittedLayers
from graftvit.launch.cli import main
from graftvit.models.conversion import convert, plan_of
from graftvit.models.families import image_size
from graftvit.models.merges import merge_layers
from graftvit.models.small import default_cfgs
from safetensors.torch import save_file
from support.files.hostile import ARGUMENTS as SHALLOW
from support.models.pyramids import images, tiny
from support.models.saved import save_pyramid, save_vit
from support.runs.engine_runs import make_teacher
from support.runs.typed import Typed
from torch import nn

FORK = multiprocessing.get_context("fork")
PLAN = "*: linear; 0: softmax"
ARGUMENTS = {**SHALLOW, "depth": 2}


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return save_vit(tmp_path / "teacher", ARGUMENTS, license="cc-by-nc-4.0")


def logits(model: nn.Module, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images(size))  # type: ignore[no-any-return]


def test_of_two_conversions_into_one_folder_the_second_is_refused(
    teacher: Path, tmp_path: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, words = tmp_path / "out", ("convert", teacher, "--output_dir", tmp_path / "out", "--plan")

    def convert_after_another(*arguments: object, **keywords: object) -> object:
        monkeypatch.undo()
        typed(*words, "*: linear")
        return convert(*arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr("graftvit.models.conversion.convert", convert_after_another)
    assert f"{out} already holds a model" in typed(*words, "*: uniform", code=2).err
    assert plan_of(graftvit.load(str(out))) == "*: linear"


def test_a_folder_of_the_converted_model(teacher: Path, tmp_path: Path, typed: Typed) -> None:
    out = tmp_path / "the student"
    said = typed("convert", teacher, "--plan", PLAN, "--output_dir", out).out
    converted = convert(graftvit.load(str(teacher)), PLAN)
    loaded = graftvit.load(str(out))
    assert plan_of(loaded) == plan_of(converted) is not None
    assert torch.equal(logits(loaded), logits(converted))
    lines = [line.split() for line in said.splitlines()]
    assert next(line for line in lines if line[:1] == ["0"])[1] == "softmax"
    assert next(line for line in lines if line[:1] == ["1"])[1] == "linear"
    assert "images of 16x16: 5 tokens, 1 of them prefix tokens" in said
    assert f'graftvit.load("{out}")' in said
    recover = shlex.split(next(line for line in said.splitlines() if line.startswith("recover it: ")))
    assert recover[recover.index("--student.model") + 1] == f"local-dir:{out}"
    assert recover[recover.index("--teacher.source") + 1] == str(teacher)


def test_the_command_that_recovers_reads_a_file_as_it_was_read(tmp_path: Path, typed: Typed) -> None:
    weights, name, how = tmp_path / "model.safetensors", "vit_tiny_patch16_224", json.dumps(ARGUMENTS)
    save_file(timm.create_model(name, **ARGUMENTS).state_dict(), weights)
    read = ["--model", name, "--model_args", how, "--img_size", "24"]
    said = typed("convert", weights, *read, "--plan", PLAN, "--output_dir", tmp_path / "out").out
    recover = shlex.split(next(line for line in said.splitlines() if line.startswith("recover it: ")))
    words = recover[recover.index("train") : recover.index("--data_path")]
    assert words[words.index("--teacher.model") + 1] == name
    assert json.loads(words[words.index("--teacher.model_args") + 1]) == ARGUMENTS
    typed(*words, "--dataset", "digits", "--dry_run", "--output_dir", tmp_path / "run")


def test_the_folder_says_what_it_was_made_from(teacher: Path, tmp_path: Path, typed: Typed) -> None:
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    typed(f"convert {teacher} --plan '{PLAN}' --output_dir {out}")
    config = json.loads((out / "config.json").read_text())
    made = config["graftvit"]
    assert config["pretrained_cfg"]["license"] == made["init"]["license"] == "cc-by-nc-4.0"
    assert config["pretrained_cfg"]["mean"] == [0.4] * 3
    assert made["init"]["source"] == str(teacher)
    assert made["conversion"]["plan"] == config["model_args"]["plan"] == plan_of(graftvit.load(str(out)))
    typed(f"convert {teacher} --plan '{PLAN}' --output_dir {fresh} --weights none")
    config = json.loads((fresh / "config.json").read_text())
    assert "init" not in config["graftvit"]
    assert "license" not in config["pretrained_cfg"], "weights that are not there have no license"


def test_weights_and_seed_change_what_is_written(teacher: Path, tmp_path: Path, typed: Typed) -> None:
    written = {}
    own = {"all": "all", "mlp": "mlp", "none": "none", "again": "none --seed 0", "other": "none --seed 1"}
    for name, words in own.items():
        typed(f"convert {teacher} --plan '{PLAN}' --output_dir {tmp_path / name} --weights {words}")
        written[name] = graftvit.load(str(tmp_path / name)).state_dict()
    first, second = "blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"
    for one, other, key, same in (
        ("all", "mlp", first, True),
        ("all", "mlp", second, False),
        ("all", "none", first, False),
        ("none", "again", second, True),
        ("none", "other", second, False),
    ):
        assert torch.equal(written[one][key], written[other][key]) == same, (one, other, key)


def test_calibration_on_digits(teacher: Path, tmp_path: Path, typed: Typed) -> None:
    out = tmp_path / "out"
    said = typed(f"convert {teacher} --plan '{PLAN}' --output_dir {out} --calibrate 8 --dataset digits").out
    assert "error: of the layer's output against softmax on 8 images of digits" in said
    [row] = [line for line in said.splitlines() if line.split()[:2] == ["1", "linear"]]
    assert 0 < float(row.split()[-2]) < 2
    config = json.loads((out / "config.json").read_text())
    assert config["graftvit"]["conversion"]["calibration"] == "8 images of digits"


def test_a_dry_run_writes_nothing(teacher: Path, tmp_path: Path, typed: Typed) -> None:
    assert "linear" in typed(f"convert {teacher} --plan '{PLAN}' --output_dir {tmp_path}/out --dry-run").out
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_a_timm_name_needs_no_download(typed: Typed) -> None:
    said = typed("convert vit_tiny_patch16_224 --plan '*: linear; 9-11: softmax' --dry_run --img_size 64").out
    assert "images of 64x64: 17 tokens" in said
    operators = [line.split()[1] for line in said.splitlines() if line.strip()[:1].isdigit()]
    assert operators == ["linear"] * 9 + ["softmax"] * 3


@pytest.mark.parametrize("name", default_cfgs)
def test_the_small_models_are_known_by_name(name: str, tmp_path: Path, typed: Typed) -> None:
    tokens = "401 tokens" if name.endswith("_160") else "images of 32x32: 65 tokens"
    assert tokens in typed(f"convert {name} --plan '*: linear' --dry_run").out
    if name == "vit_cifar_nano":
        line = f"train --mode scratch --student.model {name} --dataset digits --dry_run --output_dir {tmp_path}/run"
        assert "converted by '*: linear'" in typed(line, "--student.plan", "*: linear").out


def test_a_converted_source_is_converted_anew(teacher: Path, tmp_path: Path, typed: Typed) -> None:
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    typed(f"convert {teacher} --plan '{PLAN}' --output_dir {first}")
    said = typed(f"convert {first} --plan '0: window' --output_dir {second} --img_size 24").out
    assert "already converted by 0: softmax; 1: linear" in said
    assert "recover it" not in said, "its source is no softmax teacher"
    loaded = graftvit.load(second)
    assert plan_of(loaded) == "0: window; 1: softmax"
    assert loaded(torch.zeros(1, 3, 24, 24)).shape == (1, ARGUMENTS["num_classes"])


def test_a_folder_is_replaced_only_if_asked(teacher: Path, tmp_path: Path, typed: Typed) -> None:
    line, out = f"convert {teacher} --output_dir {tmp_path}/out --plan", str(tmp_path / "out")
    typed(line, PLAN)
    assert "--force" in typed(line, "*: window", code=2).err
    assert plan_of(graftvit.load(out)) == "0: softmax; 1: linear"
    typed(line, "*: window", "--force")
    assert plan_of(graftvit.load(out)) == "*: window"


DIGITS = ("--calibrate", "6", "--dataset", "digits")


@pytest.fixture
def digits_teacher(tmp_path: Path) -> str:
    return str(make_teacher(tmp_path / "teacher"))


def test_the_table_has_the_fit_of_each_layer(digits_teacher: str, tmp_path: Path, typed: Typed) -> None:
    out = tmp_path / "out"
    plan = "*: hash(anchors=7); 0: softmax"
    said = typed("convert", digits_teacher, "--plan", plan, "--output_dir", out, *DIGITS).out
    assert "fit of layer 1: objective " in said
    assert "fit of layer 0" not in said
    assert graftvit.load(str(out))(torch.zeros(1, 1, 8, 8)).isfinite().all()
    assert not (out / "fit").exists()


def test_an_error_that_calibration_did_not_change_is_one_number(digits_teacher: str, typed: Typed) -> None:
    """A fitted operator cannot run before its fit, and most others have nothing to calibrate."""
    plan = "0: hash(anchors=7); 1: hedgehog"
    said = typed("convert", digits_teacher, "--plan", plan, "--dry_run", *DIGITS).out
    rows = {line.split()[1]: line for line in said.splitlines() if line.endswith("  copied")}
    for row in rows.values():
        before, arrow, after = re.fullmatch(r".* %  (?:(\d\.\d{3}) (->) )?(\d\.\d{3}) *copied", row).groups()  # type: ignore[union-attr]
        assert (arrow is not None) == (row is rows["hedgehog"])
        assert before is None or before > after
    assert (
        "error: of the layer's output against softmax on 6 images of digits, before -> after calibration"
        in said
    )
    assert "one number where calibration changed nothing" in said


def test_a_killed_conversion_gives_the_same_bits(
    digits_teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = FittedLayers.save

    def save_and_die(*given: Any) -> None:
        save(*given)
        os.kill(os.getpid(), signal.SIGKILL)

    words = ["convert", digits_teacher, "--plan", "*: hash(anchors=7)", *DIGITS, "--seed", "3"]
    assert main([*words, "--output_dir", str(tmp_path / "whole")]) == 0
    killed = tmp_path / "killed"
    for finished in (1, 2):
        with monkeypatch.context() as patched:
            patched.setattr(FittedLayers, "save", save_and_die)
            process = FORK.Process(target=main, args=([*words, "--output_dir", str(killed)],))
            process.start()
            process.join()
        assert process.exitcode == -signal.SIGKILL
        assert len(list((killed / "fit").glob("layer*.safetensors"))) == finished
    assert main([*words, "--output_dir", str(killed)]) == 0
    assert not (killed / "fit").exists()
    assert (killed / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


SIZE = (32, 32)


@pytest.fixture(params=["pvt", "pvt1", "svt", "swin", "swinv2"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pyramid(tmp_path: Path, kind: str) -> Path:
    save_pyramid(tmp_path / "teacher", kind)
    return tmp_path / "teacher"


def write_swin(tmp_path: Path, size: tuple[int, int]) -> Path:
    save_pyramid(tmp_path / "teacher", "swin", size=size, num_classes=10)
    return tmp_path / "teacher"


def test_a_folder_of_a_converted_pyramid(pyramid: Path, tmp_path: Path, typed: Typed) -> None:
    out, plan = tmp_path / "out", "stage1: none; stage2.0: linear; stage2.1: softmax; merge: deformable"
    words = ["--output_dir", str(out), "--without", "bias", "--calibrate", "4", "--dataset", "digits"]
    said = typed("convert", pyramid, "--plan", plan, *words).out
    assert "images of 32x32: stages of 8x8, 4x4 tokens" in said
    feature = f"--mode transfer --method feature --student.model local-dir:{out}"
    images = f"--data_path FOLDER --output_dir {out}-recovered"
    assert f"recover it: graftvit train {feature} --teacher.source {pyramid} {images}\n" in said
    merges = sum(
        parameter.numel() for each in merge_layers(graftvit.load(str(out))) for parameter in each.parameters()
    )
    (row,) = [line.split() for line in said.splitlines() if line.startswith("merge ")]
    assert row == ["merge", "1", ">", "2", "deformable", f"{merges:,}", "-", "-", "fresh"]
    assert f"{merges:,} of them new" in said, "linear attention and softmax have no parameters"
    rows = [line.split()[:3] for line in said.splitlines() if line.split()[:1] in (["0"], ["2"])]
    assert rows[0] == ["0", "1", "none"]
    loaded = graftvit.load(str(out))
    expected = convert(graftvit.load(str(pyramid)), plan, without=["bias"])
    assert plan_of(loaded) == plan_of(expected) is not None
    drawn = {key: t for key, t in loaded.state_dict().items() if ".dconv." in key}
    expected.load_state_dict(drawn, strict=False)  # merges are new
    assert drawn
    torch.testing.assert_close(logits(loaded, SIZE), logits(expected, SIZE))
    config = json.loads((out / "config.json").read_text())
    assert config["model_args"]["img_size"] == list(SIZE)
    again = timm.create_model(f"local-dir:{out}", pretrained=True)
    torch.testing.assert_close(logits(again, SIZE), logits(loaded, SIZE))


def test_the_command_that_recovers_trains_what_is_new(
    tmp_path: Path, typed: Typed, caplog: pytest.LogCaptureFixture
) -> None:
    """Merges are new, and only a stage that runs the whole student trains them."""
    source, out = write_swin(tmp_path, SIZE), tmp_path / "out"
    trained = tmp_path / "out-recovered"
    plan = "stage1: none; stage2: softmax; merge: deformable"
    (line,) = [
        line
        for line in typed(f"convert {source} --plan '{plan}' --output_dir {out}").out.splitlines()
        if line.startswith("recover it: ")
    ]
    words = (
        line.removeprefix("recover it: graftvit ").replace("--data_path FOLDER", "--dataset digits").split()
    )
    settings = "--max_steps 1 --warmup_epochs 0 --lr 0.1 --batch_size 4 --workers 0 --train_samples 8"
    typed(*words, *settings.split())
    assert "lr 0.1 (as given), 1 steps" in caplog.text
    (before,), (after,) = (merge_layers(graftvit.load(str(each))) for each in (out, trained))
    assert all(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_deformable_merges_of_an_odd_grid_are_told_and_recovered(tmp_path: Path, typed: Typed) -> None:
    """36 x 36 pixels have 9 x 9 patches, of which timm's merge makes 5 x 5 and a deformable one 4 x 4."""
    source, out = write_swin(tmp_path, (36, 36)), tmp_path / "out"
    words = ["convert", str(source), "--plan", "stage2: softmax; merge: deformable", "--output_dir", str(out)]
    said = typed(*words, "--calibrate", "2", "--dataset", "digits", code=2)
    why = "stage 2 has 4x4 tokens instead of 5x5, because a deformable merge leaves out the last row"
    assert why in said.err
    said = typed(*words).out
    assert "images of 36x36: stages of 9x9, 5x5 tokens\nthe student: stages of 9x9, 4x4 tokens\n" in said
    assert f"warning: {why}" in said
    assert "recover it: graftvit train --mode transfer --method feature" in said
    train = ["train", "--student.model", f"local-dir:{out}", "--teacher", str(source), "--dataset", "digits"]
    said = typed(*train, "--mode", "align", "--dry_run", "--output_dir", tmp_path / "run", code=2).err
    assert why in said
    assert "transfer.method=feature" in said
    typed(*train, "--method", "feature", "--dry_run", "--output_dir", tmp_path / "run")


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


def test_one_image_that_leaves_a_merge_one_token_is_refused(tmp_path: Path, typed: Typed) -> None:
    source, out = write_swin(tmp_path, (8, 8)), tmp_path / "out"
    typed(f"convert {source} --plan 'merge: deformable' --output_dir {out}")
    train = (
        f"train --mode finetune --student.model local-dir:{out} --dataset digits --workers 0 --max_steps 1"
    )
    train += f" --warmup_epochs 0 --train_samples 8 --output_dir {tmp_path}/run"
    assert "needs two tokens or more to train on" in typed(f"{train} --batch_size 1", code=2).err
    typed(f"{train} --batch_size 2")


def test_a_converted_pyramid_is_loaded_and_saved_at_another_size(pyramid: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    assert (
        main(
            ["convert", str(pyramid), "--plan", "*: linformer", "--output_dir", str(out), "--without", "bias"]
        )
        == 0
    )
    bigger = graftvit.load(str(out), img_size=48)
    assert image_size(bigger) == (48, 48)
    assert logits(bigger, (48, 48)).shape == (2, 3)
    assert main(["checkpoint", "save", str(out), str(again), "--img_size", "48"]) == 0
    assert torch.equal(logits(graftvit.load(str(again)), (48, 48)), logits(bigger, (48, 48)))


def test_converting_again_is_refused_where_parts_are_lost(
    pyramid: Path, tmp_path: Path, typed: Typed
) -> None:
    out = tmp_path / "out"
    typed(f"convert {pyramid} --plan 'stage1: none; stage2: linear' --output_dir {out} --without bias")
    said = typed(f"convert {out} --plan 'stage1: linear' --dry_run --without bias", code=2).err
    assert "layer 0 was converted to none and has lost its attention" in said
    assert "already converted by 0" in typed(f"convert {out} --plan 'stage2: none' --dry_run").out


def test_a_dry_run_of_a_name_downloads_nothing(typed: Typed) -> None:
    plan = "--plan 'stage1: none; stage2: linear' --dry_run"
    said = typed(f"convert pvt_v2_b0.in1k {plan} --img_size 256").out
    assert "images of 256x256: stages of 64x64, 32x32, 16x16, 8x8 tokens" in said
    assert "3,666,760 -> " in said
    said = typed(f"convert swin_tiny_patch4_window7_224.ms_in1k {plan}", code=2).err
    assert "layer 2 has a relative position bias, which linear does not support" in said
    assert "--without bias" in said


def test_giving_up_a_bias_that_the_model_lacks_is_said(pyramid: Path, kind: str, typed: Typed) -> None:
    said = typed(f"convert {pyramid} --plan 'stage2: linear' --without bias --dry_run").out
    note = f"note: without=bias gives up nothing, because {type(tiny(kind)).__name__} has no relative position bias"
    assert (note in said) != kind.startswith("swin")
