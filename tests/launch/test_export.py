"""`graftvit export`, as typed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from graftvit.launch.cli import main
from support.files.hostile import ARCHITECTURE, ARGUMENTS


@pytest.fixture
def student(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = timm.create_model(ARCHITECTURE, **ARGUMENTS)
    images = Preprocessing.of(model, mean=(0.4,) * 3, std=(0.2,) * 3)
    write_student(
        model, tmp_path / "student", architecture=ARCHITECTURE, model_args=ARGUMENTS, preprocessing=images,
        license="cc-by-nc-4.0",
    )  # fmt: skip
    return tmp_path / "student"


def test_onnx_of_pixels(
    student: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "model.onnx"
    assert main(["export", str(student), str(out), "--normalize"]) == 0
    assert str(out) in capsys.readouterr().out
    told = [record.getMessage().split()[0] for record in caplog.records if record.name.endswith(".export")]
    assert told == ["tracing", "writing", "checking"]
    pixels = torch.rand(3, 3, 16, 16)
    [logits] = onnxruntime.InferenceSession(str(out)).run(None, {"images": pixels.numpy()})
    model = timm.create_model(f"local-dir:{student}", pretrained=True).eval()
    with torch.no_grad():
        wanted = model((pixels - 0.4) / 0.2)
    np.testing.assert_allclose(logits, wanted.numpy(), rtol=1e-4, atol=1e-5)
    said = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    assert "cc-by-nc-4.0" in json.dumps(said)
    assert (said["classes"], said["normalize"]) == (str(ARGUMENTS["num_classes"]), "in the file")


def test_torch_at_another_size(student: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.pt2"
    assert main(["export", str(student), str(out), "--img_size", "24,32", "--dynamic", "none"]) == 0
    images = torch.randn(1, 3, 24, 32)
    model = timm.create_model(f"local-dir:{student}", pretrained=True, img_size=(24, 32)).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            torch.export.load(out).module()(images), model(images), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model.tflite"], "model.tflite"),
        (["model.onnx", "--dynamic", "none", "batch"], "--dynamic none cannot be combined"),
        (["model.onnx", "--dynamic", "time"], "invalid choice: 'time'"),
        (["model.pt2", "--format", "onnx"], "contradicts format 'onnx'"),
        (["model.pt2", "--opset", "18"], "opset"),
    ],
)
def test_mistakes_are_one_sentence(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    out, *flags = words
    assert main(["export", str(student), str(tmp_path / out), *flags]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / out).exists()


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--help"]) == 0
    assert "graftvit export runs/distill" in capsys.readouterr().out
