"""A hosted attention layer is timm's, bit for bit, under timm's own names."""

from __future__ import annotations

import copy

import pytest
import torch
from graftvit.models.attention.base import QKV, Heads
from graftvit.models.attention.softmax import Softmax
from graftvit.models.conversion import convert
from graftvit.models.errors import UnsupportedModelError
from graftvit.models.families import attention_shape, check_supported, token_layout
from graftvit.models.host import AttentionHost, host_attention, release_attention
from support.models.dense import FAMILIES, images, tiny
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", [*FAMILIES, "post_norm"])
def test_hosted_model_is_bit_identical(family: str, dtype: torch.dtype) -> None:
    model = tiny("vit", block_fn=ResPostBlock) if family == "post_norm" else tiny(family)
    model, x = model.to(dtype), images(dtype=dtype)
    before, keys = model(x), list(model.state_dict())
    originals = [block.attn for block in model.blocks]
    hosts = host_attention(model)
    assert all(isinstance(host, AttentionHost) for host in hosts)
    assert torch.equal(model(x), before)
    assert torch.equal(copy.deepcopy(model)(x), before)
    assert list(model.state_dict()) == keys
    release_attention(model)
    assert [block.attn for block in model.blocks] == originals
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("needs", [("q",), ("k",), ("v",), ("q", "k"), ("k", "v"), ("q", "v"), QKV])
def test_partial_projections_equal_the_whole(family: str, needs: tuple[str, ...]) -> None:
    model = tiny(family)
    seen: list[Heads] = []

    class Keep(Softmax):
        def __call__(self, heads: Heads) -> torch.Tensor:
            seen.append(heads)
            return super().__call__(heads)

    class Part:
        def __init__(self) -> None:
            self.needs = needs

    hosts = host_attention(model)
    hosts[1].operator = Keep()
    inputs: list[tuple[tuple[object, ...], dict[str, object]]] = []
    hosts[1].register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True
    )
    model(images())
    args, kwargs = inputs[0]
    hosts[1].operator = Part()  # type: ignore[assignment]
    heads = hosts[1].project(args[0], kwargs.get("rope"), kwargs.get("shared_rel_pos_bias"))  # type: ignore[arg-type]
    for name in QKV:
        part, whole = getattr(heads, name), getattr(seen[0], name)
        assert (part is None) == (name not in needs)
        assert part is None or torch.allclose(part, whole, atol=1e-12)


def test_a_converted_layer_is_hosted_with_another_operator() -> None:
    model = convert(tiny("vit"), "*: ttt")
    attn, x = model.blocks[0].attn, torch.randn(2, 25, model.embed_dim, dtype=next(model.parameters()).dtype)
    keys, own = list(attn.state_dict()), attn(x)
    hosted = AttentionHost(attn, Softmax())
    assert not torch.allclose(hosted(x), own)
    assert torch.allclose(hosted(x), tiny("vit").blocks[0].attn(x))
    assert list(attn.state_dict()) == keys
    assert torch.equal(attn(x), own)


def test_devices_and_dtypes_reach_the_original() -> None:
    model = tiny("beit")
    hosts = host_attention(model)
    model.to("meta")
    assert all(p.device.type == "meta" for host in hosts for p in host.original.parameters())
    assert all(b.device.type == "meta" for host in hosts for b in host.original.buffers())


def test_layouts() -> None:
    assert token_layout(tiny("dinov2_registers")).prefix == ("cls", "reg0", "reg1", "reg2", "reg3")
    assert token_layout(tiny("deit_distilled")).prefix == ("cls", "dist")
    assert token_layout(tiny("vit_no_prefix")).num_tokens == 24
    assert token_layout(tiny()).grid == (4, 6)
    shape = attention_shape(tiny())
    assert (shape.depth, shape.num_heads, shape.head_dim, shape.width) == (3, 4, 8, 32)


@pytest.mark.parametrize("block", [ParallelScalingBlock, ParallelThingsBlock])
def test_blocks_without_a_plain_attention_are_refused(block: type) -> None:
    with pytest.raises(UnsupportedModelError, match=block.__name__):
        check_supported(tiny(block_fn=block))


def test_masks_are_refused() -> None:
    host = host_attention(tiny())[0]
    with pytest.raises(UnsupportedModelError, match="mask"):
        host(torch.zeros(1, 25, 32).double(), is_causal=True)
