"""The registered small models have the sizes that their table says."""

from __future__ import annotations

import pytest
import timm
import torch
from graftvit.models import small
from graftvit.models.conversion import convert
from graftvit.models.families import attention_shape
from torch.utils.flop_counter import FlopCounterMode

ROWS = [
    [cell.strip() for cell in line.strip("| ").split("|")]
    for line in (small.__doc__ or "").splitlines()
    if line.startswith("| vit_")
]


def test_every_model_is_in_the_table() -> None:
    assert [row[0] for row in ROWS] == list(small.default_cfgs)
    assert all(timm.is_model(row[0]) for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_sizes_are_those_of_the_table(row: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    name, *numbers, parameters, macs = row
    image, patch, tokens, width, depth, heads = map(int, numbers)
    model = timm.create_model(name).eval()
    assert model.default_cfg["input_size"] == (3, image, image)
    assert model.patch_embed.patch_size == (patch, patch)
    assert model.pos_embed.shape == (1, tokens, width)
    shape = attention_shape(model)
    assert (shape.depth, shape.num_heads, shape.head_dim) == (depth, heads, 64)
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M" == parameters
    for block in model.blocks:
        block.attn.fused_attn = False  # the counter does not know every fused kernel
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert model(torch.zeros(1, 3, image, image)).shape == (1, 10)
    assert f"{counter.get_total_flops() / 2e9:.2f} G" == macs


def test_arguments_go_to_timm_and_the_model_can_be_converted() -> None:
    model = timm.create_model("vit_cifar_nano", num_classes=3, img_size=(16, 24), depth=2)
    assert convert(model, "*: linear")(torch.zeros(1, 3, 16, 24)).shape == (1, 3)
