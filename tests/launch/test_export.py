"""`graftvit export`, as typed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from support.files.hostile import ARGUMENTS
from support.models.saved import save_vit
from support.runs.typed import Typed


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return save_vit(tmp_path / "student", ARGUMENTS, license="cc-by-nc-4.0")


def test_onnx_of_pixels(
    student: Path, tmp_path: Path, typed: Typed, caplog: pytest.LogCaptureFixture
) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "model.onnx"
    assert str(out) in typed("export", student, out, "--normalize").out
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


def test_torch_at_another_size(student: Path, tmp_path: Path, typed: Typed) -> None:
    out = tmp_path / "model.pt2"
    typed(f"export {student} {out} --img_size 24,32 --dynamic none")
    images = torch.randn(1, 3, 24, 32)
    model = timm.create_model(f"local-dir:{student}", pretrained=True, img_size=(24, 32)).eval()
    exported = torch.export.load(out).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(images), model(images), rtol=1e-4, atol=1e-5)


def test_a_model_without_a_size_is_exported_at_the_one_of_the_flag(tmp_path: Path, typed: Typed) -> None:
    weights, out = tmp_path / "model.safetensors", tmp_path / "model.pt2"
    model = timm.create_model("test_efficientnet", num_classes=3).eval()
    save_file(model.state_dict(), weights)
    said = typed(f"export {weights} {out} --model test_efficientnet --img_size 32,64 --dynamic none").out
    assert "1x3x32x64" in said
    images = torch.randn(1, 3, 32, 64)
    exported = torch.export.load(out).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(images), model(images), rtol=1e-4, atol=1e-5)
