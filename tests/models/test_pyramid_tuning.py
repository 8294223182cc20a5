"""What learns in a pyramid, and how fast: LoRA adapters, and layer decay through the stages."""

from __future__ import annotations

import pytest
import torch
from graftvit.models.conversion import convert, new_parameters
from graftvit.models.errors import UnsupportedModelError
from graftvit.models.lora import add_lora, merged
from graftvit.transfer.config import OptimConfig
from graftvit.transfer.engine.optim import create_optimizer
from support.models.pyramids import images, tiny
from torch import nn

KINDS = ("pvt", "pvt_li", "svt", "pcpvt", "swin")
PLAN = "0: hedgehog; 1: none; stage2.0: softmax; merge: deformable"


def small(kind: str, plan: str | None) -> nn.Module:
    return tiny(kind) if plan is None else convert(tiny(kind), plan, without=["bias"]).eval()


@pytest.mark.parametrize("plan", [None, PLAN])
@pytest.mark.parametrize("kind", KINDS)
def test_the_merge_of_adapters_is_the_model(kind: str, plan: str | None) -> None:
    torch.manual_seed(0)
    plain, batch = small(kind, plan), images((32, 32))
    torch.manual_seed(0)
    model = small(kind, plan)
    operators = {id(parameter) for parameter in new_parameters(model)}
    add_lora(model, 2)
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    own = {name for name, parameter in model.named_parameters() if id(parameter) in operators}
    adapters = {name for name in learned if ".lora_" in name}
    assert learned - adapters - own <= {"head.weight", "head.bias", "head.fc.weight", "head.fc.bias"}
    assert own <= learned
    attended = [
        name for name, each in plain.named_modules() if ".attn." in f"{name}." and name.endswith("proj")
    ]
    assert attended == [name for name in attended if f"{name}.lora_A.default.weight" in adapters]
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    wanted = model(batch)
    assert not torch.allclose(wanted, plain(batch), atol=1e-3)
    plain.load_state_dict(merged(model.state_dict()))
    torch.testing.assert_close(plain(batch), wanted, rtol=1e-4, atol=1e-5)


def test_adapters_without_an_effect_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="layer 0 stores the biases of q and v apart"):
        add_lora(tiny("swinv2"), 2)


@pytest.mark.parametrize("kind", [*KINDS, "swinv2"])
def test_layer_decay_goes_through_the_stages(kind: str) -> None:
    """No parameter learns faster than one behind it, and operators learn as fast as their block."""
    model = small(kind, "0: hedgehog; stage2.1: hedgehog")
    optimizer = create_optimizer(model, model, OptimConfig(layer_decay=0.5), 1e-3)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    scales = {name: scale[id(parameter)] for name, parameter in model.named_parameters()}
    order = [scales[name] for name in scales if ".mlp.fc1.weight" in name]
    assert order == sorted(order)
    assert order[0] < order[-1] < scales[next(name for name in scales if name.startswith("head."))] == 1.0
    for name, found in scales.items():
        if ".attn.operator." in name:
            block = name.partition(".attn.")[0]
            assert found == scales[f"{block}.mlp.fc1.weight"]
