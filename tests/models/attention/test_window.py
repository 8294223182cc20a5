"""Windows, dilated windows and neighbourhoods against dense masks that say who sees whom, pair by pair."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from graftvit.models.attention import tiles as tile_groups
from graftvit.models.attention import window as whole_windows
from graftvit.models.attention.base import AttentionOperator, Geometry, Heads, LayerShape
from graftvit.models.attention.softmax import SoftmaxAttention
from graftvit.models.attention.tiles import blocks
from graftvit.models.attention.window import NeighborhoodAttention, WindowAttention
from graftvit.models.conversion import convert, resize
from graftvit.models.errors import ConfigError
from support.models.operator_cases import Case, draw
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

RAGGED = Geometry(2, (7, 9))
OPTIONS = [(7, 1), (4, 1), (3, 2), (2, 3), (5, 2), (1, 1), (2, 8)]


def same_window(a: int, b: int, length: int, window: int, dilation: int) -> bool:
    """Equal residues, and equal windows where the positions of a residue are dealt out as evenly as can be."""
    if a % dilation != b % dilation:
        return False
    size = len(range(a % dilation, length, dilation))
    count = -(-size // window)
    sizes = [size // count + (i < size % count) for i in range(count)]
    ends = [sum(sizes[: i + 1]) for i in range(count)]
    return len({next(i for i, end in enumerate(ends) if x // dilation < end) for x in (a, b)}) == 1


def is_near(a: int, b: int, length: int, window: int, dilation: int) -> bool:
    """b is one of the `window` positions around a, moved inwards at the ends."""
    positions = list(range(a % dilation, length, dilation))
    first = min(max(a // dilation - window // 2, 0), max(len(positions) - window, 0))
    return b in positions[first : first + window]


def dense(heads: Heads, sees: Any, window: int, dilation: int) -> Tensor:
    geometry = heads.tokens()
    (height, width), prefix = geometry.grid, geometry.num_prefix
    mask = torch.ones(geometry.num_tokens, geometry.num_tokens, dtype=torch.bool)
    for i in range(height * width):
        for j in range(height * width):
            mask[prefix + i, prefix + j] = sees(i // width, j // width, height, window, dilation) and sees(
                i % width, j % width, width, window, dilation
            )
    q, k, v = heads.qkv()
    logits = (heads.scale * q @ k.transpose(2, 3)).masked_fill(~mask, -torch.inf)
    return logits.softmax(-1) @ v


@pytest.mark.parametrize(("window", "dilation"), OPTIONS)
@pytest.mark.parametrize(("kind", "sees"), [(WindowAttention, same_window), (NeighborhoodAttention, is_near)])
def test_the_map_is_that_of_the_dense_mask(kind: Any, sees: Any, window: int, dilation: int) -> None:
    heads = draw(RAGGED)
    out = kind(LayerShape(2, 8, RAGGED), window, dilation)(heads)
    torch.testing.assert_close(out, dense(heads, sees, window, dilation), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [WindowAttention, NeighborhoodAttention])
def test_a_window_as_large_as_the_grid_is_softmax_attention(kind: Any) -> None:
    heads, shape = draw(RAGGED), LayerShape(2, 8, RAGGED)
    wanted = SoftmaxAttention(shape)(heads)
    for window in (9, 100):
        torch.testing.assert_close(kind(shape, window)(heads), wanted, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(kind(shape, 8)(heads), wanted)


@pytest.mark.parametrize("kind", [WindowAttention, NeighborhoodAttention])
def test_another_grid_is_met_on_the_way_and_resampled_to(kind: Any) -> None:
    other = Geometry(1, (5, 6))
    heads = draw(other)
    operator = kind(LayerShape(2, 8, RAGGED), 3)
    wanted = kind(LayerShape(2, 8, other), 3)(heads)
    assert torch.equal(operator(heads), wanted)
    operator.resample(other)
    assert torch.equal(operator(heads), wanted)
    assert not operator.state_dict()


def test_a_model_of_free_image_size_has_the_grid_of_each_batch() -> None:
    small: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, dynamic_img_size=True, **small).eval()
    student = convert(model, "*: window(window=3)")
    images = torch.randn(1, 3, 24, 20)
    fixed = copy.deepcopy(student)
    resize(fixed, (24, 20))
    out = student.forward_features(images)
    torch.testing.assert_close(fixed.forward_features(images), out, rtol=1e-4, atol=1e-5)
    assert not torch.equal(convert(model, "*: window(window=2)").forward_features(images), out)


def test_dropout_is_on_the_map_of_a_layer_in_training() -> None:
    heads = draw(RAGGED)
    operator = WindowAttention(LayerShape(2, 8, RAGGED), 4)
    plain = operator(heads)
    heads.dropout = 0.5
    assert not torch.allclose(operator(heads), plain)
    mean = torch.stack([operator(heads) for _ in range(2000)]).mean(0)
    assert float((mean - plain).norm() / plain.norm()) < 0.1


def test_cost_is_that_of_the_equation() -> None:
    geometry = Geometry(1, (14, 14))
    prefix = 2 * geometry.num_tokens * 64 * 3
    for dilation in (1, 2):
        operator = WindowAttention(LayerShape(3, 64, geometry), 7, dilation)
        assert operator.macs(geometry) == prefix + 2 * 196 * (49 + 1) * 64 * 3
    near = NeighborhoodAttention(LayerShape(3, 64, geometry), 7)
    assert 2 < near.macs(geometry) / operator.macs(geometry) < 3


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, (tuple, list)) else [out]:
            self.largest = max(self.largest, part.numel() if isinstance(part, Tensor) else 0)
        return out


@pytest.mark.parametrize("kind", [WindowAttention, NeighborhoodAttention])
def test_no_tensor_has_as_many_elements_as_the_map(kind: Any) -> None:
    geometry = Geometry(1, (32, 32))
    operator: AttentionOperator = kind(LayerShape(1, 8, geometry))
    heads = draw(geometry, torch.float32, batch=1, heads=1)
    heads = heads.with_qkv(*(x.requires_grad_() for x in heads.qkv()))
    with Largest() as seen:
        operator(heads).sum().backward()
        operator.terms(heads)
    assert 0 < seen.largest < geometry.num_patches**2 / 2


def test_windows_that_are_none_are_refused() -> None:
    for options, message in (({"window": 0}, "window=0"), ({"dilation": 1.5}, "dilation=1.5")):
        with pytest.raises(ConfigError, match=f"plan: {message}; give a whole number"):
            WindowAttention(LayerShape(1, 8, RAGGED), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"window": 3}, {"window": 3, "dilation": 2}], ids=str)
@pytest.mark.parametrize("elements", [1, 40_000], ids=["a tile", "several images"])
def test_groups_of_tiles_give_the_map_and_its_gradients(
    options: dict[str, int], elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tile_groups, "CACHED", elements)
    monkeypatch.setattr(tile_groups, "MANY", 0)
    geometry = Geometry(2, (5, 8))
    operator: Any
    operator, heads = Case("neighbourhood", options).build(geometry), draw(geometry, batch=3)
    assert tile_groups.by_groups(heads.values(), heads.values(), operator.tables.keys)
    _, _, v = inputs = [x.requires_grad_() for x in heads.qkv()]
    upstream = torch.randn_like(v)
    out, wanted = operator.attend(heads), operator.matrix(heads) @ v
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-11)
    found = torch.autograd.grad(out, inputs, upstream)
    for gradient, dense in zip(found, torch.autograd.grad(wanted, inputs, upstream), strict=True):
        torch.testing.assert_close(gradient, dense, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("window", "dilation"), [(3, 1), (2, 2), (2, 3), (3, 2), (1, 9)])
@pytest.mark.parametrize("grid", [(6, 6), (7, 8)], ids=str)
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("elements", [1, 700, 2**18], ids=["a row of windows", "two images", "everything"])
def test_pieces_of_equal_windows_give_the_map_and_its_gradients(
    window: int,
    dilation: int,
    grid: tuple[int, int],
    prefix: int,
    elements: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(whole_windows, "CACHED", elements)
    geometry = Geometry(prefix, grid)
    operator, heads = WindowAttention(LayerShape(2, 8, geometry), window, dilation), draw(geometry, batch=3)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in heads.qkv())  # as in a layer
    inputs = [x.requires_grad_() for x in (q, k, v)]
    heads = heads.with_qkv(q, k, v)
    out, wanted = operator.attend(heads), operator.matrix(heads) @ v
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-11)
    upstream = torch.randn_like(v)
    first, found = (torch.autograd.grad(out, inputs, upstream, retain_graph=True) for _ in range(2))
    for gradient, dense in zip(found, torch.autograd.grad(wanted, inputs, upstream), strict=True):
        torch.testing.assert_close(gradient, dense, rtol=1e-8, atol=1e-10)
    assert all(map(torch.equal, first, found)), "the backward pass changed what it read"
    assert whole_windows.can_take_windows(q, k, v, window, prefix)


@pytest.mark.parametrize(("window", "dilation"), [*OPTIONS, (3, 4)])
@pytest.mark.parametrize("length", [1, 5, 8, 12])
def test_spans_are_the_windows_of_the_tables(window: int, dilation: int, length: int) -> None:
    found = [
        tuple(span.start + residue + (each * span.size + i) * span.step for i in range(span.size))
        for span in whole_windows.spans(length, window, dilation)
        for residue in range(span.classes)
        for each in range(span.windows)
    ]
    assert sorted(found) == sorted(tuple(cut[0]) for cut in blocks(length, window, dilation))
