"""Files of AttnZero under the names of its code give, at any size, the numbers of the published equations."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from graftvit.checkpoints.pretrained import load_pretrained, load_weights
from graftvit.models.errors import CheckpointError, ConfigError
from graftvit.models.families import sites
from support.models import published_attnzero as published
from support.models.published_attnzero import CLASSES, Plain, Pyramid, Size, State
from support.models.pyramids import images

DEIT = Plain(heads=(2, 2, 2), hidden=(96, 96, 96))
AUTOFORMER = Plain(heads=(3, 4, 3), hidden=(84, 72, 96), autoformer=True)
PVT = Pyramid((8, 16, 24, 32), (1, 1, 1, 2), (1, 2, 3, 4), (1, 1, 1, 2))
SWIN = Pyramid((8, 16, 32, 64), (1, 1, 2, 1), (1, 2, 4, 8), (1, 1, 2, 0), window=2)
SWIN_B = replace(SWIN, depths=(1, 1, 4, 1), programs=(1, 1, 2, 0))
MODELS: dict[str, Plain | Pyramid] = {
    "attnzero_deit_t": DEIT,
    "attnzero_deit_t_bias": replace(DEIT, bias=True),
    "attnzero_autoformer_t": AUTOFORMER,
    "attnzero_pvt_t": PVT,
    "attnzero_pvt_t_bias": replace(PVT, bias=True),
    "attnzero_swin_t": SWIN,
    "attnzero_swin_t_bias": replace(SWIN, bias=True),
    "attnzero_swin_b": SWIN_B,
}
every_model = pytest.mark.parametrize("name", MODELS)


def arguments(name: str) -> dict[str, Any]:
    """What makes timm's model as small."""
    model = MODELS[name]
    if isinstance(model, Plain):
        ratios = [hidden / model.width for hidden in model.hidden]
        own = {"num_heads": model.heads, "mlp_ratio": ratios}
        alike = {"num_heads": model.heads[0], "depth": len(model.heads)}
        return {"embed_dim": model.width, **(own if model.autoformer else alike)}
    shape = {"depths": model.depths, "num_heads": model.heads}
    if "pvt" in name:
        return {**shape, "embed_dims": model.widths}
    return {**shape, "embed_dim": model.widths[0], "window_size": model.window}


def state_of(name: str, side: int = 64) -> State:
    model = MODELS[name]
    if isinstance(model, Plain):
        return published.plain_state(model, side)
    return published.pvt_state(model, side) if "pvt" in name else published.swin_state(model, side)


def logits(name: str, state: State, image: torch.Tensor) -> torch.Tensor:
    model = MODELS[name]
    if isinstance(model, Plain):
        return published.plain_logits(state, model, image)
    if "pvt" in name:
        return published.pvt_logits(state, model, image)
    return published.swin_logits(state, model, image)


def resized(name: str, state: State, size: Size, window: int = 0) -> State:
    if isinstance(MODELS[name], Plain):
        return published.resized(state, [(size[0] // 16, size[1] // 16)], "bicubic")
    grids = [(size[0] >> stage, size[1] >> stage) for stage in (2, 3, 4, 5)]
    return published.resized(state, grids, "bilinear", window)


def save(state: State, folder: Path) -> str:
    torch.save({"model": state, "epoch": 299, "args": Namespace(lr=1e-5)}, folder / "published.pth")
    return str(folder / "published.pth")


def check(model: Any, wanted: torch.Tensor, image: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model.double().eval()(image.double()), wanted, rtol=0, atol=1e-9)


@every_model
def test_logits_are_those_of_the_published_equations(tmp_path: Path, name: str) -> None:
    state, image = state_of(name), images((64, 64), 1)
    loaded = load_pretrained(save(state, tmp_path), model=name, model_args=arguments(name))
    left_out = {key for key in state if key.endswith("_index")}
    assert not loaded.report.missing
    assert loaded.report.unexpected.keys() == left_out
    assert loaded.report.loaded == len(state) - len(left_out) == len(loaded.model.state_dict())
    check(loaded.model, logits(name, state, image), image)


@pytest.mark.parametrize("size", [(64, 128), (192, 128), (384, 384)])
@every_model
def test_at_another_size_tables_are_resampled_as_published(tmp_path: Path, name: str, size: Size) -> None:
    state, image = state_of(name), images(size, 1)
    loaded = load_pretrained(
        save(state, tmp_path),
        model=name,
        model_args=arguments(name),
        img_size=size,
        position_embedding="published",
    )
    check(loaded.model, logits(name, resized(name, state, size), image), image)


def test_swin_is_fine_tuned_at_384_with_larger_windows(tmp_path: Path) -> None:
    """Windows of 2 become windows of 3, as those of 7 become windows of 12, with shifts."""
    name, size = "attnzero_swin_b", (384, 384)
    state, image = state_of(name), images(size, 1)
    larger = timm.create_model(
        name, num_classes=CLASSES, img_size=384, **{**arguments(name), "window_size": 3}
    )
    report = load_weights(larger, save(state, tmp_path), position_embedding="published")
    assert not report.missing
    table = "layers.2.blocks.3.attn.relative_position_bias_table"
    assert report.resampled[table] == "from 9 to 25 offsets (published bicubic)"
    MODELS["three"] = replace(SWIN_B, window=3)
    try:
        check(larger, logits("three", resized(name, state, size, 3), image), image)
    finally:
        del MODELS["three"]


@pytest.mark.parametrize("name", ["attnzero_pvt_t", "attnzero_pvt_t_bias"])
def test_maps_of_pvt_at_any_size_are_those_of_its_detectors(tmp_path: Path, name: str) -> None:
    """Positions are resampled in each call, bilinear, and a saved student still does it."""
    state, model = state_of(name), MODELS[name]
    assert isinstance(model, Pyramid)
    loaded = load_pretrained(
        save(state, tmp_path), model=name, model_args=arguments(name), position_embedding="published"
    )
    again = timm.create_model(name, **{**loaded.model_args, "pretrained_cfg": None})
    again.load_state_dict(loaded.model.state_dict())
    for size in ((96, 160), (64, 64)):
        image = images(size, 1)
        wanted = published.pvt_maps(resized(name, published.doubled(state), size), model, image)
        for each in (loaded.model.double(), again.double().eval()):
            found = each.forward_intermediates(image.double(), intermediates_only=True)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


@every_model
def test_a_model_that_starts_from_it_keeps_every_part(tmp_path: Path, name: str) -> None:
    state = state_of(name)
    model = timm.create_model(name, num_classes=CLASSES, img_size=64, **arguments(name)).eval()
    report = load_weights(model, save(state, tmp_path))
    assert not report.missing
    check(model, logits(name, state, images((64, 64), 1)), images((64, 64), 1))


FULL: dict[str, Plain | Pyramid] = {
    "attnzero_deit_t": Plain((3,) * 12, (768,) * 12, 192),
    "attnzero_deit_t_bias": Plain((3,) * 12, (768,) * 12, 192, bias=True),
    "attnzero_autoformer_t": Plain(
        (*(3,) * 10, 4, 3, 3),
        (672, 672, 576, 672, 576, 576, 768, 768, 672, 768, 672, 768, 672),
        192,
        autoformer=True,
    ),
    "attnzero_pvt_t": Pyramid((64, 128, 320, 512), (2, 2, 2, 2), (1, 2, 5, 8), (2, 2, 2, 2)),
    "attnzero_pvt_s": Pyramid((64, 128, 320, 512), (3, 4, 6, 3), (1, 2, 5, 8), (3, 4, 6, 3)),
    "attnzero_pvt_t_bias": Pyramid((64, 128, 320, 512), (2, 2, 2, 2), (1, 2, 5, 8), (2, 2, 2, 2), bias=True),
    "attnzero_swin_t": Pyramid((96, 192, 384, 768), (2, 2, 6, 2), (3, 6, 12, 24), (2, 2, 6, 0), 7),
    "attnzero_swin_t_bias": Pyramid(
        (96, 192, 384, 768), (2, 2, 6, 2), (3, 6, 12, 24), (2, 2, 6, 0), 7, bias=True
    ),
    "attnzero_swin_s": Pyramid((96, 192, 384, 768), (2, 2, 18, 2), (3, 6, 12, 24), (2, 2, 0, 0), 7),
    "attnzero_swin_b": Pyramid((128, 256, 512, 1024), (2, 2, 18, 2), (4, 8, 16, 32), (2, 2, 2, 0), 7),
    "attnzero_swin_b at 384": Pyramid((128, 256, 512, 1024), (2, 2, 18, 2), (4, 8, 16, 32), (2, 2, 2, 0), 12),
}
ENTRIES = {
    "attnzero_deit_t_bias": 224, "attnzero_pvt_t_bias": 174, "attnzero_swin_t_bias": 213, "attnzero_autoformer_t": 177,
}  # fmt: skip
SLOW = [name for name in FULL if "swin" in name or "pvt" in name]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in FULL])
def test_a_full_file_is_recognized_and_gives_the_published_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(published, "CLASSES", 1000)
    monkeypatch.setitem(MODELS, name, FULL[name])
    side = 384 if "384" in name else 224
    state = state_of(name, side)
    floats = {key: tensor for key, tensor in state.items() if tensor.is_floating_point()}
    assert len(floats) == ENTRIES.get(name, len(floats))
    loaded = load_pretrained(save(state, tmp_path))
    assert loaded.architecture == name.split()[0]
    assert loaded.preprocessing.input_size[1:] == (side, side)
    assert not loaded.report.missing
    assert loaded.report.loaded == len(floats)
    image = images((side, side), 1)
    check(loaded.model, logits(name, state, image), image)


def test_an_unknown_part_of_an_attention_layer_is_refused_and_not_called_needless(tmp_path: Path) -> None:
    state = state_of("attnzero_pvt_t")
    state["block1.0.attn.gate.weight"] = torch.zeros(8)
    model = timm.create_model("attnzero_pvt_t", num_classes=5, img_size=64, **arguments("attnzero_pvt_t"))
    with pytest.raises(CheckpointError, match=r"unexpected keys: stages\.0\.blocks\.0\.attn\.gate\.weight"):
        load_weights(model, save(state, tmp_path))


@pytest.mark.parametrize(("name", "key", "shape"), [
    ("attnzero_deit_t_bias", "pos_embed", (1, 0, 24)),
    ("attnzero_deit_t_bias", "pos_embed", ()),
    ("attnzero_deit_t_bias", "blocks.1.attn.ac_bias", (1, 2, 12)),
    ("attnzero_autoformer_t", "blocks.1.attn.qkv.weight", (72, 23)),
    ("attnzero_pvt_t_bias", "block1.0.attn.ha_bias", (1, 1, 15, 1, 8)),
    ("attnzero_swin_t_bias", "layers.3.blocks.0.attn.relative_position_bias_table", ()),
])  # fmt: skip
def test_a_tensor_of_another_shape_is_refused(
    tmp_path: Path, name: str, key: str, shape: tuple[int, ...]
) -> None:
    state = state_of(name)
    assert key in state
    state[key] = torch.zeros(shape)
    with pytest.raises(CheckpointError):
        load_pretrained(save(state, tmp_path), model=name, model_args=arguments(name), img_size=64)


def test_softmax_weights_leave_an_operator_fresh_and_say_so(tmp_path: Path) -> None:
    """The reduction of another PVT is dropped with its reason, and its layers are called what they are."""
    small = arguments("attnzero_pvt_t")
    whole = timm.create_model("pvt_tiny", num_classes=5, img_size=64, global_pool="avg", **small)
    state = {key: tensor for key, tensor in whole.state_dict().items() if not key.startswith("norm.")}
    torch.save(state, tmp_path / "pvt.pth")
    model = timm.create_model("attnzero_pvt_t", num_classes=5, img_size=64, **small)
    report = load_weights(model, str(tmp_path / "pvt.pth"))
    assert "softmax attention" in report.missing["stages.0.blocks.0.attn.operator.conv.weight"]
    assert report.unexpected["stages.0.blocks.0.attn.sr.weight"] == "attnzero_105 does not need it"


def test_layers_of_autoformer_have_their_own_heads() -> None:
    small = arguments("attnzero_autoformer_t")
    model = timm.create_model("attnzero_autoformer_t", img_size=64, **small)
    assert [(site.num_heads, site.head_dim) for site in sites(model)] == [(3, 8), (4, 6), (3, 8)]
    with pytest.raises(ConfigError, match="num_heads has values for 2 layers, and mlp_ratio for 3"):
        timm.create_model("attnzero_autoformer_t", **{**small, "num_heads": (3, 4)})
    with pytest.raises(ConfigError, match="num_heads=5 in a layer of width 24"):
        timm.create_model("attnzero_autoformer_t", **{**small, "num_heads": (3, 5, 3)})
