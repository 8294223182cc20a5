"""The analytic count against torch's counter."""

from __future__ import annotations

import pytest
import torch
from graftvit.models.conversion import convert, layer_macs
from graftvit.models.cost import copied_macs, dense_macs
from support.models import dense
from support.models.copied_models import CASES, MAPS, METHODS, pair, whole
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

# BEiT and EVA-02 call their fused weight through F.linear too; siglip pools by attention, which is not counted.
FAMILIES = [family for family in dense.FAMILIES if family != "siglip"]


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_and_map_macs_are_all_that_the_counter_sees(family: str) -> None:
    model = dense.tiny(family, dtype=torch.float32)
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = False  # the counter does not know every fused kernel
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(dense.images(1, dtype=torch.float32))
    softmax, _ = layer_macs(model)
    assert dense_macs(model) + 3 * softmax == counter.get_total_flops() / 2


def test_what_an_operator_brings_counts_as_its_own() -> None:
    model = dense.tiny(dtype=torch.float32)
    assert (
        dense_macs(convert(model, "*: ttt")) == dense_macs(convert(model, "*: hybrid")) == dense_macs(model)
    )


@pytest.mark.parametrize("case", [*CASES, *MAPS])
@pytest.mark.parametrize("method", METHODS)
def test_a_copying_student_and_its_teachers_part_are_counted(
    case: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case in MAPS and method != "copy":
        return
    monkeypatch.setattr(
        torch.compiler, "is_exporting", lambda: True
    )  # the counter does not know our operator
    alone = whole(*pair(case, method, torch.float32))
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        alone(dense.images(1, dtype=torch.float32))
    assert sum(copied_macs(alone)) == counter.get_total_flops() / 2
