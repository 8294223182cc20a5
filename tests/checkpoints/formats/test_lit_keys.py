"""Files of PVT, LIT and EcoFormer under their published names give the numbers of their papers' equations."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from graftvit.checkpoints.formats.lit_keys import from_reference, to_reference
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.models import lit
from graftvit.models.conversion import plan_of
from graftvit.models.errors import CheckpointError, UnsupportedModelError
from graftvit.models.small import without_memory
from support.models import published_ecoformer as ecoformer
from support.models.golden import golden_images, golden_state
from support.models.lit_restated import (
    PUBLISHED,
    Published,
    published_shapes,
    resized_table,
    restated_logits,
    ti_shapes,
)
from support.models.published_ecoformer import drawn, published_state
from support.models.pyramids import images
from torch import Tensor

TINY: dict[str, dict[str, Any]] = {
    "pvt_tiny": {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4)},
    "lit_ti": {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4)},
    "lit_s": {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)},
    "litv2_s": {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)},
}


def published(name: str, side: int = 64) -> dict[str, Tensor]:
    model = timm.create_model(name, num_classes=5, img_size=side, **TINY[name])
    state = golden_state(to_reference(model))
    for key in [key for key in state if key.endswith("relative_position_bias_table")]:
        state[key.replace("bias_table", "index")] = torch.zeros(4, 4, dtype=torch.int64)
    return state


@pytest.mark.parametrize("name", TINY)
def test_there_and_back(name: str) -> None:
    state = published(name)
    model = timm.create_model(name, num_classes=5, img_size=64, **TINY[name])
    model.load_state_dict(from_reference(state))
    back = to_reference(model)
    assert back.keys() == {key for key in state if not key.endswith("relative_position_index")}
    assert all(torch.equal(back[key], state[key]) for key in back)


@pytest.mark.parametrize("name", ["pvt_tiny", "lit_ti"])
@pytest.mark.parametrize("wrapped", ["flat", "model", "module."])
def test_a_file_is_loaded_from_any_container(tmp_path: Path, name: str, wrapped: str) -> None:
    state = published(name)
    tree: Any = {f"module.{key}": tensor for key, tensor in state.items()} if wrapped == "module." else state
    if wrapped == "model":
        tree = {"model": state, "epoch": 3, "args": Namespace(lr=0.1)}
    torch.save(tree, tmp_path / "published.pth")
    teacher = load_pretrained(str(tmp_path / "published.pth"), model=name, model_args=TINY[name])
    assert teacher.model_args["num_classes"] == 5
    own = timm.create_model(name, num_classes=5, img_size=64, **TINY[name]).eval()
    own.load_state_dict(from_reference(state))
    inputs = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(teacher.model(inputs), own(inputs), rtol=1e-5, atol=1e-5)
    larger = load_pretrained(
        str(tmp_path / "published.pth"), model=name, model_args=TINY[name], img_size=(64, 96)
    ).model
    assert larger(torch.randn(1, 3, 64, 96)).shape == (1, 5)


def test_what_is_no_lit_is_refused() -> None:
    with pytest.raises(CheckpointError, match="the keys of no PVT, LIT or LITv2"):
        from_reference({"blocks.0.norm1.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="VisionTransformer is no PVT, LIT or LITv2"):
        to_reference(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32))
    state = published("lit_ti")
    state["block3.0.attn.qkv.weight"] = state["block3.0.attn.qkv.weight"][:-1]
    with pytest.raises(CheckpointError, match=r"qkv\.weight is \(71, 24\), which are not three equal parts"):
        from_reference(state)


@pytest.mark.parametrize(("key", "shape", "words"), [
    ("layers.2.blocks.0.attn.l_q.weight", (), r"l_q\.weight is \(\), which are no rows"),
    ("layers.2.blocks.0.attn.l_q.weight", (7, 3), r"l_q\.weight and .*l_kv\.weight are not of one width"),
    ("layers.2.blocks.0.attn.l_kv.weight", (), r"l_kv\.weight is \(\), which are not two equal parts"),
    ("layers.2.blocks.0.attn.h_qkv.weight", (7, 3), r"is \(7, 3\), which are not three equal parts"),
])  # fmt: skip
def test_projections_of_another_shape_are_refused(key: str, shape: tuple[int, ...], words: str) -> None:
    state = published("litv2_s")
    assert key in state
    state[key] = torch.zeros(shape)
    with pytest.raises(CheckpointError, match=words):
        from_reference(state)


def test_a_table_without_rows_gives_no_image_size() -> None:
    state = published("lit_s")
    state["layers.2.blocks.0.attn.relative_position_bias_table"] = torch.zeros(())
    assert from_reference(state)["layers.2.blocks.0.attn.relative_position_bias_table"].ndim == 0


# Files of LIT and LITv2 under their published names give the logits of the papers' equations.


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


def load(name: str, tree: Any, folder: Path, side: int) -> Any:
    torch.save(tree, folder / "published.pth")
    size = side if name == "litv2_s" else None  # no tensor of LITv2 shows the size of its images
    return load_pretrained(
        str(folder / "published.pth"), model=name, model_args=ARGUMENTS, img_size=size
    ).model


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("index", [True, False], ids=["index", "no_index"])
@pytest.mark.parametrize("container", ["flat", "model", "module.", "model and module."])
def test_a_file_gives_the_restated_logits(tmp_path: Path, name: str, container: str, index: bool) -> None:
    state = golden_state(published_shapes(SMALL[name]))
    tree = wrapped(state, container, index)
    check(load(name, tree, tmp_path, 64), SMALL[name], state)
    model = timm.create_model(name, img_size=64, num_classes=7, **ARGUMENTS)
    model.load_state_dict(from_reference(tree))
    check(model, SMALL[name], state)


@pytest.mark.parametrize(("name", "side"), [("lit_s", 80), ("lit_s", 112), ("litv2_s", 96)])
def test_an_odd_grid_gives_the_restated_logits(tmp_path: Path, name: str, side: int) -> None:
    """Sides of 10 and 5, of 7 and 3, and of 6 and 3 tokens in stages 3 and 4."""
    published = replace(SMALL[name], image=side)
    state = golden_state(published_shapes(published))
    check(load(name, state, tmp_path, side), published, state)


def published_at(side: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of LIT-S with the tables that its detectors have for images of `side`."""
    tables = {key: side >> (int(key[7]) + 2) for key in state if key.endswith("bias_table") and side != 64}
    return state | {key: resized_table(state[key], grid, grid) for key, grid in tables.items()}


@pytest.mark.parametrize("side", [64, 128])
def test_lit_s_takes_any_grid_as_its_detectors_do(tmp_path: Path, side: int) -> None:
    """Tables are resampled to the size of the model as they are loaded, and to the grid in each call."""
    state = golden_state(published_shapes(SMALL["lit_s"]))
    torch.save(state, tmp_path / "published.pth")
    arguments = {**ARGUMENTS, "strict_img_size": False}
    loaded = load_pretrained(
        str(tmp_path / "published.pth"),
        model="lit_s",
        model_args=arguments,
        img_size=side,
        position_embedding="published",
    )
    model, tables = loaded.model.double(), published_at(side, state)
    assert len(loaded.report.resampled) == (8 if side > 64 else 0)
    for size in ((96, 160), (96, 160), (side, side), (160, 96)):
        image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).double()
        with torch.no_grad():
            wanted = restated_logits(SMALL["lit_s"], tables, image)
            torch.testing.assert_close(model(image), wanted, rtol=0, atol=1e-9)


def test_the_kept_table_follows_its_weights() -> None:
    model: Any = timm.create_model("lit_s", img_size=64, strict_img_size=False, **ARGUMENTS).eval()
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    layer = model.layers[2].blocks[0].attn
    table = layer.relative_position_bias_table
    with torch.no_grad():
        model(image)
        kept = layer._resampled[2]
        model(image)
        assert layer._resampled[2] is kept
        table.add_(1)
        model(image)
        torch.testing.assert_close(layer._resampled[2], kept + 1)
    model(image).sum().backward()
    assert table.grad is not None
    assert bool(table.grad.any())


@pytest.mark.parametrize("name", ["pvt_tiny", "lit_ti"])
@pytest.mark.parametrize("fixed", [True, False], ids=["resized", "in each call"])
def test_pvt_has_the_positions_of_its_detectors(tmp_path: Path, name: str, fixed: bool) -> None:
    """They have no class token, and resample positions bilinear; the maps of the stages have no norm."""
    state, size = published(name), (96, 160)
    torch.save(state, tmp_path / "published.pth")
    arguments = {**TINY[name], "global_pool": "avg"}
    loaded = load_pretrained(
        str(tmp_path / "published.pth"),
        model=name,
        model_args=arguments,
        num_classes=0,
        img_size=size if fixed else None,
        position_embedding="published",
    )
    assert "no class token" in loaded.report.unexpected["stages.3.cls_token"]
    wanted = timm.create_model(name, img_size=size, num_classes=0, **arguments).eval()
    own = {key: tensor for key, tensor in from_reference(state).items() if key in wanted.state_dict()}
    for stage in range(4):
        side, grid = 16 >> stage, (24 >> stage, 40 >> stage)
        table = state[f"pos_embed{stage + 1}"][:, -side * side :].double()
        image = F.interpolate(table.mT.unflatten(2, (side, side)), grid, mode="bilinear", align_corners=False)
        own[f"stages.{stage}.pos_embed"] = image.flatten(2).mT
    wanted.double().load_state_dict(own)
    inputs = images(size).double()
    with torch.no_grad():
        found = loaded.model.double().forward_intermediates(inputs, intermediates_only=True)
        torch.testing.assert_close(
            found,
            wanted.forward_intermediates(inputs, intermediates_only=True),
            rtol=0,
            atol=1e-6 if fixed else 1e-9,
        )


def test_a_position_of_another_shape_is_refused_with_its_class_token(tmp_path: Path) -> None:
    torch.save(published("pvt_tiny") | {"pos_embed4": torch.zeros(())}, tmp_path / "published.pth")
    arguments = {**TINY["pvt_tiny"], "global_pool": "avg"}
    with pytest.raises(CheckpointError, match="pos_embed"):
        load_pretrained(str(tmp_path / "published.pth"), model="pvt_tiny", model_args=arguments, img_size=64)


@pytest.mark.parametrize("name", lit.default_cfgs)
def test_every_published_name_has_its_place(name: str) -> None:
    shapes = ti_shapes() if name == "lit_ti" else published_shapes(PUBLISHED[name])
    assert len(shapes) == ENTRIES.get(name, len(shapes))
    with without_memory():
        ours = timm.create_model(name).state_dict()
    loaded = from_reference(shapes)
    assert {key: loaded[key].shape for key in loaded} == {key: ours[key].shape for key in ours}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lit_m", "litv2_b"])
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


def save(state: dict[str, Tensor], folder: Path) -> str:
    torch.save({"model": state, "epoch": 299, "args": Namespace(lr=1e-5)}, folder / "published.pth")
    return str(folder / "published.pth")


# EcoFormer's published weights, under their own names, give what the published equations give.


ENTRIES_OF_ECOFORMER = {
    "pvt_v2_b0": 174, "twins_svt_small": 328, "pvt_v2_b1": 174, "pvt_v2_b2": 328, "pvt_v2_b3": 568, "pvt_v2_b4": 828,
}  # fmt: skip
SMALLEST = list(ENTRIES_OF_ECOFORMER)[:2]
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_the_equations_give_the_golden_values_of_one_layer() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "fast_attention.ksh.A": (2, 16, 25),
        "fast_attention.ksh.mvec": (1, 2, 1, 25),
        "fast_attention.ksh.anchor": (1, 2, 25, 32),
    }
    for part in ("to_qk", "to_v", "proj"):
        shapes |= {f"{part}.weight": (64, 64), f"{part}.bias": (64,)}
    state = {f"layer.{key}": drawn(key, shape).double() for key, shape in shapes.items()}
    tokens = torch.tensor(np.random.RandomState(1).standard_normal((2, 49, 64))).float().double()
    out = ecoformer.attention(state, "layer", tokens)
    golden = [0.029204, -0.000624, -0.131941, -0.069126, 0.095423, 0.070532, 0.067501, 0.039182]
    torch.testing.assert_close(out[0, 0, :8], torch.tensor(golden).double(), rtol=0, atol=1e-6)
    assert float(out.sum()) == pytest.approx(-119.24393, abs=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        each if each in SMALLEST else pytest.param(each, marks=pytest.mark.slow)
        for each in ENTRIES_OF_ECOFORMER
    ],
)
def test_logits_are_those_of_the_published_code(name: str, tmp_path: Path) -> None:
    state = published_state(name)
    assert len(state) == ENTRIES_OF_ECOFORMER[name]
    loaded = load_pretrained(save(state, tmp_path), img_size=64)
    assert loaded.model_args["architecture"] == name
    unread = {key for key in state if key.endswith("projection_matrix")}
    assert len(loaded.report.unexpected) == len(unread) > 0
    model = loaded.model.double()
    with torch.no_grad():
        found = model(IMAGES.double())
    wanted = ecoformer.published_logits(state, IMAGES, pvt="pvt" in name)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", SMALLEST)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_flat_and_distributed_files_load_too(name: str, prefix: str, tmp_path: Path) -> None:
    state = published_state(name)
    torch.save({prefix + key: tensor for key, tensor in state.items()}, tmp_path / "flat.pth")
    loaded = load_pretrained(str(tmp_path / "flat.pth"))
    assert not loaded.report.missing
    assert len(loaded.report.unexpected) == sum(key.endswith("projection_matrix") for key in state)
    wrapped = load_pretrained(save(state, tmp_path)).model.state_dict()
    torch.testing.assert_close(dict(loaded.model.state_dict()), dict(wrapped), rtol=0, atol=0)


def test_the_plan_says_what_the_model_is(tmp_path: Path) -> None:
    state = published_state("pvt_v2_b0")
    model = load_pretrained(save(state, tmp_path)).model
    assert plan_of(model) == "0-5: hash(mode=reference); 6-7: keep"
    halved = {key: tensor[:, :8] if key.endswith("ksh.A") else tensor for key, tensor in state.items()}
    model = load_pretrained(save(halved, tmp_path)).model
    assert plan_of(model) == "0-5: hash(bits=8, mode=reference); 6-7: keep"


def test_weights_that_were_never_hashed_load_and_do_not_run(tmp_path: Path) -> None:
    """Their anchors are zeros: the file of the first training step."""
    state = published_state("pvt_v2_b0")
    state |= {key: torch.zeros_like(tensor) for key, tensor in state.items() if key.endswith("anchor")}
    model = load_pretrained(save(state, tmp_path)).model
    with pytest.raises(UnsupportedModelError, match="not fitted"):
        model(IMAGES)


def test_unknown_sizes_and_missing_values_are_refused(tmp_path: Path) -> None:
    state = published_state("pvt_v2_b0")
    shallow = {key: tensor for key, tensor in state.items() if not key.startswith("block2.1.")}
    with pytest.raises(CheckpointError, match=r"\(2, 1, 2, 2\) blocks, .* pvt_v2_b0, pvt_v2_b1"):
        load_pretrained(save(shallow, tmp_path))
    del state["block1.0.attn.to_v.weight"]
    with pytest.raises(CheckpointError, match=r"stages\.0\.blocks\.0\.attn\.kv\.weight"):
        load_pretrained(save(state, tmp_path))
    twins = published_state("twins_svt_small")
    del twins["blocks.1.0.attn.to_v.bias"]
    with pytest.raises(CheckpointError, match=r"blocks\.1\.0\.attn\.to_qk\.bias without .*to_v\.bias"):
        load_pretrained(save(twins, tmp_path))
