"""A hosted attention layer is timm's, in plain models and pyramids; the walk finds every block."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import timm
import torch
from graftvit.models.attention.base import QKV, Heads
from graftvit.models.attention.softmax import Softmax
from graftvit.models.conversion import convert, converted_layers, plan_of
from graftvit.models.errors import UnsupportedModelError
from graftvit.models.families import (
    attention_shape,
    check_patches,
    check_supported,
    depths,
    patch_size,
    sites,
    token_layout,
)
from graftvit.models.host import AttentionHost, GridHost
from graftvit.models.hosting import host_attention, release_attention
from graftvit.models.replay import _state
from graftvit.transfer.methods.dual import DualViT
from support.models import pyramids
from support.models.dense import FAMILIES, gradient, images, relative_error, tiny
from support.models.pyramids import SIZES, TINY
from timm.models import swin_transformer, swin_transformer_v2
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", [*FAMILIES, "post_norm"])
def test_hosted_model_is_bit_identical(family: str, dtype: torch.dtype) -> None:
    model = tiny("vit", block_fn=ResPostBlock) if family == "post_norm" else tiny(family)
    model, x = model.to(dtype), images(dtype=dtype)
    before, keys = model(x), list(model.state_dict())
    originals = [block.attn for block in model.blocks]
    hosts = list(host_attention(model).values())
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

    hosts = list(host_attention(model).values())
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
    hosts = list(host_attention(model).values())
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
    with pytest.raises(UnsupportedModelError, match=rf"{block.__name__}, which is not supported: it "):
        check_supported(tiny(block_fn=block))


def test_masks_are_refused() -> None:
    host = host_attention(tiny())[0]
    with pytest.raises(UnsupportedModelError, match="mask"):
        host(torch.zeros(1, 25, 32).double(), is_causal=True)


# A hosted pyramid is timm's: logits and gradients in float64, in every mode and at every size.


def hosted(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    host_attention(twin)
    return twin


def gradients(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    model(inputs).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", TINY)
def test_hosted_logits_and_gradients_are_timms(kind: str, size: tuple[int, int]) -> None:
    model, inputs = pyramids.tiny(kind, size).double(), pyramids.images(size).double()
    twin = hosted(model)
    assert twin.state_dict().keys() == model.state_dict().keys()
    exact = {"rtol": 0, "atol": 0} if kind.startswith("pvt") else {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(twin(inputs), model(inputs), **exact)
    expected, found = gradients(model, inputs), gradients(twin, inputs)
    assert expected.keys() == found.keys() == dict(model.named_parameters()).keys()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", TINY)
def test_training_with_dropped_paths_is_timms(kind: str) -> None:
    model = pyramids.tiny(kind, drop_path_rate=0.5).double().train()
    twin, outputs = hosted(model), []
    for each in (model, twin):
        torch.manual_seed(3)
        outputs.append(each(pyramids.images((32, 32)).double()))
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", TINY)
def test_bfloat16_by_autocast_is_timms_to_rounding(kind: str) -> None:
    model, inputs = pyramids.tiny(kind), pyramids.images((32, 32))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(hosted(model)(inputs), model(inputs), rtol=0.05, atol=0.03)


@pytest.mark.parametrize("kind", ["swin", "swinv2"])
@pytest.mark.parametrize(
    "more", [{"always_partition": True}, {"dynamic_img_size": True}, {"qkv_bias": False}]
)
def test_the_variants_of_swin_are_timms(kind: str, more: dict[str, Any]) -> None:
    model = pyramids.tiny(kind, (40, 24), **more).double()
    size = (24, 40) if "dynamic_img_size" in more else (40, 24)
    inputs = pyramids.images(size).double()
    torch.testing.assert_close(hosted(model)(inputs), model(inputs), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", TINY)
def test_release_puts_timms_layers_back(kind: str) -> None:
    model = pyramids.tiny(kind)
    types, expected = [type(module) for module in model.modules()], model(pyramids.images((32, 32)))
    hosts = host_attention(model)
    assert hosts == host_attention(model), "a layer that has a host keeps it"
    assert all(isinstance(site.block(model).attn, GridHost) for site in sites(model))
    release_attention(model)
    assert [type(module) for module in model.modules()] == types
    assert torch.equal(model(pyramids.images((32, 32))), expected)


def test_a_hosted_swin_is_resized_as_timm_does() -> None:
    model, bigger = pyramids.tiny("swin").double(), (48, 64)
    twin = hosted(model)
    for each in (model, twin):
        each.set_input_size(bigger)  # type: ignore[operator]
    inputs = pyramids.images(bigger).double()
    torch.testing.assert_close(twin(inputs), model(inputs), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(release_attention(twin)(inputs), model(inputs), rtol=0, atol=0)


@pytest.mark.parametrize(
    "block", [swin_transformer.SwinTransformerBlock, swin_transformer_v2.SwinTransformerV2Block]
)
def test_timms_blocks_of_swin_have_what_ours_replace(block: Any) -> None:
    assert list(inspect.signature(block._attn).parameters) == ["self", "x"]
    sized = list(inspect.signature(block.set_input_size).parameters)
    assert sized == ["self", "feat_size", "window_size", "always_partition"]
    assert inspect.getsource(block.forward).count("self._attn(") == 1
    assert "self.attn(" not in inspect.getsource(block.forward)
    model = pyramids.tiny("swin")
    assert {"window_size", "shift_size", "dynamic_mask"} <= vars(sites(model)[0].block(model)).keys()


# The walk through a model finds every block of every family, with its tokens and heads.


def seen_shapes(model: nn.Module, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Return tokens and width of the output of each block, as a forward pass has them."""
    shapes: list[tuple[int, int]] = []

    def see(module: nn.Module, given: Any, out: torch.Tensor) -> None:
        shapes.append((out[0, ..., 0].numel(), out.shape[-1]))

    for site in sites(model):
        site.block(model).register_forward_hook(see)
    with torch.no_grad():
        model(pyramids.images(size))
    return shapes


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", TINY)
def test_sites_are_what_runs(kind: str, size: tuple[int, int]) -> None:
    model = pyramids.tiny(kind, size)
    found = sites(model)
    assert seen_shapes(model, size) == [(site.shape.geometry.num_tokens, site.width) for site in found]
    assert [site.index for site in found] == list(range(sum(depths(model))))
    assert [site.stage for site in found] == [
        s for s, count in enumerate(depths(model)) for _ in range(count)
    ]
    heads = TINY[kind][1]["num_heads"]
    assert [site.shape.num_heads for site in found] == [heads[site.stage] for site in found]
    assert all(site.num_heads * site.head_dim == site.width for site in found)
    assert len(depths(model)) > 1


def test_a_plain_model_has_one_stage() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32)
    assert depths(model) == [2]
    assert [site.path for site in sites(model)] == ["blocks.0", "blocks.1"]
    assert sites(model)[1].shape.geometry.num_prefix == 1
    assert len(depths(model)) == 1


def test_a_model_of_no_family_has_a_size_of_patches() -> None:
    model = timm.create_model("resnet10t")
    assert patch_size(model) == (1, 1)
    check_patches(model)


def test_a_model_of_no_family_has_blocks_without_attention_and_another_is_refused() -> None:
    assert [site.num_heads for site in sites(timm.create_model("resnet10t"))] == [0] * 5
    with pytest.raises(UnsupportedModelError, match="ResNet is not a supported model"):
        check_supported(timm.create_model("resnet10t"))
    with pytest.raises(UnsupportedModelError, match="Linear is not a supported model"):
        sites(nn.Linear(2, 2))


@pytest.mark.parametrize("kind", ["pvt", "svt", "swin", "swinv2"])
def test_what_knows_plain_models_alone_refuses_a_pyramid_by_name(kind: str) -> None:
    model = pyramids.tiny(kind)
    check_supported(model)
    with pytest.raises(UnsupportedModelError, match=f"{type(model).__name__} is a pyramid"):
        check_supported(model, to="copying")


def test_a_pyramid_with_another_attention_is_refused() -> None:
    model = pyramids.tiny("swin")
    sites(model)[1].block(model).attn = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"block 1 of SwinTransformer is a .* with Identity"):
        check_supported(model)


# Blocks that are run again in the backward pass read the geometry of their own forward pass.


REPLAY_SIZES = [(32, 48), (48, 32), (16, 96)]  # as many patches in other grids


def converted(plan: str, checkpointing: bool) -> Any:
    torch.manual_seed(0)
    model: Any = convert(tiny(seed=2, dynamic_img_size=True), plan).train()
    model.set_grad_checkpointing(checkpointing)
    return model


@pytest.mark.parametrize(("plan", "method"), [
    ("*: window(window=2)", None), ("*: hybrid", None), ("*: agent", None), ("0: dilated", None),
    ("*: window(window=2)", "attention_output"), ("*: window(window=2)", "block_output"),
])  # fmt: skip
def test_a_converted_model_with_images_of_several_sizes(plan: str, method: str | None) -> None:
    grads = []
    for checkpointing in (False, True):
        model = converted(plan, checkpointing)
        if method is None:
            losses = [model(images(size=size)).square().sum() for size in REPLAY_SIZES]
        else:
            dual = DualViT(tiny(seed=1, dynamic_img_size=True), model, method).train()
            outs = [dual(images(size=size)) for size in REPLAY_SIZES]
            losses = [out.logits.square().sum() + out.transfer_loss for out in outs]
        for loss in losses:
            loss.backward()
        assert isinstance(model.blocks, nn.Module)
        grads.append(gradient(model))
    assert relative_error(*grads) < 1e-6  # timm resamples position embeddings in float32


def test_a_forward_that_fails_leaves_nothing_to_the_next() -> None:
    plain, failing = converted("*: window(window=2)", False), converted("*: window(window=2)", True)
    handle = failing.norm_pre.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing(images(size=REPLAY_SIZES[1]))
    handle.remove()
    for model in (plain, failing):
        model(images()).square().sum().backward()
    assert torch.equal(gradient(plain), gradient(failing))
    assert isinstance(copy.deepcopy(failing).blocks, nn.Module)


def test_an_interrupted_forward_hides_no_layer() -> None:
    model = converted("*: linear", True)
    plan, expected = plan_of(model), copy.deepcopy(model).eval()
    model.patch_embed(images())
    assert plan_of(model) == plan
    assert len(converted_layers(model)) == len(expected.blocks)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images()), expected(images()), rtol=0, atol=1e-12)


def test_a_block_of_fake_tensors_is_compared_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with FakeTensorMode():
            block = nn.Linear(3, 3)
            before = _state(block)
            assert _state(block) == before
            block.weight.data = torch.empty(3, 3)
            assert _state(block) != before
    finally:
        torch.set_warn_always(always)
    assert not list(recwarn)
