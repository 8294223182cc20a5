"""Attention maps against the definition, and the divergence against numbers worked out by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from graftvit.models.attention.base import QKV, Heads
from graftvit.models.conversion import convert
from graftvit.models.copied import copied_layers
from graftvit.models.errors import TransferError, UnsupportedModelError
from graftvit.models.host import AttentionHost
from graftvit.models.hosting import host_attention
from graftvit.transfer.analysis.layer_maps import (
    attention_maps,
    divergence_by_layer,
    js_divergence,
    map_divergence,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models.copied_models import CASES, MAPS, pair, whole
from support.models.dense import images as dense_images
from torch import Tensor, nn

FAMILIES = {
    "vit": ("vit_tiny_patch16_224", {"img_size": (32, 48), "embed_dim": 24, "num_heads": 3}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "embed_dim": 24, "num_heads": 3}),
    "relative bias": ("beit_base_patch16_224", {"img_size": 32, "embed_dim": 24, "num_heads": 3}),
    "rotary": ("eva02_tiny_patch14_224", {"img_size": (28, 42), "embed_dim": 24, "num_heads": 3}),
}


def make(family: str = "vit", seed: int = 0, **more: object) -> nn.Module:
    torch.manual_seed(seed)
    name, options = FAMILIES[family]
    model = timm.create_model(name, **({"depth": 2, "num_classes": 5} | options | more))  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)  # maps far from uniform
    return model


def images(model: nn.Module, batch: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 3, *model.patch_embed.img_size)  # type: ignore[union-attr, misc]


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_are_what_the_layer_applies(family: str) -> None:
    """With V = identity, torch's own attention gives softmax(QKᵀ) I: the map itself."""
    model = make(family).eval()
    maps = attention_maps(model, images(model))
    captured: dict[int, Tensor] = {}

    class Identity:
        needs = ("q", "k", "v")

        def __init__(self, layer: int) -> None:
            self.layer = layer

        def __call__(self, heads: object) -> Tensor:
            q, k, v = heads.q, heads.k, heads.v  # type: ignore[attr-defined]
            eye = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
            captured[self.layer] = nn.functional.scaled_dot_product_attention(
                q,
                k,
                eye,
                attn_mask=heads.bias,
                scale=heads.scale,  # type: ignore[attr-defined]
            )
            return captured[self.layer] @ v

    plain = model(images(model))
    for layer, host in host_attention(model).items():
        host.operator = Identity(layer)
    torch.testing.assert_close(model(images(model)), plain, rtol=1e-4, atol=1e-5)
    for layer in range(2):
        torch.testing.assert_close(maps[layer], captured[layer], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(maps[layer].sum(-1), torch.ones_like(maps[layer].sum(-1)))


def test_the_model_is_left_as_it_was() -> None:
    model = make(drop_path_rate=0.5).train()
    model.blocks[0].eval()  # type: ignore[union-attr, index, operator]
    before = [(name, id(module), module.training) for name, module in model.named_modules()]
    attention_maps(model, images(model))
    assert before == [(name, id(module), module.training) for name, module in model.named_modules()]
    hosts = list(host_attention(model).values())
    attention_maps(model, images(model))
    assert [block.attn for block in model.blocks] == hosts  # type: ignore[union-attr]
    assert all(isinstance(host, AttentionHost) for host in hosts)


def test_training_mode_changes_nothing_and_failure_restores() -> None:
    model = make(drop_path_rate=0.9).train()
    first, second = (attention_maps(model, images(model))[1] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(UnsupportedModelError, match="7x7"):
        attention_maps(model, torch.zeros(1, 3, 7, 7))
    assert not any(isinstance(module, AttentionHost) for module in model.modules())
    assert model.training


def test_layers_are_chosen_from_either_end() -> None:
    model = make()
    maps = attention_maps(model, images(model))
    chosen = attention_maps(model, images(model), [-1, 0])
    assert list(chosen) == [-1, 0]
    assert torch.equal(chosen[-1], maps[1])
    for layer in (2, -3):
        with pytest.raises(TransferError, match=f"layer {layer} .* 2 blocks"):
            attention_maps(model, images(model), [layer])


def test_divergence_by_hand() -> None:
    p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
    by_hand = 0.5 * math.log(1 / 0.75) + 0.5 * (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert js_divergence(p, q).item() == pytest.approx(by_hand, rel=1e-6)
    assert js_divergence(p, 1 - p).item() == pytest.approx(math.log(2), rel=1e-6)
    assert js_divergence(p, p).item() == 0.0


@given(seed=st.integers(0, 10_000), sharp=st.floats(0.1, 50.0))
@settings(max_examples=30)
def test_divergence_is_symmetric_and_bounded(seed: int, sharp: float) -> None:
    torch.manual_seed(seed)
    p, q = (torch.randn(2, 3, 4, 5) * sharp).softmax(-1), torch.randn(2, 3, 4, 5).softmax(-1)
    divergence = js_divergence(p, q)
    torch.testing.assert_close(divergence, js_divergence(q, p))
    assert divergence.min() >= 0
    assert divergence.max() <= math.log(2) + 1e-6


def test_matching_heads_finds_the_best_of_all_permutations() -> None:
    torch.manual_seed(0)
    theirs, ours = (torch.randn(2, 4, 6, 6).mul(2).softmax(-1) for _ in range(2))
    every = [map_divergence(theirs, ours[:, list(order)]) for order in itertools.permutations(range(4))]
    assert map_divergence(theirs, ours, match_heads=True) == pytest.approx(min(every), rel=1e-5)
    assert map_divergence(theirs, theirs[:, [2, 0, 3, 1]], match_heads=True) == pytest.approx(0, abs=1e-7)
    assert map_divergence(theirs, theirs[:, [2, 0, 3, 1]]) > 0.01
    assert map_divergence(theirs, theirs[:, [3, 1]], match_heads=True) == pytest.approx(0, abs=1e-7)


def test_a_copy_of_the_teacher_is_at_zero_and_another_seed_is_not() -> None:
    teacher = make()
    assert divergence_by_layer(teacher, make(), images(teacher)) == [0.0, 0.0]
    other = divergence_by_layer(teacher, make(seed=1), images(teacher))
    assert all(0.005 < value < math.log(2) for value in other)
    shifted = divergence_by_layer(teacher, make(), images(teacher), teacher_images=images(teacher) * 2)
    assert min(shifted) > 0
    crossed = divergence_by_layer(teacher, make(), images(teacher), pairs=[(0, 1), (1, 1)])
    assert crossed[1] == 0.0 < crossed[0]


def test_what_cannot_be_compared_is_named() -> None:
    teacher = make()
    deeper = make(depth=3)
    with pytest.raises(TransferError, match="2 blocks and the student 3"):
        divergence_by_layer(teacher, deeper, images(teacher))
    with pytest.raises(TransferError, match="3 heads and the student 2"):
        divergence_by_layer(teacher, make(num_heads=2), images(teacher))
    with pytest.raises(TransferError, match="7 and 6 tokens"):
        divergence_by_layer(teacher, make(class_token=False, global_pool="avg"), images(teacher))
    with pytest.raises(UnsupportedModelError):
        attention_maps(timm.create_model("resnet10t"), torch.zeros(1, 3, 32, 32))


def test_maps_of_converted_layers_are_their_operators_own() -> None:
    model = make()
    student = convert(model, "0: linear")
    found = attention_maps(student, images(model))
    torch.testing.assert_close(found[0].sum(-1), torch.ones_like(found[0].sum(-1)), rtol=1e-4, atol=1e-4)
    layer: Any = student.blocks[0]
    softmax = attention_maps(model, images(model))[0]
    assert not torch.allclose(found[0], softmax, atol=1e-3)
    assert not layer.attn.operator._forward_pre_hooks


class Watched:
    """A copied layer's operator, run by `watch`."""

    needs = QKV

    def __init__(self, operator: Any, watch: Callable[[Heads], Tensor]) -> None:
        self.operator, self.tape, self.watch = operator, operator.tape, watch

    def __call__(self, heads: Heads) -> Tensor:
        return self.watch(heads)


@pytest.mark.parametrize("case", [*CASES, *MAPS])
@pytest.mark.parametrize("method", ["copy", "copy_q", "copy_k"])
def test_a_copied_layers_map_is_the_one_that_it_applies(case: str, method: str) -> None:
    if case in MAPS and method != "copy":
        return
    model = whole(*pair(case, method))
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    for index, layer in copied_layers(model).items():
        operator = layer.operator

        def watch(heads: Heads, index: int = index, operator: Any = operator) -> Tensor:
            out: Tensor = operator.taught(Heads(heads.q, heads.k, heads.v, heads.bias, heads.scale))
            assert heads.v is not None
            seen[index] = heads.v, out
            return out

        layer.operator = Watched(operator, watch)  # type: ignore[assignment]
    with torch.no_grad():
        model(dense_images())
    for layer in copied_layers(model).values():
        layer.operator = layer.operator.operator  # type: ignore[attr-defined]
    maps = attention_maps(model, dense_images())
    assert maps.keys() == set(range(len(model.blocks)))  # type: ignore[arg-type]
    assert seen.keys() == copied_layers(model).keys()
    for index, (v, out) in seen.items():
        torch.testing.assert_close(maps[index].double() @ v, out, rtol=1e-5, atol=1e-5)
    assert all(layer.operator.map for layer in copied_layers(model).values())  # left as it was


def test_a_layer_that_copies_values_has_its_own_map() -> None:
    dual, teacher = pair("alike", "copy_v")
    maps = attention_maps(whole(dual, teacher), dense_images())
    torch.testing.assert_close(maps[0], attention_maps(dual.release(), dense_images())[0])
