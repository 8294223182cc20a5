"""EcoFormer's published weights, under their own names, give what the published equations give."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.models.conversion import plan_of
from graftvit.models.errors import CheckpointError, UnsupportedModelError
from support.models.published_ecoformer import State, attention, drawn, published_logits, published_state

ENTRIES = {
    "pvt_v2_b0": 174,
    "pvt_v2_b1": 174,
    "pvt_v2_b2": 328,
    "pvt_v2_b3": 568,
    "pvt_v2_b4": 828,
    "twins_svt_small": 328,
}
LARGE = [
    pytest.param(name, marks=pytest.mark.slow) for name in ENTRIES if name[-2:] in ("b1", "b2", "b3", "b4")
]
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def save(state: State, folder: Path) -> str:
    """As their trainer writes it, with its settings."""
    torch.save({"model": state, "epoch": 29, "args": Namespace(lr=1e-5)}, folder / "published.pth")
    return str(folder / "published.pth")


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
    out = attention(state, "layer", tokens)
    golden = [0.029204, -0.000624, -0.131941, -0.069126, 0.095423, 0.070532, 0.067501, 0.039182]
    torch.testing.assert_close(out[0, 0, :8], torch.tensor(golden).double(), rtol=0, atol=1e-6)
    assert float(out.sum()) == pytest.approx(-119.24393, abs=1e-4)


@pytest.mark.parametrize("name", ["pvt_v2_b0", "twins_svt_small", *LARGE])
def test_logits_are_those_of_the_published_code(name: str, tmp_path: Path) -> None:
    state = published_state(name)
    assert len(state) == ENTRIES[name]
    loaded = load_pretrained(save(state, tmp_path), img_size=64)
    assert loaded.model_args["architecture"] == name
    unread = {key for key in state if key.endswith("projection_matrix")}
    assert len(loaded.report.unexpected) == len(unread) > 0
    model = loaded.model.double()
    with torch.no_grad():
        found = model(IMAGES.double())
    wanted = published_logits(state, IMAGES, pvt="pvt" in name)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["pvt_v2_b0", "twins_svt_small"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_flat_files_and_those_of_distributed_training_load_too(
    name: str, prefix: str, tmp_path: Path
) -> None:
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
    with pytest.raises(
        CheckpointError, match=r"32 channels and \(2, 1, 2, 2\) blocks, .* pvt_v2_b0, pvt_v2_b1"
    ):
        load_pretrained(save(shallow, tmp_path))
    del state["block1.0.attn.to_v.weight"]
    with pytest.raises(CheckpointError, match=r"stages\.0\.blocks\.0\.attn\.kv\.weight"):
        load_pretrained(save(state, tmp_path))
    twins = published_state("twins_svt_small")
    del twins["blocks.1.0.attn.to_v.bias"]
    with pytest.raises(CheckpointError, match=r"blocks\.1\.0\.attn\.to_qk\.bias without .*to_v\.bias"):
        load_pretrained(save(twins, tmp_path))
