"""Models of timm of no family: their outputs teach and are taught, and their attention is refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from graftvit import convert, load
from graftvit.models import resize
from graftvit.models.errors import GraftError, TransferError, UnsupportedModelError
from graftvit.models.families import check_supported, depths, sites
from graftvit.transfer import DualViT
from support.runs.engine_runs import config, make_convnext, resume_cut
from torch import Tensor, nn

MODELS: dict[str, dict[str, Any]] = {
    "test_resnet": {},
    "test_convnext": {},
    "test_efficientnet": {},
    "test_mambaout": {},
    "poolformerv2_s12": {},
    "edgenext_xx_small": {},
    "coat_lite_tiny": {"img_size": 64},
    "xcit_nano_12_p16_224": {"img_size": 64, "depth": 2},
}


def model(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    made: nn.Module = timm.create_model(name, **{"num_classes": 5, **MODELS.get(name, {}), **changes}).eval()
    if name in MODELS and "img_size" not in MODELS[name]:
        resize(made, (64, 64))
    return made


def plain(**changes: Any) -> nn.Module:
    sizes = {"img_size": 64, "patch_size": 16, "depth": 3, "embed_dim": 16, "num_heads": 2, "num_classes": 5}
    return model("vit_tiny_patch16_224", **{**sizes, **changes})


def images(count: int = 2, size: int = 64) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


def size_of(name: str) -> int:
    return int(MODELS[name].get("img_size", 64))


def maps_of(each: Any, x: Tensor) -> list[Tensor]:
    found: list[Tensor] = each.forward_intermediates(x, intermediates_only=True)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_outputs_of_blocks_are_the_maps_that_timm_gives(name: str) -> None:
    teacher, student, x = model(name), model(name, seed=1), images(size=size_of(name))
    with torch.no_grad():
        logits = student(x)
    out = DualViT(teacher, student, "block_output").eval()(x)
    theirs, ours = maps_of(teacher, x), maps_of(student, x)
    assert len(out.parts) == len(theirs) == sum(depths(student))
    for index, found in enumerate(out.parts.values()):
        torch.testing.assert_close(found, F.mse_loss(ours[index], theirs[index]), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(out.logits, logits, rtol=1e-4, atol=1e-5)
    out.transfer_loss.backward()
    assert sum(parameter.grad is not None for parameter in student.parameters()) > 2


@pytest.mark.parametrize("name", MODELS)
def test_it_learns_features_and_classes(name: str) -> None:
    size = size_of(name)
    teacher, student, x = plain(img_size=size), model(name), images(size=size)
    losses = [{"method": "feature"}, {"method": "logits"}]
    out = DualViT(teacher, student, losses=losses)(x)
    out.transfer_loss.backward()
    assert out.terms.keys() == {"feature", "logits"}
    assert float(out.transfer_loss) > 0


@pytest.mark.parametrize("name", ["test_resnet", "test_mambaout", "xcit_nano_12_p16_224"])
def test_it_learns_features_of_patches(name: str) -> None:
    teacher, student = plain(), model(name)
    dual = DualViT(teacher, student, "feature", tokens="patches")
    torch.manual_seed(3)
    out = dual.eval()(images())
    out.transfer_loss.backward()
    assert float(out.transfer_loss) > 0
    same = DualViT(copy.deepcopy(student), dual.release(), "feature", tokens="patches").eval()
    assert float(same(images()).transfer_loss) == pytest.approx(0, abs=1e-5)


def test_a_vision_transformer_learns_from_maps_of_its_grid() -> None:
    teacher, student, x = model("test_resnet"), plain(), images()
    grids = [site.shape.geometry.grid for site in sites(teacher)]
    layer = grids.index((4, 4))
    dual = DualViT(teacher, student, "block_output", layers=f"{layer}>2")
    out = dual.eval()(x)
    out.transfer_loss.backward()
    tokens = student.forward_intermediates(x, indices=[2], intermediates_only=True)[0]  # type: ignore[operator]
    projected = dual.projectors["layer02"](tokens.flatten(2).transpose(1, 2))
    target = maps_of(teacher, x)[layer].flatten(2).transpose(1, 2)
    torch.testing.assert_close(out.parts["layer02"], F.mse_loss(projected, target))


def test_a_convolutional_student_learns_from_a_vision_transformer() -> None:
    teacher, student = plain(), model("test_resnet")
    layer = [site.shape.geometry.grid for site in sites(student)].index((4, 4))
    out = DualViT(teacher, student, "block_output", layers=f"1>{layer}")(images())
    out.transfer_loss.backward()
    assert float(out.transfer_loss) > 0


def test_grids_that_differ_are_refused_with_the_reason() -> None:
    with pytest.raises(TransferError, match="grid"):
        DualViT(model("test_resnet"), plain(), "block_output", layers="0>0")


@pytest.mark.parametrize("method", ["copy", "distill", "attention_output"])
def test_methods_of_attention_are_refused_by_name(method: str) -> None:
    with pytest.raises(UnsupportedModelError, match="ResNet"):
        DualViT(model("test_resnet"), plain(), method)
    with pytest.raises(UnsupportedModelError, match="ResNet"):
        DualViT(plain(), model("test_resnet"), method)


def test_attention_of_other_models_stays_refused() -> None:
    with pytest.raises(UnsupportedModelError):
        convert(model("test_resnet"), "*: linear")
    with pytest.raises(UnsupportedModelError):
        check_supported(model("xcit_nano_12_p16_224"))


def test_an_image_size_that_a_model_does_not_take_is_refused() -> None:
    with pytest.raises(GraftError):
        DualViT(model("coat_lite_tiny"), model("test_resnet"), "block_output")(images(size=50))


def test_the_student_is_let_go_as_it_was() -> None:
    student, x = model("test_resnet"), images()
    names = list(student.state_dict())
    dual = DualViT(model("test_resnet", seed=1), student, "block_output")
    twin = pickle.loads(pickle.dumps(dual))
    torch.testing.assert_close(twin(x).transfer_loss, dual(x).transfer_loss)
    released = dual.release()
    assert list(released.state_dict()) == names
    with torch.no_grad():
        torch.testing.assert_close(released(x), twin.student(x))


def test_it_compiles_and_is_checkpointed_with_the_same_numbers() -> None:
    student, x = model("test_resnet"), images()
    dual = DualViT(
        model("test_resnet", seed=1), student, losses=[{"method": "block_output"}, {"method": "feature"}]
    )
    dual.eval()
    plain_loss = dual(x).transfer_loss
    torch.testing.assert_close(
        torch.compile(dual, backend="eager", fullgraph=True)(x).transfer_loss, plain_loss
    )
    student.set_grad_checkpointing(True)  # type: ignore[operator]
    dual.student.train()
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    checkpointed = dual(x).transfer_loss
    checkpointed.backward()
    torch.testing.assert_close(checkpointed, plain_loss)


def test_a_run_teaches_a_network_of_convolutions_and_saves_it(tmp_path: Path) -> None:
    """The student resumes from a lost state with the same numbers, and is loaded as what it is."""
    teacher = make_convnext(tmp_path / "convnext")
    student = {"model": "test_convnext", "model_args": {"in_chans": 1}, "img_size": 32, "drop_path": 0.0}
    changes: dict[str, Any] = {
        "teacher": {"source": f"local-dir:{teacher}", "img_size": 32},
        "student": student,
        "transfer": {"method": "block_output", "layers": "all"},
    }
    whole = resume_cut(lambda folder: config(folder, teacher, **changes), tmp_path)
    loaded = load(whole / "student")
    assert type(loaded).__name__ == "ConvNeXt"
    assert loaded(torch.zeros(1, 1, 32, 32)).shape == (1, 10)
