"""Files of AttnZero's PVT and Swin under the names of its code give the numbers of the published equations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from graftvit.checkpoints.pretrained import load_pretrained, load_weights
from graftvit.models.errors import CheckpointError
from graftvit.models.small import without_memory
from support.models.golden import golden_state
from support.models.pyramids import images
from torch import Tensor

State = dict[str, Tensor]
WIDTHS, DEPTHS, HEADS = (8, 16, 24, 32), (1, 1, 1, 2), (1, 2, 3, 4)
TINY: dict[str, Any] = {"embed_dims": WIDTHS, "depths": DEPTHS, "num_heads": HEADS}
SWIN: dict[str, Any] = {"embed_dim": 8, "depths": (1, 1, 3, 1), "num_heads": (1, 2, 4, 8)}


def published_pvt(
    widths: tuple[int, ...] = WIDTHS, depths: tuple[int, ...] = DEPTHS, side: int = 64
) -> State:
    """Return drawn weights under the names of AttnZero's code, written out by hand."""
    shapes: dict[str, tuple[int, ...]] = {"head.weight": (5, widths[3]), "head.bias": (5,)}
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        before, patch = (widths[stage - 1], 2) if stage else (3, 4)
        shapes |= {
            f"pos_embed{stage + 1}": (1, (side // (4 << stage)) ** 2, width),
            f"patch_embed{stage + 1}.proj.weight": (width, before, patch, patch),
            f"patch_embed{stage + 1}.proj.bias": (width,),
            f"patch_embed{stage + 1}.norm.weight": (width,),
            f"patch_embed{stage + 1}.norm.bias": (width,),
        }
        hidden = (8, 8, 4, 4)[stage] * width
        for block in range(depth):
            linear = {"attn.q": (width, width), "attn.kv": (2 * width, width), "attn.proj": (width, width)}
            linear |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
            for name, shape in {
                **linear,
                "attn.dwc": (width, 1, 3, 3),
                "norm1": (width,),
                "norm2": (width,),
            }.items():
                shapes[f"block{stage + 1}.{block}.{name}.weight"] = shape
                shapes[f"block{stage + 1}.{block}.{name}.bias"] = shape[:1]
    return golden_state({name: torch.empty(shape) for name, shape in shapes.items()})


def norm(state: State, name: str, x: Tensor, epsilon: float = 1e-6) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], epsilon)


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def attention(state: State, name: str, x: Tensor, side: int, heads: int) -> Tensor:
    """O = Q * L2(L2(Q) Z(mm(V)' φ(K))) and a depthwise convolution of V, then the output projection."""
    width = x.shape[2]
    k, v = linear(state, f"{name}.kv", x).chunk(2, -1)
    parts = (linear(state, f"{name}.q", x), k, v)
    q, k, u = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in parts)
    scaled = (u - u.min()) / (u.max() - u.min() + 1e-9)
    mixed = scaled.transpose(2, 3) @ (F.elu(k) + 1)
    mixed = (mixed - mixed.mean()) / mixed.std()
    out = q * F.normalize(F.normalize(q, dim=-1) @ mixed, dim=-1)
    grid = v.transpose(1, 2).reshape(1, width, side, side)
    local = F.conv2d(grid, state[f"{name}.dwc.weight"], state[f"{name}.dwc.bias"], padding=1, groups=width)
    return linear(state, f"{name}.proj", out.transpose(1, 2).flatten(2) + local.flatten(2).transpose(1, 2))


def published_logits(state: State, image: Tensor) -> Tensor:
    """The forward pass of one image, in float64: AttnZero's code takes statistics over the whole batch."""
    state, x = {name: tensor.double() for name, tensor in state.items()}, image.double()
    for stage, heads in enumerate(HEADS, 1):
        embedding, patch = f"patch_embed{stage}", 4 if stage == 1 else 2
        x = F.conv2d(x, state[f"{embedding}.proj.weight"], state[f"{embedding}.proj.bias"], stride=patch)
        side = x.shape[2]
        tokens = (
            norm(state, f"{embedding}.norm", x.flatten(2).transpose(1, 2), 1e-5) + state[f"pos_embed{stage}"]
        )
        for block in range(DEPTHS[stage - 1]):
            name = f"block{stage}.{block}"
            tokens = tokens + attention(
                state, f"{name}.attn", norm(state, f"{name}.norm1", tokens), side, heads
            )
            hidden = F.gelu(linear(state, f"{name}.mlp.fc1", norm(state, f"{name}.norm2", tokens)))
            tokens = tokens + linear(state, f"{name}.mlp.fc2", hidden)
        x = tokens.transpose(1, 2).unflatten(2, (side, side))
    return linear(state, "head", x.flatten(2).mean(2))


def save(state: State, folder: Path) -> str:
    torch.save({"model": state, "epoch": 299}, folder / "published.pth")
    return str(folder / "published.pth")


def test_logits_of_pvt_are_those_of_the_published_equations(tmp_path: Path) -> None:
    state, image = published_pvt(), images((64, 64), 1)
    loaded = load_pretrained(save(state, tmp_path), model="attnzero_pvt_t", model_args=TINY)
    assert (loaded.report.missing, loaded.report.unexpected, loaded.report.loaded) == ({}, {}, len(state))
    torch.testing.assert_close(loaded.model.double()(image.double()), published_logits(state, image))


def test_a_model_that_starts_from_it_keeps_every_convolution(tmp_path: Path) -> None:
    state = published_pvt()
    model = timm.create_model("attnzero_pvt_t", num_classes=5, img_size=64, **TINY).eval()
    report = load_weights(model, save(state, tmp_path))
    assert not report.missing
    assert not report.unexpected
    own = model.state_dict()["stages.3.blocks.1.attn.operator.conv.weight"]
    torch.testing.assert_close(own, state["block4.1.attn.dwc.weight"])


@pytest.mark.parametrize(
    ("name", "depths"), [("attnzero_pvt_t", (2, 2, 2, 2)), ("attnzero_pvt_s", (3, 4, 6, 3))]
)
def test_the_convolutions_tell_it_from_other_pvts(tmp_path: Path, name: str, depths: tuple[int, ...]) -> None:
    state = published_pvt((64, 128, 320, 512), depths, 224)
    assert sum(key.endswith("attn.dwc.weight") for key in state) == sum(depths)
    loaded = load_pretrained(save(state, tmp_path))
    assert loaded.architecture == name
    assert loaded.report.loaded == len(state)


def published_swin(model: Any) -> State:
    """Rename timm's and our names to those of Swin's code, which AttnZero keeps."""
    state: State = {}
    for key, tensor in golden_state(model.state_dict()).items():
        head, _, rest = (
            key.replace("head.fc.", "head.").replace("attn.operator.conv.", "attn.dwc.").partition(".")
        )
        stage, _, part = rest.partition(".")
        moved = f"layers.{int(stage) - 1}.{part}" if part.startswith("downsample") else f"{head}.{rest}"
        state[moved] = tensor
        if key.endswith("relative_position_bias_table"):
            state[moved.replace("bias_table", "index")] = torch.zeros(4, 4, dtype=torch.int64)
    state["layers.2.blocks.1.attn_mask"] = torch.zeros(4, 4)
    return state


def test_swin_is_loaded_whole(tmp_path: Path) -> None:
    arguments = {**SWIN, "window_size": 2}
    model = timm.create_model("attnzero_swin_b", num_classes=5, img_size=64, **arguments).eval()
    state = published_swin(model)
    own = [key for key in state if not key.endswith(("_index", "attn_mask"))]
    loaded = load_pretrained(save(state, tmp_path), model="attnzero_swin_b", model_args=arguments)
    assert loaded.report.loaded == len(own) == len(model.state_dict())
    model.load_state_dict(golden_state(model.state_dict()))
    torch.testing.assert_close(loaded.model(images((64, 64))), model(images((64, 64))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("attnzero_swin_t", {}),
        ("attnzero_swin_s", {}),
        ("attnzero_swin_b", {"img_size": 384, "window_size": 12}),
    ],
)
def test_swin_is_recognized_by_its_sizes(tmp_path: Path, name: str, more: dict[str, Any]) -> None:
    loaded = load_pretrained(save(published_swin(timm.create_model(name, **more)), tmp_path))
    assert loaded.architecture == name
    assert loaded.preprocessing.input_size[1] == more.get("img_size", 224)


def test_an_unknown_part_of_an_attention_layer_is_refused_and_not_called_needless(tmp_path: Path) -> None:
    state = published_pvt()
    state["block1.0.attn.gate.weight"] = torch.zeros(8)
    model = timm.create_model("attnzero_pvt_t", num_classes=5, img_size=64, **TINY)
    with pytest.raises(CheckpointError, match=r"unexpected keys: stages\.0\.blocks\.0\.attn\.gate\.weight"):
        load_weights(model, save(state, tmp_path))


def test_softmax_weights_leave_an_operator_fresh_and_say_so(tmp_path: Path) -> None:
    """The reduction of another PVT is dropped with its reason, and its layers are called what they are."""
    whole = timm.create_model("pvt_tiny", num_classes=5, img_size=64, global_pool="avg", **TINY)
    state = {key: tensor for key, tensor in whole.state_dict().items() if not key.startswith("norm.")}
    torch.save(state, tmp_path / "pvt.pth")
    model = timm.create_model("attnzero_pvt_t", num_classes=5, img_size=64, **TINY)
    report = load_weights(model, str(tmp_path / "pvt.pth"))
    assert "softmax attention" in report.missing["stages.0.blocks.0.attn.operator.conv.weight"]
    assert report.unexpected["stages.0.blocks.0.attn.sr.weight"] == "attnzero_105 does not need it"


def test_the_file_of_deit_is_refused(tmp_path: Path) -> None:
    """Its class token goes through the formula, and ours attends by softmax: the numbers would be others."""
    with without_memory():
        model = timm.create_model("attnzero_deit_t", depth=1)
    state = {
        key.replace("operator.conv", "dwc"): torch.zeros(t.shape) for key, t in model.state_dict().items()
    }
    with pytest.raises(CheckpointError, match=r"unexpected keys: blocks\.0\.attn\.dwc"):
        load_pretrained(save(state, tmp_path), model="attnzero_deit_t", model_args={"depth": 1})
