"""Towers of transformers teach and are taught, are aligned, calibrated, counted and looked at, as timm's models are."""

from __future__ import annotations

import copy
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graftvit import load
from graftvit.models.attention.base import Heads
from graftvit.models.conversion import convert, converted_layers
from graftvit.models.cost import attention_macs, other_macs
from graftvit.models.errors import GraftError, TransferError, UnsupportedModelError
from graftvit.transfer import DualViT
from graftvit.transfer.align import Alignment
from graftvit.transfer.analysis.layer_maps import attention_maps, divergence_by_layer
from graftvit.transfer.methods.method_facts import METHODS
from torch import Tensor, nn

transformers: Any = pytest.importorskip("transformers")
from support.models.tiny_towers import ORDERED, SIZES, attending, drawn, images, tokens, tower  # noqa: E402

SEVERAL = ("vit", "beit", "dinov2_with_registers", "dinov3_vit", "siglip_vision_model", "internvl_vision")
"""Types whose layers are called in different ways."""
SMALLER = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}


# Attention maps.


@pytest.mark.parametrize("kind", ORDERED)
def test_maps_are_those_of_eager_attention(kind: str) -> None:
    model, x = tower(kind), images()
    before = model.config._attn_implementation
    found = attention_maps(model, x)
    seen: list[Tensor] = []

    def dense(heads: Heads) -> Tensor:
        q, k, v = heads.qkv()
        logits = heads.scale * q @ k.transpose(2, 3)
        seen.append((logits if heads.bias is None else logits + heads.bias).softmax(-1))
        return seen[-1] @ v

    with torch.no_grad(), attending(model, dense):
        tokens(model, x)
    assert list(found) == [0, 1]
    for layer, maps in found.items():
        torch.testing.assert_close(maps, seen[layer], rtol=1e-4, atol=1e-6)
    assert model.config._attn_implementation == before


def test_the_maps_of_a_converted_tower_are_those_of_its_operators() -> None:
    model, x = tower("vit"), images()
    student = convert(model, "0: window(window=2)")
    maps = attention_maps(student, x)
    assert int((maps[0][0, 0, 1] > 0).sum()) == 5  # a window of four patches, and the class token
    same, other = divergence_by_layer(model, student, x), divergence_by_layer(model, model, x)
    assert same[0] > 1e-4 > max(other)


# Alignment and calibration.


@pytest.mark.parametrize("kind", ORDERED)
def test_each_layer_is_aligned_on_the_inputs_of_the_teachers(kind: str) -> None:
    model, x = tower(kind), images()
    student = convert(model, "*: hedgehog")
    for layer in converted_layers(student).values():
        drawn(layer.operator)
    alignment = Alignment(model, student)
    losses = alignment(x)
    wanted: dict[int, Tensor] = {}

    def see(heads: Heads) -> Tensor:
        out = F.scaled_dot_product_attention(*heads.qkv(), scale=heads.scale)
        wanted[len(wanted)] = F.mse_loss(converted_layers(student)[len(wanted)].operator(heads), out)
        return out

    with torch.no_grad(), attending(model, see):
        tokens(model, x)
    assert losses.keys() == wanted.keys()
    for layer, loss in losses.items():
        torch.testing.assert_close(loss, wanted[layer], rtol=1e-4, atol=1e-7)
    alignment.freeze_others()
    torch.stack([*losses.values()]).sum().backward()
    learn = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    assert all(".operator." in name or "_proj" in name for name in learn)
    assert all(student.get_parameter(name).grad is not None for name in learn if ".operator." in name)


def test_alignment_needs_the_size_of_a_tower_of_one_size() -> None:
    model = tower("vit")
    with pytest.raises(UnsupportedModelError, match="24x48"):
        Alignment(model, convert(model, "*: linear"))(images(size=(24, 48)))
    anywhere = tower("dinov3_vit")
    assert Alignment(anywhere, convert(anywhere, "*: hedgehog"))(images(size=(24, 48))).keys() == {0, 1}


@pytest.mark.parametrize("kind", SEVERAL)
def test_calibration_lessens_the_error(kind: str) -> None:
    student = convert(tower(kind), "0: hedgehog; 1: hash(bits=4)", calibration=images(4))
    layers = converted_layers(student)
    before, after = layers[0].calibration or (0.0, 1.0)
    assert after < before
    assert layers[1].operator.fitted
    assert bool(tokens(student, images()).isfinite().all())


# Costs.


def test_multiply_adds_are_counted() -> None:
    model = tower("vit")
    width, hidden, count = SIZES["hidden_size"], SIZES["intermediate_size"], 17
    assert attention_macs(model) == [2 * count**2 * width] * 2
    layers = 2 * count * (4 * width**2 + 2 * width * hidden)
    assert other_macs(model) == layers + 16 * 3 * 64 * width + width**2  # patches, and the pooler
    assert attention_macs(convert(model, "0: linear"))[0] < 2 * count**2 * width
    assert other_macs(convert(model, "*: linear")) == other_macs(model)


# Teachers and students.


@cache
def pairs(folder: Path) -> dict[str, tuple[nn.Module, nn.Module]]:
    """A teacher and a student as models of transformers, and the same ones as models of timm."""
    found: dict[str, tuple[nn.Module, nn.Module]] = {}
    models = {}
    for role, sizes in (("teacher", SIZES), ("student", {**SIZES, "num_hidden_layers": 3})):
        config = transformers.ViTConfig(**sizes, num_labels=5)
        model = drawn(transformers.ViTForImageClassification(config))
        model.save_pretrained(folder / role)
        models[role] = model, load(folder / role).eval()
    with torch.no_grad():  # other weights than the teacher's
        for each in models["student"]:
            for parameter in each.parameters():
                parameter.mul_(0.8)
    for index, library in enumerate(("transformers", "timm")):
        found[library] = models["teacher"][index], models["student"][index]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pairs")


OPTIONS: dict[str, dict[str, Any]] = {
    "distill": {"layers": "0>2,1>0", "loss": "kl"},
    "feature": {"tokens": "both"},
    "copy": {"layers": "last:1"},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_computes_what_it_does_with_the_same_models_of_timm(method: str, folder: Path) -> None:
    outputs, gradients = [], []
    for library, models in pairs(folder).items():
        teacher, student = map(copy.deepcopy, models)
        dual = DualViT(teacher, student, method, **OPTIONS.get(method, {})).eval()
        out = dual(images())
        (out.transfer_loss + out.logits.square().sum()).backward()
        outputs.append((out.logits, out.transfer_loss))
        parameters = dict(student.named_parameters())
        prefix = "vit.layers.0.mlp.fc1" if library == "transformers" else "blocks.0.mlp.fc1"
        gradients.append(parameters[f"{prefix}.weight"].grad)
        if library == "transformers":
            modules = [type(each) for each in models[1].modules()]
            bare = {"bare": True} if dual.needs_teacher else {}
            assert [type(each) for each in dual.release(**bare).modules()] == modules
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ORDERED)
@pytest.mark.parametrize("method", ["distill", "attention_output", "block_output"])
def test_every_tower_teaches_and_is_taught(kind: str, method: str) -> None:
    teacher, student = tower(kind), tower(kind)
    x = images()
    assert float(DualViT(teacher, student, method, **KL.get(method, {}))(x).transfer_loss) == pytest.approx(
        0, abs=1e-5
    )
    student = tower(kind, **SMALLER) if method != "distill" else tower(kind)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.5)
    dual = DualViT(teacher, student, method, **KL.get(method, {}))
    loss = dual(x).transfer_loss
    loss.backward()
    assert float(loss) > 0
    assert any(parameter.grad is not None for parameter in student.parameters())


KL = {"distill": {"loss": "kl"}}


@pytest.mark.parametrize("kind", SEVERAL)
def test_towers_and_models_of_timm_teach_one_another(kind: str) -> None:
    timm = pytest.importorskip("timm")
    other = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=4
    )
    for teacher, student in ((tower(kind), other), (copy.deepcopy(other), tower(kind))):
        losses = [{"method": "distill"}, {"method": "feature", "tokens": "patches"}]
        out = DualViT(teacher, student, losses=losses)(images())
        out.transfer_loss.backward()
        assert out.terms.keys() == {"distill", "feature"}
        assert float(out.transfer_loss) > 0


def test_compiled_it_learns_the_same() -> None:
    student, x = tower("dinov2"), images()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.7)
    dual = DualViT(tower("dinov2"), student, "distill")
    compiled = torch.compile(dual, backend="eager")
    torch.testing.assert_close(compiled(x).transfer_loss, dual(x).transfer_loss)


def test_the_example_of_the_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "transfer.md").read_text()
    [code] = [code for code in re.findall("```python\n(.*?)```", page, re.DOTALL) if "AutoModelFor" in code]
    deep = {**SIZES, "num_hidden_layers": 4}
    student = transformers.ViTForImageClassification(transformers.ViTConfig(**deep, num_labels=5))
    teacher = tower("dinov2_with_registers", num_hidden_layers=4, image_size=48)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda name: teacher)
    monkeypatch.setattr(transformers.AutoModelForImageClassification, "from_pretrained", lambda name: student)
    values: dict[str, Any] = {}
    exec(code, values)
    out = values["dual"](images())
    assert out.logits.shape == (2, 5)
    assert float(out.transfer_loss) > 0
    assert len(out.parts) == 4


def test_a_converted_tower_learns_from_the_original() -> None:
    teacher = tower("dinov2")
    student, x = convert(teacher, "*: hedgehog"), images(4)
    dual = DualViT(teacher, student, "attention_output")
    optimizer = torch.optim.Adam(dual.parameters(), lr=1e-4)
    losses = []
    for _ in range(20):
        loss = dual(x).transfer_loss
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert dual.release() is student


def test_what_a_tower_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    dual = DualViT(tower("vit"), tower("vit"), "distill")
    with pytest.raises(GraftError, match="save_pretrained"):
        dual.save(tmp_path / "student")
    student = tower("vit")
    student.gradient_checkpointing_enable()
    with pytest.raises(TransferError, match="gradient_checkpointing"):
        DualViT(tower("vit"), student.train(), "distill")(images())
    swin = transformers.SwinModel(
        transformers.SwinConfig(image_size=32, patch_size=2, embed_dim=8, **SHALLOW)
    )
    for models in ((swin, tower("vit")), (tower("vit"), swin)):
        with pytest.raises(UnsupportedModelError, match="SwinModel"):
            DualViT(*models, "distill")


SHALLOW = {"depths": [1, 1], "num_heads": [1, 2], "window_size": 4}


# What is refused, and how.


def test_a_tower_without_a_classifier_learns_pooled_features() -> None:
    student = tower("dinov2")
    out = DualViT(tower("vit"), student, "feature")(images())
    expected = 1 - F.cosine_similarity(student(images()).pooler_output, out.logits, dim=-1)
    torch.testing.assert_close(expected, torch.zeros(2), atol=1e-5, rtol=0)
    assert float(out.transfer_loss) > 0
    same = DualViT(copy.deepcopy(student), student, "feature")(images())
    assert float(same.transfer_loss) == pytest.approx(0, abs=1e-5)


def test_a_backbone_is_refused_by_name() -> None:
    config = transformers.Dinov2Config(**SIZES)
    backbone = transformers.Dinov2Backbone(config)
    with pytest.raises(UnsupportedModelError, match="Dinov2Backbone"):
        DualViT(backbone, tower("vit"), "feature")
    with pytest.raises(UnsupportedModelError, match="AutoModel"):
        convert(backbone, "*: linear")


def test_maps_at_another_size_are_refused_in_our_words() -> None:
    with pytest.raises(UnsupportedModelError, match="40x40"):
        attention_maps(tower("vit"), images(size=(40, 40)))


def test_a_compiled_model_is_refused_with_what_to_do() -> None:
    compiled: Any = torch.compile(tower("vit"))
    for teacher, student in ((compiled, tower("vit")), (tower("vit"), compiled)):
        with pytest.raises(UnsupportedModelError, match="compile"):
            DualViT(teacher, student, "distill")
    with pytest.raises(UnsupportedModelError, match="compile"):
        convert(compiled, "*: linear")
