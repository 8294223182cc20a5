"""Every other family of timm: hosted as timm, converted as the equation, saved, resized, looked at and taught."""

from __future__ import annotations

import copy
import importlib.util
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import graftvit.checkpoints.pretrained as loading
import pytest
import timm
import torch
from graftvit.checkpoints.export import export_model
from graftvit.models.conversion import convert, converted_layers, plan_of, resize
from graftvit.models.copying.teacher_view import Normalization
from graftvit.models.cost import attention_macs, other_macs
from graftvit.models.errors import TransferError, UnsupportedModelError
from graftvit.models.families import check_supported, depths, family_of, image_size, layout_of, sites, vit
from graftvit.models.host import AttentionHost
from graftvit.models.hosting import host_attention, native_host, release_attention
from graftvit.models.lora import add_lora, merged
from graftvit.models.parts import patch_features, run_features
from graftvit.transfer.align import Alignment
from graftvit.transfer.analysis.compare.comparison_cells import layer_errors
from graftvit.transfer.analysis.layer_maps import attention_maps, key_count, layer_maps
from graftvit.transfer.methods.dual import DualViT
from support.models import dense
from support.models.dense import Layer, cross_entropy, dense_attention, gradient
from support.models.tiny_families import FUSED, TINY, WHOLE, arguments, pictures, tiny, whole
from support.models.tiny_students import save_folder
from timm.models import metaformer, mvitv2
from timm.models.naflexvit import batch_patchify
from timm.models.volo import VOLO
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

kinds = pytest.mark.parametrize("kind", TINY)
ALIKE = dict.fromkeys(
    ("teacher_normalization", "student_normalization"), Normalization((0.5,) * 3, (0.5,) * 3)
)
whole_kinds = pytest.mark.parametrize("kind", WHOLE)


def ready(model: nn.Module, plan: str, kind: str, **more: Any) -> Any:
    """Convert a model; a bias that can be given up is."""
    without = ["bias"] if TINY[kind].gives_up else []
    return convert(model, plan, without=without, **more).eval()


def linear(layer: Layer) -> Tensor:
    """Linear attention of elu + 1 with centered keys, dense."""
    q, k = (torch.nn.functional.elu(x) + 1 for x in (layer.q, layer.k - layer.k.mean(-2, keepdim=True)))
    weights = q @ k.transpose(-2, -1)
    return weights / weights.sum(-1, keepdim=True) @ layer.v


def run(model: nn.Module, x: Tensor, operator: Any = None) -> tuple[Tensor, list[Layer]]:
    """timm's own forward pass with another operator in every attention layer, and its layers."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True  # type: ignore[assignment]
        if type(module) in FUSED:
            module.forward = partial(FUSED[type(module)], module)
    layers: list[Layer] = []
    with dense_attention(layers, None if operator is None else lambda _, layer: operator(layer)):
        return model(x), layers


@kinds
def test_a_hosted_model_is_timms(kind: str) -> None:
    model, x = tiny(kind, dtype=torch.float64), pictures(kind)
    twin, types = copy.deepcopy(model), [type(module) for module in model.modules()]
    hosts = host_attention(twin)
    assert all(isinstance(host, AttentionHost) for host in hosts.values())
    assert twin.state_dict().keys() == model.state_dict().keys()
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(twin(x), model(x), **close)
    family_of(twin).forget(twin)
    torch.testing.assert_close(copy.deepcopy(twin)(x), model(x), **close)
    for each in (twin, model):
        each(x).square().sum().backward()
    torch.testing.assert_close(gradient(twin), gradient(model), rtol=1e-8, atol=1e-10)
    release_attention(twin)
    assert [type(module) for module in twin.modules()] == types
    assert torch.equal(twin(x), model(x))


MIXED = ("cait", "differential")
"""Kinds whose maps are no softmax of a head's queries and keys."""


@kinds
def test_training_with_dropout_is_timms(kind: str) -> None:
    model, outputs = tiny(kind, dtype=torch.float64, drop_path_rate=0.5).train(), []
    twin = copy.deepcopy(model)
    host_attention(twin)
    for each in (model, twin):
        torch.manual_seed(3)
        outputs.append(each(pictures(kind)))
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)


@kinds
def test_sites_are_what_runs(kind: str) -> None:
    model, shapes = tiny(kind), []
    check_supported(model)
    found, family = sites(model), family_of(model)
    for site in found:
        site.block(model).register_forward_hook(
            lambda _, given, out: shapes.append(family.in_sequence(out).shape)
        )
    model(pictures(kind, dtype=torch.float32))
    assert [shape[1:] for shape in shapes] == [(site.shape.geometry.num_tokens, site.width) for site in found]


@whole_kinds
def test_a_converted_model_is_its_equation(kind: str) -> None:
    model, x = whole(kind), pictures(kind)
    twin = copy.deepcopy(model)
    assert torch.allclose(model(x), convert(model, "*: softmax")(x), rtol=1e-10, atol=1e-10)
    if TINY[kind].biased and not TINY[kind].gives_up:
        with pytest.raises(UnsupportedModelError, match="relative position bias, which linear"):
            convert(model, "*: linear")
        return
    torch.testing.assert_close(run(copy.deepcopy(twin), x)[0], model(x), rtol=1e-10, atol=1e-10)
    expected, _ = run(twin, x, linear)
    torch.testing.assert_close(ready(model, "*: linear", kind)(x), expected, rtol=1e-9, atol=1e-10)


def plan(kind: str) -> str:
    return "*: keep" if TINY[kind].biased and not TINY[kind].gives_up else "*: softmax; 1: linear"


@kinds
def test_a_student_may_start_without_weights(kind: str) -> None:
    model, x = tiny(kind), pictures(kind, dtype=torch.float32)
    for weights in ("mlp", "none"):
        student = ready(model, plan(kind), kind, weights=weights)
        assert student(x).isfinite().all()


@kinds
def test_a_student_is_saved_loaded_and_resized(kind: str, tmp_path: Path) -> None:
    student = ready(tiny(kind), plan(kind), kind)
    student.train()(pictures(kind, dtype=torch.float32)).square().mean().backward()
    for name, p in student.eval().named_parameters():
        # of CaiT and of differential attention, which no operator does
        mixes_heads = any(part in name for part in ("attn.proj_l.", "attn.proj_w.", "attn.lambda_"))
        assert mixes_heads or (p.grad is not None and p.grad.isfinite().all())
    folder = save_folder(student, tmp_path / "student", TINY[kind].name, arguments(kind))
    loaded, x = loading.load(folder), pictures(kind, dtype=torch.float32)
    assert plan_of(loaded) == plan_of(student)
    assert torch.equal(loaded(x), student(x))
    if not TINY[kind].resizes:
        return
    resize(student, TINY[kind].other)
    assert image_size(student) == TINY[kind].other
    y = pictures(kind, dtype=torch.float32, size=TINY[kind].other)
    assert torch.equal(loading.load(folder, img_size=TINY[kind].other)(y), student(y))
    if plan(kind) == "*: keep":  # as in the next test
        return
    again = save_folder(
        student,
        tmp_path / "again",
        TINY[kind].name,
        arguments(kind, TINY[kind].other),
        {"input_size": (3, *TINY[kind].other)},
    )
    assert torch.equal(loading.load(again)(y), student(y))


@kinds
def test_a_resized_model_is_saved_as_it_is(kind: str, tmp_path: Path) -> None:
    if not TINY[kind].resizes:
        return
    model, y = tiny(kind), pictures(kind, dtype=torch.float32, size=TINY[kind].other)
    folder = save_folder(model, tmp_path / "model", TINY[kind].name, arguments(kind))
    resize(model, TINY[kind].other)
    shown = {"input_size": (3, *TINY[kind].other)}
    again = save_folder(model, tmp_path / "again", TINY[kind].name, arguments(kind, TINY[kind].other), shown)
    torch.testing.assert_close(loading.load(again)(y), model(y))
    torch.testing.assert_close(loading.load(folder, img_size=TINY[kind].other)(y), model(y))


@kinds
def test_maps_are_of_the_layers(kind: str) -> None:
    model, x = tiny(kind), pictures(kind, dtype=torch.float32)
    maps = layer_maps(model, x, range(len(sites(model))))
    for site in sites(model):
        weights = maps[site.index].weights
        assert key_count(model, site) == weights.shape[-1]
        assert kind in MIXED or ((weights >= 0).all() and (weights.sum(-1) <= 1 + 1e-5).all())
    if TINY[kind].whole is None:
        return
    model = whole(kind)
    _, layers = run(copy.deepcopy(model), pictures(kind))
    for index, found in attention_maps(model, pictures(kind)).items():
        torch.testing.assert_close(
            found, layers[index].map.float().reshape(found.shape), rtol=1e-4, atol=1e-6
        )


@kinds
def test_products_are_those_of_torchs_counter(kind: str) -> None:
    model = tiny(kind).requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(pictures(kind, dtype=torch.float32)[:1])
    bias = TINY[kind].own_products
    assert sum(attention_macs(model)) + other_macs(model) + bias == counter.get_total_flops() // 2


@kinds
def test_a_layer_is_aligned(kind: str) -> None:
    if plan(kind) == "*: keep":
        return
    teacher = tiny(kind, dtype=torch.float64)
    student = ready(tiny(kind, seed=1, dtype=torch.float64), plan(kind), kind)
    losses = Alignment(teacher, student)(pictures(kind))
    assert losses.keys() == converted_layers(student).keys()
    torch.stack(list(losses.values())).sum().backward()
    assert all(error > 0 for error in layer_errors(teacher, student, [pictures(kind)]).values())
    if TINY[kind].whole is not None:
        teacher = whole(kind)
        student = convert(teacher, "*: softmax")
        if converted_layers(student):  # else `softmax` keeps the layers
            assert all(error < 1e-6 for error in layer_errors(teacher, student, [pictures(kind)]).values())


@pytest.mark.parametrize("method", ["attention_output", "block_output", "distill"])
@kinds
def test_a_student_is_taught(kind: str, method: str) -> None:
    if kind in MIXED and method == "distill":  # refused, in tests of their own
        return
    teacher, student, x = (
        tiny(kind, dtype=torch.float64),
        tiny(kind, seed=1, dtype=torch.float64),
        pictures(kind),
    )
    dual = DualViT(teacher, student, method)
    out = dual(x)
    torch.testing.assert_close(out.logits, student(x), rtol=1e-9, atol=1e-10)
    (out.transfer_loss + out.logits.square().mean()).backward()
    assert out.transfer_loss > 0
    own = DualViT(teacher, copy.deepcopy(teacher), method)
    if method != "distill":
        assert own(x).transfer_loss < 1e-12


@kinds
def test_patches_after_the_final_norm_are_taught(kind: str) -> None:
    teacher, student, x = tiny(kind), tiny(kind, seed=1), pictures(kind, dtype=torch.float32)
    with torch.no_grad():
        patches = patch_features(teacher, run_features(teacher, x), TINY[kind].size)
    assert patches.shape[1:3] == sites(teacher)[-1].shape.geometry.grid
    out = DualViT(teacher, student, "feature", tokens="both", weight=1.0)(x)
    assert set(out.parts) == {"feature", "patches"}
    assert all(part > 0 for part in out.parts.values())


@kinds
def test_blocks_that_run_again_are_taught_as_well(kind: str) -> None:
    teacher, student, found = tiny(kind, dtype=torch.float64), tiny(kind, seed=1, dtype=torch.float64), []
    if not family_of(student).recomputed(student):
        return
    for checkpointing in (False, True):
        twin: Any = copy.deepcopy(student)
        twin.set_grad_checkpointing(checkpointing)
        dual = DualViT(teacher, twin, "attention_output").train()
        torch.manual_seed(3)
        out = dual(pictures(kind))
        (out.transfer_loss + out.logits.square().mean()).backward()
        found.append(gradient(twin))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("teacher", ["same", "plain"])
@whole_kinds
def test_distilled_maps_are_those_of_the_layers(kind: str, teacher: str) -> None:
    student, x = whole(kind, seed=1), pictures(kind)
    site = sites(student)[0]
    if teacher == "plain" and layout_of(student, site).prefix not in ((), ("cls",)):
        return  # of other tokens
    theirs = whole(kind) if teacher == "same" else plain_teacher(kind)
    (_, targets), (_, ours) = (run(copy.deepcopy(each), x) for each in (theirs, student))
    expected = sum(
        cross_entropy(t.map.reshape(s.logits.shape), s.logits) for t, s in zip(targets, ours, strict=True)
    )
    for each in (student, convert(student, "*: softmax")):
        loss = DualViT(theirs, each, "distill", weight=1.0, **ALIKE)(x).transfer_loss
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-8)


def plain_teacher(kind: str) -> nn.Module:
    """A plain vision transformer with as many tokens, layers and heads."""
    site = sites(whole(kind))[0]
    sizes = {"embed_dim": 8 * site.num_heads, "num_heads": site.num_heads, "depth": len(sites(whole(kind)))}
    sizes["img_size"] = TINY[kind].size
    sizes["patch_size"] = TINY[kind].size[0] // site.shape.geometry.grid[0]
    return dense.tiny("vit" if site.shape.geometry.num_prefix else "vit_no_prefix", **sizes)


def padded(sizes: list[tuple[int, int]]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """A batch of images of several grids as patches with padding, and the same images one by one."""
    most = max(rows * columns for rows, columns in sizes)
    found = {"patches": torch.zeros(len(sizes), most, 192).double(),
             "patch_coord": torch.zeros(len(sizes), most, 2, dtype=torch.long),
             "patch_valid": torch.zeros(len(sizes), most, dtype=torch.bool)}  # fmt: skip
    alone = []
    for index, (rows, columns) in enumerate(sizes):
        image = dense.images(1, seed=index, size=(8 * rows, 8 * columns))
        count = rows * columns
        found["patches"][index, :count] = batch_patchify(image, (8, 8))[0][0]
        found["patch_coord"][index, :count] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        found["patch_valid"][index, :count] = True
        alone.append(image)
    return found, alone


@pytest.mark.parametrize("kind", ["naflex", "naflex_rope"])
def test_padded_patches_are_shut_out(kind: str) -> None:
    batch, alone = padded([(4, 6), (3, 2)])
    model: Any = tiny(kind, dtype=torch.float64)
    hosted = copy.deepcopy(model)
    host_attention(hosted)
    assert torch.equal(hosted(batch), model(batch))
    student = convert(model, "*: linear")
    expected = torch.cat([student(image) for image in alone])
    torch.testing.assert_close(
        student(batch), expected, rtol=1e-6, atol=1e-7
    )  # timm's positions are of float32
    with pytest.raises(UnsupportedModelError, match="padded tokens"):
        convert(model, "*: window(window=2)")(batch)


def test_blocks_of_coatnet_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="TransformerBlock2d with Attention2d"):
        check_supported(timm.create_model("test_coatnet"))


def test_talking_heads_are_converted_and_looked_at_but_not_distilled() -> None:
    model: Any = tiny("cait", dtype=torch.float64)
    blocks = len(model.blocks)  # the class attention after them stays as it is
    places = itertools.cycle(range(blocks + 1))
    expected, _ = run(
        copy.deepcopy(model),
        pictures("cait"),
        lambda layer: linear(layer) if next(places) < blocks else layer.out,
    )
    torch.testing.assert_close(convert(model, "*: linear")(pictures("cait")), expected, rtol=1e-9, atol=1e-10)
    own: list[Tensor] = []
    hook = model.blocks[0].attn.attn_drop.register_forward_hook(lambda _, given, out: own.append(out))
    model(pictures("cait"))
    hook.remove()
    torch.testing.assert_close(
        attention_maps(model, pictures("cait"), [0])[0], own[0].float(), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(TransferError, match="mixes its maps between heads"):
        DualViT(model, tiny("cait", seed=1, dtype=torch.float64), "distill")


def test_differences_of_maps_are_looked_at_and_copied_but_not_distilled() -> None:
    model: Any = tiny("differential", dtype=torch.float64)
    layer, x = model.blocks[0].attn, torch.randn(2, 25, 16, dtype=torch.float64)
    parts = layer.qkv(x).chunk(3, 2)[:2]
    q, k = (
        each.unflatten(2, (2, 2, -1)).permute(0, 2, 3, 1, 4) for each in parts
    )  # heads, then their halves
    maps = (layer.scale * q @ k.mT).softmax(-1)
    wanted = maps[:, :, 0] - layer._compute_lambda() * maps[:, :, 1]
    host = native_host(model, model.blocks[0])
    heads = host.heads_of(x)
    found = heads.to_map((heads.scale * heads.q) @ heads.k.mT)  # type: ignore[misc, operator, union-attr]
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(host(x), layer(x), rtol=1e-10, atol=1e-12)
    assert attention_maps(model, pictures("differential"), [0])[0].shape == (2, 2, 25, 25)
    for method in ("distill", "copy"):
        with pytest.raises(TransferError):
            DualViT(model, tiny("differential", seed=1, dtype=torch.float64), method)


@kinds
def test_what_a_family_cannot_is_refused_by_name(kind: str) -> None:
    model = tiny(kind)
    for to in family_of(model).cannot:
        if to not in ("none", "without"):
            with pytest.raises(UnsupportedModelError, match=type(model).__name__):
                check_supported(model, to=to)


@pytest.mark.parametrize("kind", [kind for kind in TINY if len(depths(tiny(kind))) > 1])
def test_merges_are_deformable_or_refused_by_name(kind: str) -> None:
    model = tiny(kind, dtype=torch.float64)
    if family_of(model).merges(model):
        assert convert(model, "merge: deformable")(pictures(kind)).isfinite().all()
        return
    with pytest.raises(UnsupportedModelError, match=type(model).__name__):
        convert(model, "merge: deformable")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime not installed")
@pytest.mark.parametrize("kind", list(TINY)[::3])
def test_a_converted_model_is_exported(kind: str, tmp_path: Path) -> None:
    model = ready(tiny(kind), plan(kind), kind)
    assert export_model(model, tmp_path / "model.onnx").error <= TINY[kind].rounding


@pytest.mark.parametrize("last", [0, 1])
def test_stages_of_visformer_merge_tokens(last: int) -> None:
    size, teacher = (64, 96), tiny("visformer", (64, 96), patch_size=16, depth=(2, 1, 2), dtype=torch.float64)
    assert [site.name for site in sites(teacher)] == ["stage2.0", "stage3.0", "stage3.1"]
    assert [site.shape.geometry.grid for site in sites(teacher)] == [(4, 6), (2, 3), (2, 3)]
    student, x = convert(teacher, "*: linear; -1: none").eval(), pictures("visformer", size=size)
    expected, _ = run(copy.deepcopy(teacher), x, linear)
    kept = convert(teacher, "*: linear")
    torch.testing.assert_close(kept(x), expected, rtol=1e-9, atol=1e-10)
    vit(teacher).stage3[1].attn = vit(teacher).stage3[1].norm1 = None
    torch.testing.assert_close(student(x), convert(teacher, "*: linear")(x), rtol=1e-9, atol=1e-10)
    assert student.train()(x).isfinite().all()
    dual = DualViT(teacher, kept, "block_output", layers=str(last))
    assert dual(x).transfer_loss > 0
    with pytest.raises(UnsupportedModelError, match="cannot be resized to 33x48"):
        resize(teacher, (33, 48))
    with pytest.raises(UnsupportedModelError, match="cannot be deformable"):
        convert(teacher, "merge: deformable")


@pytest.mark.parametrize("last", [0, 1])
def test_stages_of_volo_are_of_plain_blocks(last: int) -> None:
    teacher, x = whole("volo", downsamples=(True, True, False)), pictures("volo")
    assert [site.name for site in sites(teacher)] == ["stage2.0", "stage3.0", "stage3.1"]
    assert [site.shape.geometry.grid for site in sites(teacher)] == [(4, 6), (2, 3), (2, 3)]
    expected, _ = run(copy.deepcopy(teacher), x, linear)
    student = convert(teacher, "*: linear")
    torch.testing.assert_close(student(x), expected, rtol=1e-9, atol=1e-10)
    assert DualViT(teacher, student, "block_output", layers=str(last))(x).transfer_loss > 0
    with pytest.raises(UnsupportedModelError, match="cannot be resized to 36x48"):
        resize(teacher, (36, 48))


@pytest.mark.parametrize("changes", [{}, {"post_layers": None, "global_pool": "avg", "use_aux_head": False}])
def test_the_class_token_of_volo_joins_after_its_blocks(changes: dict[str, Any]) -> None:
    model, x = VOLO(img_size=TINY["volo"].size, **TINY["volo"].arguments | changes).double(), pictures("volo")
    features = run_features(model, x)
    expected = (features if changes else features[:, 1:]).unflatten(1, (4, 6))
    assert torch.equal(patch_features(model, features, TINY["volo"].size), expected)


@pytest.mark.parametrize("kind", ["sam", "visformer"])
def test_adapters_are_merged(kind: str) -> None:
    plain, model, x = tiny(kind), tiny(kind), pictures(kind, dtype=torch.float32)
    add_lora(model, 3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    wanted = model(x)
    assert not torch.allclose(wanted, plain(x), atol=1e-3)
    plain.load_state_dict(merged(model.state_dict()))
    torch.testing.assert_close(plain(x), wanted, rtol=1e-4, atol=1e-4)


def test_projections_by_convolutions_are_read_as_linear_ones() -> None:
    model = whole("visformer")
    taken = convert(model, "0: hash(start=mean)").get_submodule("stage2.0.attn.qkv")
    q, k, v = model.get_submodule("stage2.0.attn.qkv").weight.chunk(3)  # type: ignore[operator]
    torch.testing.assert_close(taken.weight, torch.cat([(q + k) / 2, v]))


def test_blocks_of_hiera_are_compared_row_by_row() -> None:
    model: Any = tiny("hiera", (64, 96), stages=(2, 2, 3), q_pool=2, mask_unit_size=(4, 4),
                      mask_unit_attn=(True, True, False))  # fmt: skip
    sequence, found = family_of(model).sequencer(model), []
    for site in sites(model):
        index = int(site.path.rpartition(".")[2])
        site.block(model).register_forward_hook(
            lambda _, given, out, i=index: found.append((sequence(out), model.reroll(out, i).flatten(1, 2)))
        )
    model(pictures("hiera", size=(64, 96), dtype=torch.float32))
    assert [site.path for site in sites(model)] == [
        "blocks.0",
        "blocks.1",
        "blocks.3",
        "blocks.5",
        "blocks.6",
    ]
    assert len(found) == len(sites(model))
    assert all(torch.equal(ours, theirs) for ours, theirs in found)


@pytest.mark.parametrize(
    "changes", [{"q_pool": 0}, {"mask_unit_size": (4, 4)}, {"q_stride": (1, 2)}, {"patch_drop_rate": 0.5}]
)
def test_a_hiera_whose_tokens_are_no_grid_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="a Hiera"):
        check_supported(tiny("hiera", **changes))


def test_positions_of_windows_stay_when_a_hiera_is_resized() -> None:
    model: Any = tiny("hiera", abs_win_pos_embed=True, global_pos_size=(4, 6))
    before = copy.deepcopy(model.state_dict())
    resize(model, TINY["hiera"].other)
    other: Any = tiny("hiera", TINY["hiera"].other, abs_win_pos_embed=True, global_pos_size=(4, 6))
    other.load_state_dict(before)
    y = pictures("hiera", dtype=torch.float32, size=TINY["hiera"].other)
    assert torch.equal(model(y), other(y))


def test_sam2_takes_whole_windows_and_other_patches() -> None:
    with pytest.raises(UnsupportedModelError, match="whole windows of 4x4"):
        resize(tiny("sam2"), (40, 48))
    model, x = tiny("sam2", patch_size=(8, 8), window_spec=(2, 3)), pictures("sam2", dtype=torch.float32)
    assert [site.shape.geometry.grid for site in sites(model)] == [(4, 6), (4, 6), (2, 3), (2, 3)]
    assert convert(model, "*: linear")(x).isfinite().all()
    image: Any = model
    assert image.forward_features(x).shape == (2, 2, 3, 32)


@pytest.mark.parametrize("kind", ["mvitv2", "mvitv2_cls"])
def test_keys_of_mvitv2_keep_their_place_where_there_are_more(kind: str) -> None:
    model = tiny(kind, dtype=torch.float64)
    student, site = convert(model, "*: softmax"), sites(model)[0]
    native, converted = family_of(model).host(model, site.block(model)), site.layer(student)
    prefix, grid = site.shape.geometry.num_prefix, site.shape.geometry.grid
    x = torch.randn(2, site.shape.geometry.num_tokens, site.width, dtype=torch.float64)
    few, many = native.attended(native.heads_of(x, grid)), converted.heads_of(x, grid)
    places = torch.arange(grid[0] * grid[1]).unflatten(0, grid)[::2, ::2].flatten() + prefix
    own = torch.cat([torch.arange(prefix), places])
    assert converted.structure(grid).is_whole
    assert native.structure(grid).reduction == ("stride", (2, 2))
    for theirs, ours in zip((few.q, few.k, few.v), (many.q, many.k, many.v), strict=True):
        torch.testing.assert_close(ours if theirs is few.q else ours[:, :, own], theirs)
    torch.testing.assert_close(many.bias[..., own], few.bias)
    assert many.bias.shape == (2, 2, site.shape.geometry.num_tokens, site.shape.geometry.num_tokens)


def test_reduced_keys_beside_a_class_token_are_shared_by_their_tokens() -> None:
    model, x = tiny("mvitv2_cls"), pictures("mvitv2_cls", dtype=torch.float32)
    found = layer_maps(model, x, [0])[0]
    assert found.weights.shape[-1] == 1 + 4 * 4
    shared = found.on_tokens()
    assert shared.shape[-2:] == (65, 65)
    torch.testing.assert_close(shared[..., 0], found.weights[..., 0])
    torch.testing.assert_close(shared.sum(-1), torch.ones(2, 2, 65))


def test_a_layer_of_mvitv2_adds_its_queries_also_to_an_operator_without_keys() -> None:
    model, x = tiny("mvitv2"), pictures("mvitv2", dtype=torch.float32)
    assert convert(model, "*: uniform", without=["bias"])(x).isfinite().all()


@pytest.mark.parametrize("changes", [{"mode": "max"}, {"kernel_qkv": (2, 2)}, {"use_abs_pos": True}])
def test_an_mvitv2_that_pools_otherwise_is_refused(changes: dict[str, Any]) -> None:
    sizes = {"depths": (2,), "embed_dim": (16,), "num_heads": (2,), "stride_q": ((1, 1),)}
    model = mvitv2.MultiScaleVit(mvitv2.MultiScaleVitCfg(**{**sizes, **changes}), img_size=(32, 32))
    with pytest.raises(UnsupportedModelError, match="a MultiScaleVit"):
        check_supported(model)


@pytest.mark.parametrize("size", [(32, 48), (48, 32), (40, 72)])
def test_layers_of_caformer_read_the_grid_of_each_batch(size: tuple[int, int]) -> None:
    changes = {"depths": (1, 2), "dims": (8, 16), "token_mixers": [metaformer.SepConv, metaformer.Attention],
               "norm_layers": [metaformer.LayerNorm2dNoBias, metaformer.LayerNormNoBias]}  # fmt: skip
    model = whole("caformer", **changes)
    assert [site.name for site in sites(model)] == ["stage2.0", "stage2.1"]
    student = convert(model, "*: window(window=2); -1: none").train()
    for checkpointing in (False, True):
        twin: Any = copy.deepcopy(student)
        twin.set_grad_checkpointing(checkpointing)
    model: Any = whole("caformer", **changes)
    resize(model, size)
    other = convert(model, "*: window(window=2); -1: none").train()
    outputs, gradients = [], []
    for each in (other, student, twin):
        out = each(pictures("caformer", size=size))
        each(pictures("caformer"))  # another grid before the backward pass
        out.square().sum().backward()
        outputs.append(out)
        gradients.append(gradient(each))
    for each_out, each_gradient in zip(outputs[1:], gradients[1:], strict=True):
        assert torch.equal(each_out, outputs[0])
        torch.testing.assert_close(each_gradient, gradients[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["convformer_s18", "poolformer_s12", "poolformerv2_s12"])
def test_a_metaformer_without_attention_teaches_what_any_classifier_does(name: str) -> None:
    teacher = timm.create_model(name, num_classes=3)
    with pytest.raises(UnsupportedModelError, match="though feature, logits and block_output take it"):
        check_supported(teacher)
    student, x = tiny("caformer"), pictures("caformer", dtype=torch.float32)
    assert DualViT(teacher, student, "feature", tokens="both")(x).transfer_loss > 0
    assert sum(attention_macs(teacher)) == 0 < other_macs(teacher)
