"""A notebook of sixty calls on objects alone, on photographs: what each returns is given to the next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import graftvit
import pytest
import timm
import torch
from graftvit.checkpoints import describe_teacher
from graftvit.models import (
    attention_shape,
    converted_layers,
    copied_layers,
    mirror_arguments,
    new_parameters,
    plan_of,
    resize,
    token_layout,
)
from graftvit.transfer import divergence_by_layer, js_divergence, report_mismatch
from PIL import Image
from support.files.photos import CLASSES, make_photo_folder
from support.hub.hub_client import use_hub
from support.hub.hub_uploads import serve_uploads
from torch import Tensor
from torch.nn.functional import cross_entropy

NAME = "vit_tiny_patch16_224"
SIZES: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": len(CLASSES),
}  # fmt: skip
calls = 0


def call(value: Any) -> Any:
    """Count a call and give back what it returned."""
    global calls
    calls += 1
    return value


@pytest.fixture
def _hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with serve_uploads() as (server, _):
        use_hub(monkeypatch, server, tmp_path / "home")
        yield


def batch(folder: Path, transform: Any) -> tuple[Tensor, Tensor]:
    """The first photographs of each class."""
    paths = [path for name in CLASSES for path in sorted((folder / name).iterdir())[:3]]
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    return images, torch.tensor([label for label in range(len(CLASSES)) for _ in range(3)])


def learn(module: torch.nn.Module, loss: Any, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([each for each in module.parameters() if each.requires_grad], lr=1e-3)
    for _ in range(steps):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.usefixtures("_hub")
def test_sixty_calls(tmp_path: Path) -> None:
    torch.manual_seed(0)
    photos = make_photo_folder(tmp_path / "photos")
    teacher = timm.create_model(NAME, **SIZES)
    student = timm.create_model(NAME, **SIZES)

    # what they are
    assert call(graftvit.as_model(teacher)) is teacher
    assert call(attention_shape(teacher)).depth == 3
    assert call(token_layout(teacher)).grid == (4, 4)
    assert "alike" in call(report_mismatch(call(graftvit.compare_models(teacher, student))))
    name, arguments = call(mirror_arguments(teacher, NAME, SIZES))
    assert timm.create_model(name, **arguments).embed_dim == 24

    # save, load, describe
    folder = call(graftvit.save(teacher, tmp_path / "teacher"))
    loaded = call(graftvit.load_pretrained(folder))
    assert NAME in call(describe_teacher(loaded))
    images, labels = batch(photos / "train", loaded.preprocessing.transform())
    again = call(graftvit.load(folder)).eval()
    assert torch.equal(again(images), loaded.model(images))
    assert torch.equal(call(graftvit.as_model(str(folder))).eval()(images), again(images))
    assert call(graftvit.as_model(loaded)) is loaded.model

    # look
    maps = call(graftvit.attention_maps(loaded, images))
    assert maps[2].shape == (len(images), 3, 17, 17)
    assert list(call(graftvit.attention_maps(folder, images, -1))) == [-1]
    assert list(call(graftvit.attention_maps(teacher, images, "0-1"))) == [0, 1]
    assert call(js_divergence(maps[0], maps[1])).shape == maps[0].shape[:-1]
    assert len(call(divergence_by_layer(loaded, student, images))) == 3
    assert call(divergence_by_layer(str(folder), teacher, images)) == pytest.approx([0, 0, 0], abs=1e-6)

    # distil
    dual = call(graftvit.DualViT(loaded, student, method="distill", weight=3.0))
    learn(dual, lambda: call(dual(images)).transfer_loss)
    assert "0>0" in call(dual.describe())
    assert call(dual.predict(images)).shape == (len(images), len(CLASSES))
    assert call(graftvit.attention_maps(dual, images, [0]))[0].shape[1] == 3
    assert call(graftvit.visualize(dual, images[:2], layers=-1)).numbers["pairs"] == [0, 1, 2]
    assert call(graftvit.compare_models(teacher, dual)) == ()
    assert call(graftvit.evaluate(dual, [(images, labels)])).samples == len(images)
    kept = call(graftvit.save(dual, tmp_path / "dual"))
    assert torch.equal(call(graftvit.load(kept))(images), dual.eval().predict(images))
    released = call(dual.release())
    assert torch.equal(call(graftvit.load(kept))(images), released.eval()(images))

    # copy
    copying = call(graftvit.DualViT(folder, timm.create_model(NAME, **SIZES), method="copy", layers="0-1"))
    learn(copying, lambda: cross_entropy(call(copying(images)).logits, labels))
    wanted = copying.eval().predict(images)
    saved = call(copying.save(tmp_path / "copy"))
    assert torch.equal(call(graftvit.load(saved))(images), wanted)
    copied = call(copying.release()).eval()
    assert list(call(copied_layers(copied))) == [0, 1]
    assert torch.equal(copied(images), wanted)
    bare = call(graftvit.load(saved, bare=True))
    assert call(copied_layers(bare)) == {}

    # features and classes of several teachers
    losses: Any = [{"method": "feature"}, {"method": "logits", "teacher": "other", "weight": 0.5}]
    several = call(graftvit.DualViT(
        {"first": loaded, "other": teacher}, call(graftvit.load(folder)), losses=losses,
    ))  # fmt: skip
    assert set(call(several(images)).terms) == {"feature", "logits@other"}
    assert call(several.teach(images))

    # convert and align
    cheap = call(graftvit.convert(loaded, "*: linear; -1: softmax", calibration=images))
    assert call(plan_of(cheap)) == "0-1: linear; 2: softmax"
    assert list(call(converted_layers(cheap))) == [0, 1]
    assert isinstance(call(new_parameters(cheap)), list)
    alignment = call(graftvit.Alignment(loaded, cheap.requires_grad_(True)))
    learn(alignment, lambda: torch.stack(list(call(alignment(images)).values())).sum())
    by_name = call(graftvit.convert(str(folder), {0: "performer"}))
    assert call(plan_of(by_name)) == "0: performer; 1-2: softmax"
    assert call(graftvit.convert(dual.student, "*: linear")) is not None
    linear = call(graftvit.load(call(graftvit.save(cheap, tmp_path / "cheap"))))
    assert torch.equal(linear(images), cheap.eval()(images))
    call(resize(linear, 64))
    assert call(token_layout(linear)).grid == (8, 8)
    larger = call(graftvit.save(linear, tmp_path / "larger"))
    assert call(graftvit.load_pretrained(larger)).preprocessing.input_size == (3, 64, 64)

    # measure
    scores = call(graftvit.evaluate({"teacher": folder, "cheap": cheap, "copy": copied}, [(images, labels)]))
    assert list(scores) == ["teacher", "cheap", "copy"]
    on_files = call(graftvit.evaluate(loaded, photos))
    assert on_files.samples == 60
    assert call(graftvit.evaluate({"small": folder, "large": larger}, photos))["large"].samples == 60

    # train, by settings
    config = call(graftvit.RunConfig(
        mode="finetune", output_dir=tmp_path / "run", teacher={"source": str(folder)},
        student={"model": "same", "init": "teacher"}, optim={"epochs": 1},
        data={"data_path": str(photos), "batch_size": 24, "workers": 0},
        engine={"device": "cpu", "trackers": []},
    ))  # fmt: skip
    result = call(graftvit.train(config))
    assert result.finished
    assert call(graftvit.evaluate(result, photos)).top1 == pytest.approx(result.metrics["test_top1"])

    # give away
    report = call(graftvit.export(copied, tmp_path / "copy.pt2"))
    assert report.error < 1e-4
    pushed = call(graftvit.push(result, "tester/photos", license="mit", confirm_license=True))
    assert pushed.changed
    back = call(graftvit.load("hf-hub:tester/photos"))
    assert torch.equal(back(images), call(graftvit.as_model(result)).eval()(images))
    assert calls >= 60
