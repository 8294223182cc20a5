"""A detector or segmenter goes to a folder and back with the same numbers; damaged folders end in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import graftvit
import pytest
import timm
import torch
from graftvit.checkpoints.dense_models import load_dense, save_dense
from graftvit.models.dense.dense_model import DenseModel, create_dense
from graftvit.models.errors import CheckpointError
from safetensors.torch import load_file, save_file
from support.models.dense_bodies import BODIES, images
from support.models.dense_bodies import body as tiny
from torch import nn


def made(kind: Any, name: str, **how: Any) -> DenseModel:
    """Return a model with random weights everywhere."""
    torch.manual_seed(0)
    model = create_dense(kind, tiny(name), 3, width=16, norms=(0,), class_names=("a", "b", "c"), **how)
    with torch.no_grad():
        for each in model.parameters():
            each.add_(torch.randn_like(each), alpha=0.02)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_()  # type: ignore[union-attr]
    return model.eval()


def assert_same(model: DenseModel, other: DenseModel) -> None:
    shown = images()
    with torch.no_grad():
        for found, wanted in zip(other(shown), model(shown), strict=True):
            assert found.keys() == wanted.keys()
            assert all(torch.equal(each, wanted[name]) for name, each in found.items())


@pytest.mark.parametrize("name", BODIES)
def test_a_model_goes_to_a_folder_and_back(name: str, tmp_path: Path) -> None:
    model = made("retinanet", name, score_threshold=0.001)
    with torch.no_grad():
        assert len(model(images())[0]["boxes"]) > 0
    other = load_dense(save_dense(model, tmp_path / "model"))
    assert other.settings == model.settings
    assert not other.training
    assert all(each.requires_grad for each in other.parameters())
    assert_same(model, other)
    if name in ("pvt", "lit_s", "linear_vit"):
        assert_same(model, load_dense(save_dense(other, tmp_path / "again")))


@pytest.mark.parametrize("kind", ["mask_rcnn", "semantic_fpn", "upernet"])
def test_every_kind_goes_to_a_folder_and_back(kind: str, tmp_path: Path) -> None:
    model = made(kind, "pvt", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    other = load_dense(save_dense(model, tmp_path / "model"))
    name = "detector" if kind == "mask_rcnn" else "segmenter"
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json", "model.safetensors", f"{name}.json", f"{name}.safetensors",
    }  # fmt: skip
    assert (other.kind, other.mean, other.class_names) == (kind, (0.1, 0.2, 0.3), ("a", "b", "c"))
    assert_same(model, other)


@pytest.mark.parametrize("name", ["pvt_v2", "swin", "twins"])
def test_timm_alone_loads_the_backbone(name: str, tmp_path: Path) -> None:
    model = made("retinanet", name)
    save_dense(model, tmp_path / "model")
    plain = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, features_only=True).eval()
    shown = torch.randn(1, 3, 64, 96)
    body: Any = model.backbone.body
    with torch.no_grad():
        maps = body.forward_intermediates(shown, intermediates_only=True)
        for found, wanted in zip(plain(shown), maps, strict=True):
            channels_last = wanted.permute(0, 2, 3, 1)  # as timm's Swin gives them
            assert torch.equal(found, wanted if found.shape == wanted.shape else channels_last)
    whole = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert whole.num_classes == 0


def test_an_epsilon_of_the_norms_and_the_images_of_the_weights_are_kept(tmp_path: Path) -> None:
    arguments = {**BODIES["vit"][1], "norm_layer": partial(nn.LayerNorm, eps=1e-3)}
    torch.manual_seed(0)
    model = create_dense("semantic_fpn", timm.create_model("vit_tiny_patch16_224", **arguments), 3, width=16)
    assert_same(model.eval(), load_dense(save_dense(model, tmp_path / "model")))
    assert graftvit.load_pretrained(tmp_path / "model").model.norm.eps == 1e-3  # type: ignore[union-attr]


def test_a_folder_is_replaced_only_if_asked_for(tmp_path: Path) -> None:
    model = made("semantic_fpn", "pvt")
    folder = save_dense(model, tmp_path / "model")
    with pytest.raises(CheckpointError):
        save_dense(model, folder)
    other = made("retinanet", "pvt")
    save_dense(other, folder, overwrite=True)
    assert not (folder / "segmenter.json").exists()
    assert load_dense(folder).kind == "retinanet"


def change(folder: Path, **how: Any) -> None:
    path = folder / "segmenter.json"
    settings = {**json.loads(path.read_text()), **how}
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not ...}))


def change_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "segmenter.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "no settings": lambda folder: (folder / "segmenter.json").unlink(),
    "no weights": lambda folder: (folder / "segmenter.safetensors").unlink(),
    "no backbone": lambda folder: (folder / "config.json").unlink(),
    "no JSON": lambda folder: (folder / "segmenter.json").write_text("{"),
    "a list": lambda folder: (folder / "segmenter.json").write_text("[]"),
    "an unknown setting": lambda folder: change(folder, code="import os"),
    "a body": lambda folder: change(folder, body="vit_tiny_patch16_224"),
    "an unknown kind": lambda folder: change(folder, kind="yolo"),
    "another kind": lambda folder: change(folder, kind="upernet"),
    "no mean": lambda folder: change(folder, mean=...),
    "no kind": lambda folder: change(folder, kind=...),
    "a kind of no type": lambda folder: change(folder, kind=[1]),
    "more classes": lambda folder: change(folder, num_classes=4, class_names=[]),
    "too many classes": lambda folder: change(folder, num_classes=10**12),
    "a huge width": lambda folder: change(folder, width=999_999),
    "a text as width": lambda folder: change(folder, width="16"),
    "no deviation": lambda folder: change(folder, std=[0, 0, 0]),
    "not a number": lambda folder: change(folder, mean=[float("nan")] * 3),
    "two means": lambda folder: change(folder, mean=[0.5, 0.5]),
    "an output that there is not": lambda folder: change(folder, norms=[9]),
    "outputs by name": lambda folder: change(folder, norms={"a": 1}),
    "another norm": lambda folder: change(folder, norms=[1]),
    "no divisor": lambda folder: change(folder, size_divisor=-32),
    "a pipe": lambda folder: (folder / "segmenter.safetensors").write_bytes(b"\x80\x04cos\nsystem\n."),
    "a cut file": lambda folder: (folder / "segmenter.safetensors").write_bytes(
        (folder / "segmenter.safetensors").read_bytes()[:-9]
    ),
    "a weight too few": lambda folder: change_tensors(folder, lambda found: found.popitem()),
    "a weight too many": lambda folder: change_tensors(
        folder, lambda found: found.update({"backbone.body.cls": torch.zeros(2)})
    ),
    "infinite numbers": lambda folder: change_tensors(
        folder, lambda found: found["head.classifier.1.bias"].fill_(float("inf"))
    ),
    "whole numbers": lambda folder: change_tensors(
        folder, lambda found: found.update({name: each.int() for name, each in found.items()})
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(made("semantic_fpn", "pvt"), tmp_path_factory.mktemp("dense") / "model")


def copied(saved: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused(damage: str, saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path)
    assert load_dense(folder).task == "segmentation"
    DAMAGE[damage](folder)
    with pytest.raises(CheckpointError):
        load_dense(folder)


def test_a_link_out_of_the_folder_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path)
    (folder / "segmenter.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "segmenter.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError):
        load_dense(folder)
