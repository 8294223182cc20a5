"""`graftvit deploy`, as typed: a file is kept if it is worth its model, and refused in one sentence otherwise."""

from __future__ import annotations

import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path

import graftvit
import pytest
import timm
import torch
from graftvit.checkpoints import targets
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from graftvit.models.errors import CheckpointError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data.loaders import create_reference_loader
from graftvit.transfer.deploy import REPORT
from support.files.image_folders import class_folder
from support.models.saved import save_vit
from support.runs.typed import Typed
from torch import Tensor, nn

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package)
pytestmark = pytest.mark.usefixtures("few_digits")
NAME = "vit_tiny_patch16_224"
SIZES = {
    "img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 2, "in_chans": 1, "num_classes": 10
}  # fmt: skip
DIGITS = ("--dataset", "digits", "--workers", "0")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows digits: its head is fitted to the features of random weights."""
    folder = tmp_path_factory.mktemp("model") / "model"
    torch.manual_seed(0)
    vit = timm.create_model(NAME, **SIZES).eval()
    images = Preprocessing.of(vit, mean=(0.2,), std=(0.4,), crop_pct=1.0)
    batches = list(create_reference_loader(DataConfig(dataset="digits", workers=0), images))
    seen, labels = (torch.cat([batch[place] for batch in batches]) for place in (0, 1))
    _fit(vit, seen, labels)
    names = tuple(str(digit) for digit in range(10))
    write_student(vit, folder, architecture=NAME, model_args=SIZES, preprocessing=images, label_names=names)
    return folder


@torch.no_grad()
def _fit(vit: nn.Module, images: Tensor, labels: Tensor) -> None:
    features = vit.forward_head(vit.forward_features(images), pre_logits=True)
    wanted = torch.nn.functional.one_hot(labels, 10).float() - 0.1
    ridge = 0.3 * torch.eye(
        features.shape[1]
    )  # without it, the weights are so large that int8 loses everything
    vit.head.weight.copy_(torch.linalg.solve(features.T @ features + ridge, features.T @ wanted).T)
    vit.head.bias.zero_()


@pytest.mark.parametrize(("target", "drop"), [("onnx", 0), ("onnx-int8", 20)])
def test_a_file_that_is_worth_its_model_is_kept(
    target: str, drop: int, model: Path, tmp_path: Path, typed: Typed
) -> None:
    out = tmp_path / "out"
    said = typed("deploy", model, "--to", target, "--drop", drop, "--output_dir", out, *DIGITS).out
    assert sorted(path.name for path in out.iterdir()) == [REPORT, "load.py", "model.onnx"]
    report = json.loads((out / REPORT).read_text())
    typed("evaluate", model, *DIGITS, "--json", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())[str(model)]
    assert report["model_top1"] == pytest.approx(scores["top1"])
    assert report["model_top1"] > 40
    assert report["lost"] <= drop
    assert report["samples"] == scores["samples"] == 100
    assert report["interval"][0] < report["top1"] < report["interval"][1]
    assert report["bytes"] == (out / "model.onnx").stat().st_size
    assert min(report["milliseconds"], report["model_milliseconds"]) > 0
    assert f"{report['top1']:.2f} %" in said
    assert str(tmp_path) not in (out / REPORT).read_text()
    helped = subprocess.run([sys.executable, out / "load.py"], capture_output=True, text=True)
    assert helped.returncode == 1, "it was given no image"
    assert "load.py IMAGE" in helped.stderr


def test_a_model_in_memory_is_deployed_and_stays_as_it_is(model: Path, tmp_path: Path) -> None:
    known = graftvit.load_pretrained(model)
    known.model.double().train()
    data, out = DataConfig(dataset="digits", workers=0), tmp_path / "out"
    worth = graftvit.deploy(known, out, data, drop=0)
    assert (worth.lost, worth.top1) == (0, pytest.approx(graftvit.evaluate(known, data).top1))
    assert known.model.training
    assert next(known.model.parameters()).dtype == torch.float64
    assert json.loads((out / REPORT).read_text())["bytes"] == worth.bytes
    (tmp_path / "file").write_text("dear")
    (tmp_path / "link").symlink_to(out)
    for place in ("file", "link", "out"):
        with pytest.raises(CheckpointError):
            graftvit.deploy(known, tmp_path / place, data, overwrite=place != "out")
    assert (tmp_path / "file").read_text() == "dear"
    with pytest.raises(CheckpointError):
        graftvit.deploy(known.model.to("meta"), tmp_path / "new", data)


def test_a_file_that_loses_too_much_is_not_kept(
    model: Path, tmp_path: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in (REPORT, "load.py", "model.onnx"):  # as an earlier deployment leaves them
        (out / name).write_text("{}")
    words = ("deploy", model, "--to", "onnx", "--output_dir", out, *DIGITS)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    script = targets.script_of
    monkeypatch.setattr(targets, "script_of", lambda target: script(target).replace("/ 255\n", "/ 25500\n"))
    error = typed(*words, "--force", code=1).err
    assert "points below the model's" in error
    assert "one image is 1 points" in error
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]
    typed(*words, "--force", "--drop", 100)
    assert json.loads((out / REPORT).read_text())["lost"] > 0.5


def test_the_preprocessing_of_the_flags_is_in_the_file(model: Path, tmp_path: Path, typed: Typed) -> None:
    out = tmp_path / "out"
    flags = ("--crop_pct", "0.5", "--crop_mode", "squash", "--interpolation", "bilinear")
    typed("deploy", model, "--to", "onnx", "--output_dir", out, *DIGITS, *flags)
    said = runpy.run_path(str(out / "load.py"))["Model"]().said
    assert (said["crop_pct"], said["crop_mode"], said["interpolation"]) == ("0.5", "squash", "bilinear")
    assert json.loads(said["label_names"]) == [str(digit) for digit in range(10)]


def test_a_converted_model_of_two_operators_is_deployed(model: Path, tmp_path: Path, typed: Typed) -> None:
    typed("convert", model, "--plan", "0: linear", "--output_dir", tmp_path / "mix")
    typed("deploy", tmp_path / "mix", "--to", "onnx", "--output_dir", tmp_path / "out", *DIGITS)
    assert json.loads((tmp_path / "out" / REPORT).read_text())["lost"] == 0


def test_only_an_earlier_file_is_replaced(model: Path, tmp_path: Path, typed: Typed) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    words = ("deploy", model, "--to", "onnx", "--output_dir", out, *DIGITS)
    assert "other files" in typed(*words, "--force", code=2).err
    (out / REPORT).write_text("{}")
    assert "--force" in typed(*words, code=2).err
    assert "letter.txt" in typed(*words, "--force", code=2).err
    assert (out / "letter.txt").read_text() == "dear"


def test_what_has_no_accuracy_is_refused(model: Path, tmp_path: Path, typed: Typed) -> None:
    bare = save_vit(tmp_path / "bare", {**SIZES, "num_classes": 0})
    fewer = save_vit(tmp_path / "fewer", {**SIZES, "num_classes": 7})
    rest = ("--to", "onnx", "--output_dir", tmp_path / "out", *DIGITS)
    assert "no classification head" in typed("deploy", bare, *rest, code=2).err
    assert "10 classes" in typed("deploy", fewer, *rest, code=2).err
    weights = model / "model.safetensors"
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:1000])
    assert "cut.safetensors" in typed("deploy", tmp_path / "cut.safetensors", *rest, code=2).err
    images = class_folder(tmp_path / "images", tuple("0123456789"), train=1, validation=0)
    folder = ("--data_path", images, "--workers", "0")
    typed("deploy", model, "--to", "onnx", "--output_dir", tmp_path / "out", *folder, code=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("executorch") is not None, reason="executorch is installed")
def test_a_target_without_its_package_is_refused(model: Path, tmp_path: Path, typed: Typed) -> None:
    error = typed(
        "deploy", model, "--to", "executorch", "--output_dir", tmp_path / "out", *DIGITS, code=2
    ).err
    assert "pip install 'executorch>=" in error


def test_calibration_images_are_for_int8_alone(model: Path, tmp_path: Path, typed: Typed) -> None:
    words = ["deploy", model, "--to", "onnx", "--calibrate", 4, "--output_dir", tmp_path / "out", *DIGITS]
    assert "--calibrate" in typed(*words, code=2).err
    assert not (tmp_path / "out").exists()
