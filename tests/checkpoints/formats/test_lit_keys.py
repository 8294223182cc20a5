"""Files of PVT and LIT under their published names are loaded by any loader, and written back the same."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from graftvit.checkpoints.formats.lit_keys import from_reference, to_reference
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.models.errors import CheckpointError
from graftvit.models.small import without_memory
from support.models.golden import golden_state
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


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("wrapped", ["flat", "model", "module."])
def test_a_file_is_loaded_from_any_container(tmp_path: Path, name: str, wrapped: str) -> None:
    state = published(name)
    tree: Any = {f"module.{key}": tensor for key, tensor in state.items()} if wrapped == "module." else state
    if wrapped == "model":
        tree = {"model": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(tree, tmp_path / "published.pth")
    size = 64 if name == "litv2_s" else None  # no tensor of LITv2 shows the size of its images
    teacher = load_pretrained(
        str(tmp_path / "published.pth"), model=name, model_args=TINY[name], img_size=size
    )
    assert teacher.model_args["num_classes"] == 5
    own = timm.create_model(name, num_classes=5, img_size=64, **TINY[name]).eval()
    own.load_state_dict(from_reference(state))
    inputs = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(teacher.model(inputs), own(inputs), rtol=1e-5, atol=1e-5)
    larger = load_pretrained(
        str(tmp_path / "published.pth"), model=name, model_args=TINY[name], img_size=(64, 96)
    ).model
    assert larger(torch.randn(1, 3, 64, 96)).shape == (1, 5)


def test_the_schemes_of_the_published_sizes() -> None:
    """Key patterns of the published files, written out by hand."""
    with without_memory():
        ti, s = (set(to_reference(timm.create_model(name))) for name in ("lit_ti", "lit_s"))
    assert {
        "pos_embed1",
        "pos_embed4",
        "cls_token",
        "patch_embed1.proj.weight",
        "patch_embed1.norm.bias",
    } <= ti
    assert {"patch_embed4.dconv.conv_offset.bias", "patch_embed2.norm_layer.running_var"} <= ti
    assert {"block1.2.norm2.weight", "block3.5.attn.qkv.bias", "block4.0.attn.proj.weight", "head.bias"} <= ti
    assert not any(key.startswith(("block1.0.norm1", "block2.0.attn")) for key in ti)
    assert {"layers.0.downsample.dconv.weight", "layers.2.downsample.norm_layer.num_batches_tracked"} <= s
    assert {"layers.0.blocks.0.norm2.weight", "layers.3.blocks.1.attn.relative_position_bias_table"} <= s
    assert {"patch_embed.proj.weight", "patch_embed.norm.bias", "norm.weight", "head.weight"} <= s
    assert len(ti) == 190
    assert len(s) + 8 == 171, "without the index of each of its 8 layers"


def test_the_scheme_of_litv2() -> None:
    with without_memory():
        keys = to_reference(timm.create_model("litv2_s"))
    assert len(keys) == 219
    shapes = {
        key: tuple(tensor.shape) for key, tensor in keys.items() if key.startswith("layers.2.blocks.0.attn")
    }
    assert shapes == {
        f"layers.2.blocks.0.attn.{part}.{kind}": (rows, columns) if kind == "weight" else (rows,)
        for part, rows, columns in (
            ("h_qkv", 192, 384), ("l_q", 320, 384), ("l_kv", 640, 384), ("h_proj", 64, 64), ("l_proj", 320, 320)
        )
        for kind in ("weight", "bias")
    }  # fmt: skip
    assert "layers.3.blocks.0.attn.l_kv.weight" in keys
    assert "layers.0.blocks.0.mlp.dwconv.dwconv.weight" in keys


def test_litv2_is_its_published_equation() -> None:
    """One layer in the published names: pool, then project; high heads in windows; two projections."""
    torch.manual_seed(0)
    state = published("litv2_s")
    model: Any = timm.create_model("litv2_s", num_classes=5, img_size=64, **TINY["litv2_s"])
    model.load_state_dict(from_reference(state))
    layer, name = model.layers[2].blocks[0].attn.double(), "layers.2.blocks.0.attn"
    x = torch.randn(2, 4, 4, 32, dtype=torch.float64)

    def linear(x: Tensor, part: str) -> Tensor:
        return x @ state[f"{name}.{part}.weight"].double().T + state[f"{name}.{part}.bias"].double()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (-1, 8)).transpose(-2, -3) for each in (q, k, v))
        weights = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1)
        return (weights @ v).transpose(-2, -3).flatten(-2)

    windows = x.unflatten(2, (2, 2)).unflatten(1, (2, 2)).transpose(2, 3).flatten(3, 4)
    high = attend(*linear(windows, "h_qkv").chunk(3, -1))
    high = high.unflatten(3, (2, 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    pooled = torch.nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)
    low = attend(linear(x.flatten(1, 2), "l_q"), *linear(pooled, "l_kv").chunk(2, -1)).unflatten(1, (4, 4))
    expected = torch.cat([linear(high, "h_proj"), linear(low, "l_proj")], -1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-8, atol=1e-9)


def test_what_is_no_lit_is_refused() -> None:
    with pytest.raises(CheckpointError, match="the keys of no PVT, LIT or LITv2"):
        from_reference({"blocks.0.norm1.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="VisionTransformer is no PVT, LIT or LITv2"):
        to_reference(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32))
    state = published("lit_ti")
    state["block3.0.attn.qkv.weight"] = state["block3.0.attn.qkv.weight"][:-1]
    with pytest.raises(CheckpointError, match=r"qkv\.weight is \(71, 24\), which are not three equal parts"):
        from_reference(state)


@pytest.mark.parametrize(
    ("key", "shape", "words"),
    [
        ("layers.2.blocks.0.attn.l_q.weight", (), r"l_q\.weight is \(\), which are no rows"),
        ("layers.2.blocks.0.attn.l_q.weight", (7, 3), r"l_q\.weight and .*l_kv\.weight are not of one width"),
        ("layers.2.blocks.0.attn.l_kv.weight", (), r"l_kv\.weight is \(\), which are not two equal parts"),
        ("layers.2.blocks.0.attn.h_qkv.weight", (7, 3), r"is \(7, 3\), which are not three equal parts"),
    ],
)
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
