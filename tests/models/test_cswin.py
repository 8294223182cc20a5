"""CSwin has its published sizes, and computes its paper's equations from files under its own names."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import graftvit.models.cswin  # noqa: F401  registers CSwin with timm
import pytest
import timm
import torch
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.models.errors import ConfigError
from graftvit.models.small import without_memory
from support.models.cswin_restated import (
    CSWIN,
    Published,
    State,
    feature_maps,
    logits,
    published_shapes,
    published_state,
)
from support.models.pyramids import images

TINY = Published(8, (1, 1, 2, 1), (2, 2, 4, 8), (1, 2, 2, 2), 64, 5)
ARGUMENTS: dict[str, Any] = {
    "embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (2, 2, 4, 8), "split_size": (1, 2, 2, 2),
}  # fmt: skip


def tiny(**more: Any) -> Any:
    return timm.create_model("cswin_tiny", **{**ARGUMENTS, "num_classes": 5, "img_size": 64, **more}).eval()


def save(state: State, folder: Path, key: str = "") -> str:
    path = folder / "cswin.pth"
    torch.save({key: state, "epoch": 299, "args": Namespace(lr=1e-5)} if key else state, path)
    return str(path)


def check(given: Published, path: str, size: tuple[int, int], name: str, **more: Any) -> None:
    state = published_state(given)
    loaded = load_pretrained(save(state, Path(path)), model=name, **more)
    assert (loaded.report.missing, loaded.report.unexpected, loaded.report.loaded) == ({}, {}, len(state))
    inputs = images(size, 1).double()
    with torch.no_grad():
        expected = logits(given, state, inputs)
        assert expected.std() > 0.1
        torch.testing.assert_close(loaded.model.double()(inputs), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (104, 136), (40, 24)])
def test_logits_are_those_of_the_published_equations(tmp_path: Path, size: tuple[int, int]) -> None:
    """At sizes that stripes do not divide, too: queries, keys and values are padded half on each side."""
    check(TINY, str(tmp_path), size, "cswin_tiny", model_args={**ARGUMENTS, "img_size": 64})


@pytest.mark.parametrize("size", [(104, 136), (64, 64)])
def test_maps_of_the_stages_are_those_of_the_published_equations(size: tuple[int, int]) -> None:
    state, model = published_state(TINY), timm.create_model("cswin_tiny", features_only=True, **ARGUMENTS)
    own = {key: state[key.replace(".attn.", ".")].double() for key in model.model.state_dict()}
    model.double().model.load_state_dict(own)
    inputs = images(size).double()
    with torch.no_grad():
        expected = feature_maps(TINY, {key: tensor.double() for key, tensor in state.items()}, inputs)
        torch.testing.assert_close(model(inputs), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", CSWIN)
@pytest.mark.parametrize("size", [(224, 224), (384, 384), (224, 160)])
def test_whole_models_are_the_published_ones(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    splits = (1, 2, 12, 12) if size[0] == 384 else (1, 2, 7, 7)
    given = replace(CSWIN[name], splits=splits, image=size[0])
    check(given, str(tmp_path), size, name, model_args={"split_size": splits, "img_size": size[0]})


@pytest.mark.parametrize("key", ["", "state_dict", "state_dict_ema", "model"])
def test_a_file_names_its_size_by_its_tensors(tmp_path: Path, key: str) -> None:
    """A file of any container; no tensor tells the size of the images."""
    with without_memory():
        state = {name: torch.empty(shape) for name, shape in published_shapes(CSWIN["cswin_tiny"]).items()}
    state = {name: torch.zeros(tensor.shape) for name, tensor in state.items()}
    path = save(state, tmp_path, key) + ("#ema" if key.endswith("ema") else "")
    loaded = load_pretrained(path, img_size=384, model_args={"split_size": (1, 2, 12, 12)})
    assert (loaded.architecture, loaded.report.loaded) == ("cswin_tiny", 418)
    assert loaded.preprocessing.input_size == (3, 384, 384)


@pytest.mark.parametrize("name", CSWIN)
def test_names_and_parameters_are_the_published_ones(name: str) -> None:
    with without_memory():
        model = timm.create_model(name)
    own = {key.replace(".attn.", "."): tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert own == published_shapes(CSWIN[name])
    sizes = {"cswin_tiny": 22_320_552, "cswin_small": 34_643_304, "cswin_base": 77_382_184}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == {**sizes, "cswin_large": 173_262_664}[name]


def test_an_image_size_changes_no_tensor() -> None:
    model = tiny()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.set_input_size((96, 64))
    assert model.patch_embed.img_size == (96, 64)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("more", [
    {"num_heads": (2, 2, 3, 8)}, {"num_heads": (1, 2, 4, 8)}, {"depths": (1, 1)}, {"global_pool": "token"},
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        tiny(**more)


def test_it_is_a_model_of_timm() -> None:
    model, inputs = tiny(drop_path_rate=0.1), images((64, 64))
    tokens, maps = model.forward_intermediates(inputs)
    assert torch.equal(model.forward_head(tokens), model(inputs))
    assert [tuple(each.shape[1:]) for each in maps] == [(8, 16, 16), (16, 8, 8), (32, 4, 4), (64, 2, 2)]
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert groups.keys() == dict(model.named_parameters()).keys()
    assert model.no_weight_decay() == set()
    model.reset_classifier(3)
    assert model(inputs).shape == (2, 3)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert model(inputs).shape == (2, 16)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = tiny().train()
        model.set_grad_checkpointing(checkpointed)
        model(images((64, 64))).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(gradient is not None for gradient in gradients[0])
    torch.testing.assert_close(*gradients)
