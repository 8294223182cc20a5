"""`graftvit convert`, as typed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import graftvit
import pytest
import timm
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from graftvit.launch.cli import main
from graftvit.models.conversion import convert, plan_of
from graftvit.models.small import default_cfgs
from support.files.hostile import ARCHITECTURE
from support.files.hostile import ARGUMENTS as SHALLOW
from torch import nn

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PLAN = "*: linear; 0: softmax"
ARGUMENTS = {**SHALLOW, "depth": 2}


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = timm.create_model(ARCHITECTURE, **ARGUMENTS)
    images = Preprocessing.of(model, mean=(0.4,) * 3, std=(0.2,) * 3)
    write_student(
        model, tmp_path / "teacher", architecture=ARCHITECTURE, model_args=ARGUMENTS, preprocessing=images,
        license="cc-by-nc-4.0",
    )  # fmt: skip
    return tmp_path / "teacher"


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IMAGES)  # type: ignore[no-any-return]


def test_a_folder_of_the_converted_model(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "the student"
    assert main(["convert", str(teacher), "--plan", PLAN, "--output_dir", str(out)]) == 0
    said = capsys.readouterr().out
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


def test_the_folder_says_what_it_was_made_from(teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(teacher), "--plan", PLAN, "--output_dir", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    made = config["graftvit"]
    assert config["pretrained_cfg"]["license"] == made["init"]["license"] == "cc-by-nc-4.0"
    assert config["pretrained_cfg"]["mean"] == [0.4] * 3
    assert made["init"]["source"] == str(teacher)
    assert made["conversion"]["plan"] == config["model_args"]["plan"] == plan_of(graftvit.load(str(out)))
    fresh = tmp_path / "fresh"
    assert (
        main(["convert", str(teacher), "--plan", PLAN, "--output_dir", str(fresh), "--weights", "none"]) == 0
    )
    config = json.loads((fresh / "config.json").read_text())
    assert "init" not in config["graftvit"]
    assert "license" not in config["pretrained_cfg"], "weights that are not there have no license"


def test_weights_and_seed_change_what_is_written(teacher: Path, tmp_path: Path) -> None:
    written = {}
    for name, words in {
        "all": [],
        "mlp": [],
        "none": [],
        "again": ["--seed", "0"],
        "other": ["--seed", "1"],
    }.items():
        weights = name if name in ("all", "mlp", "none") else "none"
        out = str(tmp_path / name)
        assert (
            main(["convert", str(teacher), "--plan", PLAN, "--output_dir", out, "--weights", weights, *words])
            == 0
        )
        written[name] = graftvit.load(out).state_dict()
    first, own = "blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"
    assert torch.equal(written["all"][first], written["mlp"][first])
    assert not torch.equal(written["all"][own], written["mlp"][own])
    assert not torch.equal(written["all"][first], written["none"][first])
    assert torch.equal(written["none"][own], written["again"][own])
    assert not torch.equal(written["none"][own], written["other"][own])


def test_calibration_on_digits(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["--output_dir", str(out), "--calibrate", "8", "--dataset", "digits"]
    assert main(["convert", str(teacher), "--plan", PLAN, *words]) == 0
    said = capsys.readouterr().out
    assert "error: of the layer's output against softmax on 8 images of digits" in said
    [row] = [line for line in said.splitlines() if line.split()[:2] == ["1", "linear"]]
    assert 0 < float(row.split()[-2]) < 2
    config = json.loads((out / "config.json").read_text())
    assert config["graftvit"]["conversion"]["calibration"] == "8 images of digits"


def test_a_dry_run_writes_nothing(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(teacher), "--plan", PLAN, "--output_dir", str(out), "--dry-run"]) == 0
    assert "linear" in capsys.readouterr().out
    assert not out.exists()


def test_a_dry_run_of_a_timm_name_needs_no_download(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["vit_tiny_patch16_224", "--plan", "*: linear; 9-11: softmax", "--dry_run", "--img_size", "64"]
    assert main(["convert", *words]) == 0
    said = capsys.readouterr().out
    assert "images of 64x64: 17 tokens" in said
    assert [line.split()[1] for line in said.splitlines() if line.strip()[:1].isdigit()] == [
        *["linear"] * 9, *["softmax"] * 3,
    ]  # fmt: skip


@pytest.mark.parametrize("name", default_cfgs)
def test_the_small_models_are_known_by_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", name, "--plan", "*: linear", "--dry_run"]) == 0
    assert (
        "401 tokens" if name.endswith("_160") else "images of 32x32: 65 tokens"
    ) in capsys.readouterr().out
    words = ["--student.model", name, "--dataset", "digits", "--student.plan", "*: linear", "--dry_run"]
    assert main(["train", "--mode", "scratch", *words, "--output_dir", str(tmp_path / "run")]) == 0
    assert "converted by '*: linear'" in capsys.readouterr().out


def test_a_converted_source_is_converted_anew(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    assert main(["convert", str(teacher), "--plan", PLAN, "--output_dir", first]) == 0
    capsys.readouterr()
    assert main(["convert", first, "--plan", "0: window", "--output_dir", second, "--img_size", "24"]) == 0
    said = capsys.readouterr().out
    assert "already converted by 0: softmax; 1: linear" in said
    assert "recover it" not in said, "its source is no softmax teacher"
    loaded = graftvit.load(second)
    assert plan_of(loaded) == "0: window; 1: softmax"
    assert loaded(torch.zeros(1, 3, 24, 24)).shape == (1, ARGUMENTS["num_classes"])


def test_a_folder_is_replaced_only_if_asked(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(teacher), "--output_dir", str(tmp_path / "out"), "--plan"]
    assert main([*words, PLAN]) == 0
    assert main([*words, "*: window"]) == 2
    assert "--force" in capsys.readouterr().err
    assert plan_of(graftvit.load(str(tmp_path / "out"))) == "0: softmax; 1: linear"
    assert main([*words, "*: window", "--force"]) == 0
    assert plan_of(graftvit.load(str(tmp_path / "out"))) == "*: window"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--plan", "*: linear"], "--output_dir is missing: give a new folder, or --dry_run"),
        (["--output_dir", "x"], "the following arguments are required: --plan"),
        (["--plan", "*: linaer", "--output_dir", "x"], "unknown operator 'linaer'; did you mean 'linear'"),
        (["--plan", "2: linear", "--output_dir", "x"], "there is no layer 2; the model has layers 0 to 1"),
        (["--plan", "*: keep", "--output_dir", "x"], "keeps every layer: name an operator other than softmax"),
        (["--plan", "*: linear(feature=[1])", "--output_dir", "x"], "a value is a finite number, a name, true"),
        (["--plan", "*: linear", "--output_dir", "x", "--weights", "some"], "invalid choice: 'some'"),
        (["--plan", "*: linear", "--output_dir", "x", "--calibrate", "4"], "--calibrate 4 needs images"),
        (["--plan", "*: linear", "--output_dir", "x", "--calibrate", "-1"], "--calibrate: give a whole number, 0"),
        (["--plan", "*: linear", "--output_dir", "x", "--dataset", "digits"], "need --calibrate N: give N"),
        (["--plan", "*: linear", "--output_dir", "x", "--calibrate", "4", "--data_path", "away"], "away does not"),
        (["--plan", "*: linear", "--output_dir", "x", "--blr", "1"], "--blr"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(
    teacher: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(teacher), *words]) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert said.err.count("\n") == 1
    assert not (tmp_path / "x").exists()
