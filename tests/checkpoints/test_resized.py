"""A model at another image size: what is tied to the grid is resampled, and what was chosen stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import graftvit
import pytest
import timm
import torch
import torch.nn.functional as F
from graftvit.checkpoints.describe import teacher_facts
from graftvit.checkpoints.pretrained import load, load_pretrained, load_weights
from graftvit.checkpoints.student import save
from graftvit.models import layer_plan as operators
from graftvit.models.attention.base import AttentionOperator, Geometry, Heads, LayerShape, Traits
from graftvit.models.conversion import convert, converted_layers, plan_size, resize
from graftvit.models.errors import CheckpointError, UnsupportedModelError
from support.models.pyramids import TINY, arguments, tiny
from support.models.tiny_students import save_folder
from torch import Tensor, nn

NAME = "vit_tiny_patch16_224"
ARGUMENTS: dict[str, Any] = {
    "img_size": (16, 24), "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3,
}  # fmt: skip


class Tied(AttentionOperator):
    """Values weighted by a number a patch, and by one a row that is there as often as half of the rows at the start."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        height, width = shape.geometry.grid
        self.weight = nn.Parameter(torch.randn(height, width))
        self.pooled = nn.Parameter(torch.randn(height // 2, width))

    @property
    def traits(self) -> Traits:
        return Traits(needs_grid=True, resolution="resampled")

    def attend(self, heads: Heads) -> Tensor:
        _, _, v = heads.qkv()
        geometry = heads.tokens()
        weight = fitted(self.weight, geometry.grid) + fitted(self.pooled.sum(0, keepdim=True), geometry.grid)
        return v * F.pad(weight.flatten(), (geometry.num_prefix, 0), value=1.0)[:, None]

    def macs(self, geometry: Geometry) -> int:
        return geometry.num_tokens

    def resample(self, geometry: Geometry) -> None:
        super().resample(geometry)
        self.weight = nn.Parameter(fitted(self.weight.data, geometry.grid))
        self.pooled = nn.Parameter(fitted(self.pooled.data, (len(self.pooled), geometry.grid[1])))


def fitted(weight: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(weight[None, None], size, mode="bilinear")[0, 0]


@pytest.fixture(autouse=True)
def tied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(operators.OPERATORS, "tied", Tied)


@pytest.fixture
def student() -> nn.Module:
    torch.manual_seed(0)
    return convert(timm.create_model(NAME, **ARGUMENTS), "*: tied; 1: window(window=3)").eval()


def write(model: nn.Module, folder: Path, **more: Any) -> str:
    return save_folder(model, folder, NAME, {**ARGUMENTS, **more}, license="mit")


def images(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("how", [{"img_size": (24, 40)}, {"model_args": {"img_size": (24, 40)}}])
def test_loading_at_another_size(student: nn.Module, tmp_path: Path, how: dict[str, Any]) -> None:
    teacher = load_pretrained(write(student, tmp_path / "out"), **how)
    resize(student, (24, 40))
    assert torch.equal(teacher.model(images(24, 40)), student(images(24, 40)))
    assert teacher.model_args["img_size"] == (24, 40)
    assert teacher.report.resampled["blocks.0.attn.operator"] == "from grid 4x6 to 6x10"
    assert teacher.report.resampled["pos_embed"] == "from grid 4x6 to 6x10 (timm's bicubic)"
    assert "blocks.1.attn.operator" not in teacher.report.resampled


def test_the_stored_size_changes_nothing(student: nn.Module, tmp_path: Path) -> None:
    folder = write(student, tmp_path / "out")
    teacher = load_pretrained(folder, img_size=(16, 24))
    assert torch.equal(teacher.model(images(16, 24)), student(images(16, 24)))
    assert not teacher.report.resampled
    assert plan_size(teacher.model) is None


def test_saved_after_a_resize_and_resized_again(student: nn.Module, tmp_path: Path) -> None:
    first = write(student, tmp_path / "first")
    save(first, tmp_path / "second", img_size=(24, 40))
    arguments = json.loads((tmp_path / "second" / "config.json").read_text())["model_args"]
    assert arguments["img_size"] == [24, 40]
    assert arguments["plan_size"] == [16, 24], "the operators have two rows, as at 16 pixels, and not three"
    resize(student, (24, 40))
    assert torch.equal(load(str(tmp_path / "second"))(images(24, 40)), student(images(24, 40)))
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'second'}", pretrained=True).eval()
    assert torch.equal(by_timm(images(24, 40)), student(images(24, 40)))
    save(str(tmp_path / "second"), tmp_path / "third", img_size=(32, 32))
    resize(student, (32, 32))
    assert torch.equal(graftvit.load(str(tmp_path / "third"))(images(32, 32)), student(images(32, 32)))
    back = save(str(tmp_path / "third"), tmp_path / "fourth", img_size=(16, 24))
    assert "plan_size" not in json.loads((back / "config.json").read_text())["model_args"]
    assert load(str(back))(images(16, 24)).isfinite().all()


def test_a_new_plan_forgets_the_size_of_the_old_one(student: nn.Module, tmp_path: Path) -> None:
    resize(student, (24, 40))
    again = convert(student, "*: tied").eval()
    assert plan_size(again) is None
    assert again.blocks[0].attn.operator.pooled.shape == (3, 10)  # type: ignore[index, union-attr]
    folder = write(again, tmp_path / "out", img_size=(24, 40))
    assert torch.equal(load(folder)(images(24, 40)), again(images(24, 40)))


@pytest.mark.parametrize("method", ["timm", "mae"])
def test_positions_are_resampled_as_of_any_model(student: Any, tmp_path: Path, method: Any) -> None:
    plain = timm.create_model(NAME, **ARGUMENTS)
    plain.pos_embed.data.copy_(student.pos_embed.detach())
    ours, wanted = (
        load_pretrained(write(model, tmp_path / name), img_size=(24, 40), position_embedding=method)
        for name, model in (("ours", student), ("plain", plain))
    )
    assert torch.equal(ours.model.pos_embed, wanted.model.pos_embed)
    assert ours.report.resampled["pos_embed"] == wanted.report.resampled["pos_embed"]


def test_a_size_that_does_not_fit_is_one_sentence(student: nn.Module, tmp_path: Path) -> None:
    folder = write(student, tmp_path / "out")
    for size in ((0, 16), (2, 2), (-8, 8)):
        with pytest.raises(UnsupportedModelError, match=f"{size[0]}x{size[1]} have no whole patch of 4x4"):
            load(folder, img_size=size)
    other = timm.create_model("resnet10t")  # whose outputs alone are read
    resize(other, (8, 24))
    assert other(images(8, 24)).shape[1:] == (1000,)


def test_a_student_of_another_size_starts_from_it(student: nn.Module, tmp_path: Path) -> None:
    folder = write(student, tmp_path / "out")
    known = load_pretrained(folder, img_size=(24, 40))
    fresh = timm.create_model(known.architecture, **known.model_args).eval()
    report = load_weights(fresh, folder)
    assert torch.equal(fresh(images(24, 40)), known.model(images(24, 40)))
    assert report.resampled == known.report.resampled
    same = timm.create_model(
        known.architecture, **{**known.model_args, "img_size": (16, 24), "num_classes": 5}
    )
    assert not load_weights(same, folder).resampled
    assert torch.equal(same.eval().forward_features(images(16, 24)), student.forward_features(images(16, 24)))  # type: ignore[operator]


def test_every_operator_stays_with_its_layer(student: nn.Module) -> None:
    before = {index: id(layer.operator) for index, layer in converted_layers(student).items()}
    resize(student, 32)
    assert {index: id(layer.operator) for index, layer in converted_layers(student).items()} == before


def test_a_free_image_size_after_loading(student: nn.Module, tmp_path: Path) -> None:
    folder = write(student, tmp_path / "out")
    free = load(folder, model_args={"dynamic_img_size": True})
    assert torch.equal(free(images(16, 24)), student(images(16, 24)))
    assert free(images(32, 20)).isfinite().all()
    resize(free, (32, 20))
    assert torch.equal(free(images(32, 20)), load(folder, img_size=(32, 20))(images(32, 20)))


# The windows that config.json gives a Swin are held against its tables of relative position biases.


@pytest.fixture(params=[None, "stage1: linear", "stage2: softmax"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A Swin with windows of 3x3, as it is or converted in part."""
    model = tiny("swin")
    student = model if request.param is None else convert(model, request.param, without=["bias"])
    shown = {"input_size": (3, 32, 32)}
    return Path(save_folder(student, tmp_path / "student", TINY["swin"][0], arguments("swin"), shown))


def edit(folder: Path, window: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["model_args"]["window_size"] = window
    path.write_text(json.dumps(config))


def test_an_edited_window_is_refused(folder: Path) -> None:
    edit(folder, 2)
    words = r"says window_size=2, but layers\.\d\.blocks\.0\.attn\.relative_position_bias_table has 25 rows"
    with pytest.raises(CheckpointError, match=f"{words} and not 9: its windows are 3x3"):
        graftvit.load(folder)
    with pytest.raises(CheckpointError, match=words):
        load_weights(tiny("swin"), f"local-dir:{folder}")


def test_other_windows_and_sizes_can_be_asked_for(folder: Path) -> None:
    graftvit.load(folder)
    for size in (48, (40, 24)):
        graftvit.load(folder, img_size=size)
    graftvit.load(folder, model_args={"window_size": 4})


# What `teacher info` says of a pyramid.


def test_each_stage_has_its_line(tmp_path: Path) -> None:
    model = convert(tiny("pvt", (32, 48)), "stage1: none")
    shown = {"input_size": (3, 32, 48)}
    source = save_folder(model, tmp_path / "student", TINY["pvt"][0], arguments("pvt"), shown)
    facts = teacher_facts(load_pretrained(source))
    assert facts["depth"] == "3 blocks"
    assert facts["stage 1"] == "1 block without attention, model width 8, grid 8 x 12"
    assert facts["stage 2"] == "2 blocks with 2 heads of width 8, model width 16, grid 4 x 6"
