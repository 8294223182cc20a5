"""Files of LIT and LITv2 under their published names give the logits of the papers' equations."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from graftvit.checkpoints.formats.lit_keys import from_reference
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.models import lit
from graftvit.models.errors import CheckpointError
from graftvit.models.small import without_memory
from support.models.golden import golden_images, golden_state
from support.models.lit_restated import PUBLISHED, Published, published_shapes, restated_logits, ti_shapes
from torch import Tensor

HEADS = (3, 6, 12, 24)
SMALL = {
    name: Published(24, (2, 2, 6, 2), (12, 24), name == "litv2_s", 7, 64) for name in ("lit_s", "litv2_s")
}
ARGUMENTS: dict[str, Any] = {"embed_dim": 24, "num_heads": HEADS}
ENTRIES = {"lit_ti": 190, "lit_s": 171, "lit_m": 339, "lit_b": 339, "litv2_s": 219}


def wrapped(state: dict[str, Tensor], container: str, index: bool) -> Any:
    """Return a state dict in a container, with or without its index of relative positions."""
    tree: Any = {key: tensor for key, tensor in state.items() if index or not key.endswith("position_index")}
    if "module." in container:
        tree = {f"module.{key}": tensor for key, tensor in tree.items()}
    return {"model": tree} if "model" in container else tree


def check(model: Any, published: Published, state: dict[str, Tensor]) -> None:
    inputs = golden_images(published.image)
    with torch.no_grad():
        expected = restated_logits(published, state, inputs)
        assert expected.std() > 0.1
        torch.testing.assert_close(model.double().eval()(inputs.double()), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("index", [True, False], ids=["index", "no_index"])
@pytest.mark.parametrize("container", ["flat", "model", "module.", "model and module."])
def test_a_file_gives_the_restated_logits(tmp_path: Path, name: str, container: str, index: bool) -> None:
    state = golden_state(published_shapes(SMALL[name]))
    torch.save(wrapped(state, container, index), tmp_path / "published.pth")
    size = 64 if name == "litv2_s" else None
    teacher = load_pretrained(
        str(tmp_path / "published.pth"), model=name, model_args=ARGUMENTS, img_size=size
    )
    check(teacher.model, SMALL[name], state)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("index", [True, False], ids=["index", "no_index"])
@pytest.mark.parametrize("container", ["flat", "model", "module.", "model and module."])
def test_a_state_dict_gives_the_restated_logits(name: str, container: str, index: bool) -> None:
    state = golden_state(published_shapes(SMALL[name]))
    model = timm.create_model(name, img_size=64, num_classes=7, **ARGUMENTS)
    model.load_state_dict(from_reference(wrapped(state, container, index)))
    check(model, SMALL[name], state)


@pytest.mark.parametrize(("name", "side"), [("lit_s", 80), ("lit_s", 112), ("litv2_s", 96)])
def test_an_odd_grid_gives_the_restated_logits(tmp_path: Path, name: str, side: int) -> None:
    """Sides of 10 and 5, of 7 and 3, and of 6 and 3 tokens in stages 3 and 4."""
    published = replace(SMALL[name], image=side)
    state = golden_state(published_shapes(published))
    torch.save(state, tmp_path / "published.pth")
    size = side if name == "litv2_s" else None
    teacher = load_pretrained(
        str(tmp_path / "published.pth"), model=name, model_args=ARGUMENTS, img_size=size
    )
    check(teacher.model, published, state)


@pytest.mark.parametrize("name", ["lit_ti", *PUBLISHED])
def test_every_published_name_has_its_place(name: str) -> None:
    shapes = ti_shapes() if name == "lit_ti" else published_shapes(PUBLISHED[name])
    assert len(shapes) == ENTRIES.get(name, len(shapes))
    with without_memory():
        ours = timm.create_model(name).state_dict()
    loaded = from_reference(shapes)
    assert {key: loaded[key].shape for key in loaded} == {key: ours[key].shape for key in ours}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_full_file_is_loaded_at_its_size(tmp_path: Path, name: str) -> None:
    state = golden_state(published_shapes(PUBLISHED[name]))
    torch.save({"model": state}, tmp_path / "published.pth")
    teacher = load_pretrained(str(tmp_path / "published.pth"))
    assert teacher.architecture == name
    check(teacher.model, PUBLISHED[name], state)


@pytest.mark.slow
def test_a_full_file_of_lit_ti_is_loaded(tmp_path: Path) -> None:
    """Its logits are those of `test_lit.py`."""
    torch.save({"model": golden_state(ti_shapes())}, tmp_path / "published.pth")
    teacher = load_pretrained(str(tmp_path / "published.pth"))
    assert teacher.architecture == "lit_ti"
    first = teacher.model(golden_images(224))[0, :4]
    expected = torch.tensor([-0.285823, 1.683032, -0.074269, 0.180008])
    torch.testing.assert_close(first, expected, rtol=0, atol=2e-4)


def test_a_training_file_of_lit_with_settings_of_yacs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published trainer pickles its `CfgNode`; the weights alone are loaded."""
    kind = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    with monkeypatch.context() as patched:
        for name in ("yacs", "yacs.config"):
            patched.setitem(sys.modules, name, ModuleType(name))
        patched.setattr(sys.modules["yacs.config"], "CfgNode", kind, raising=False)
        torch.save({"model": {"norm.weight": torch.ones(2)}, "config": kind(epochs=1)}, tmp_path / "lit.pth")
    with pytest.raises(CheckpointError, match=r"holds yacs\.config\.CfgNode, .*; save the weights alone"):
        load_pretrained(str(tmp_path / "lit.pth"))


def test_the_published_models_are_restated() -> None:
    assert {"lit_ti", *PUBLISHED} == set(lit.default_cfgs)
