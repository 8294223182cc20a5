"""Attention that forms its maps, in pieces, against the whole map."""

from __future__ import annotations

import pytest
import torch
from graftvit.models.attention import pooling as small_maps
from graftvit.models.attention.pooling import small_map_attention

WIDTHS = pytest.mark.parametrize("width", [5, 1], ids=["maps are kept", "maps are computed again"])


@WIDTHS
@pytest.mark.parametrize(("queries", "keys"), [(17, 4), (4, 17)], ids=["few keys", "few queries"])
@pytest.mark.parametrize("weights", [1, 2 * 4 * 7, 2 * 4 * 17], ids=["a query", "seven queries", "two heads"])
def test_pieces_give_the_gradients_of_the_map_and_of_its_bias(
    width: int, queries: int, keys: int, weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_maps, "CACHED", weights)
    q, k, v, bias = inputs = [
        torch.randn(*shape, dtype=torch.float64).requires_grad_()
        for shape in ((3, 2, queries, width), (3, 2, keys, width), (3, 2, keys, width), (1, 1, 1, keys))
    ]
    out = small_map_attention(q, k, v, bias, 0.3)
    wanted = (0.3 * q @ k.transpose(2, 3) + bias).softmax(-1) @ v
    upstream = torch.randn_like(out)
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-11)
    assert type(out.grad_fn).__name__ == "_SmallMapsBackward"
    first, found = (torch.autograd.grad(out, inputs, upstream, retain_graph=True) for _ in range(2))
    for gradient, whole in zip(found, torch.autograd.grad(wanted, inputs, upstream), strict=True):
        torch.testing.assert_close(gradient, whole, rtol=1e-8, atol=1e-10)
    assert all(map(torch.equal, first, found)), "the backward pass changed what it read"


@pytest.mark.parametrize("biased", [False, True])
def test_a_layer_has_its_tokens_before_its_heads(biased: bool) -> None:
    """Views of a layer's projections, of which only some need a gradient, and a constant bias."""
    q, k, v = torch.randn(3, 2, 9, 2, 8, dtype=torch.float64).transpose(2, 3).unbind(0)
    q, bias = q.requires_grad_(), torch.randn(1, 1, 1, 9, dtype=torch.float64) if biased else None
    out = small_map_attention(q, k, v, bias, 0.3)
    wanted = (0.3 * q @ k.transpose(2, 3) + (0 if bias is None else bias)).softmax(-1) @ v
    torch.testing.assert_close(out, wanted)
    assert out.stride() == q.stride()
    (found,), (whole,) = (torch.autograd.grad(x.sum(1).mean(), [q]) for x in (out, wanted))
    torch.testing.assert_close(found, whole)


@pytest.mark.parametrize("kind", ["map of many", "mask", "bias by image", "half precision", "no gradient"])
def test_other_inputs_take_the_fused_kernels(kind: str) -> None:
    tokens = 512 if kind == "map of many" else 9
    dtype = torch.bfloat16 if kind == "half precision" else torch.float32
    q, k, v = torch.randn(3, 2, 2, tokens, 8, dtype=dtype).requires_grad_(kind != "no gradient").unbind(0)
    bias = {
        "mask": torch.arange(2 * tokens).view(2, 1, 1, tokens) % 3 > 0,
        "bias by image": torch.randn(2, 1, 1, tokens),
    }.get(kind)
    out = small_map_attention(q, k, v, bias, 0.3)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.3)
    assert torch.equal(out, wanted)
    assert type(out.grad_fn).__name__ != "_SmallMapsBackward"
