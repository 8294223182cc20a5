"""Which weights a conversion keeps, held against the teacher's, parameter by parameter."""

from __future__ import annotations

import pytest
import torch
from graftvit.models.conversion import convert, new_parameters
from graftvit.models.errors import ConfigError
from support.models import dense
from torch import nn

FAMILIES = [family for family in dense.FAMILIES if not family.startswith("beit")]
TINY = {"embed_dim": 16, "num_heads": 2}


def teacher(family: str = "vit") -> nn.Module:
    return dense.tiny(family, dtype=torch.float32, **TINY)


def kept(student: nn.Module, model: nn.Module) -> set[str]:
    """The parameters that are bit for bit the teacher's."""
    own = dict(model.named_parameters())
    return {key for key, value in student.named_parameters() if key in own and torch.equal(value, own[key])}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights_are_the_teachers(family: str) -> None:
    model = teacher(family)
    assert kept(convert(model, "*: linear"), model) == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_attention_of_converted_layers_is_fresh(family: str) -> None:
    model = teacher(family)
    student = convert(model, "1: linear", weights="mlp")
    fresh = {key for key, _ in model.named_parameters() if key.startswith("blocks.1.attn.")}
    assert kept(student, model) == dict(model.named_parameters()).keys() - fresh
    values = {
        key: value for key, value in student.named_parameters() if key in fresh and key.endswith("weight")
    }
    linear = [value for value in values.values() if value.ndim == 2]
    assert all(0 < value.std() < 0.03 for value in linear), "timm draws projections with deviation 0.02"


@pytest.mark.parametrize("family", FAMILIES)
def test_no_weight_is_the_teachers(family: str) -> None:
    model = teacher(family)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert kept(convert(model, "*: linear; 1: keep", weights="none"), model) == set()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_kept_layers_keep_their_attention() -> None:
    model = teacher()
    student = convert(model, "*: keep; 2: kernel(feature=relu)", weights="mlp")
    assert {f"blocks.{index}.attn.qkv.weight" for index in (0, 1)} <= kept(student, model)
    assert "blocks.2.attn.qkv.weight" not in kept(student, model)


def test_a_seed_gives_the_same_fresh_weights() -> None:
    model, drawn = teacher(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(convert(model, "*: linear", weights="none").state_dict())
    assert all(torch.equal(value, drawn[1][key]) for key, value in drawn[0].items())
    assert not all(torch.equal(value, drawn[2][key]) for key, value in drawn[0].items())


def test_operators_have_the_models_dtype_and_device() -> None:
    student = convert(teacher().double(), "*: hybrid(window=4)")
    assert {parameter.dtype for parameter in new_parameters(student)} == {torch.float64}
    on_meta = convert(teacher().to("meta"), "*: hybrid(window=4)", weights="mlp")
    assert {parameter.device.type for parameter in on_meta.parameters()} == {"meta"}


def test_an_unknown_choice_is_named() -> None:
    with pytest.raises(ConfigError, match="weights='mpl'; did you mean 'mlp'"):
        convert(teacher(), "*: linear", weights="mpl")  # type: ignore[arg-type]
