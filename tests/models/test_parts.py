"""The masked autoencoder against a loop over patches; a mirrored student has the teacher's parts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from graftvit.models.errors import ConfigError, TransferError, UnsupportedModelError
from graftvit.models.families import attention_shape, token_layout
from graftvit.models.families.plain import native_parts
from graftvit.models.mae import MaskedAutoencoder, decoder_sizes
from graftvit.models.mirror import mirror_arguments
from graftvit.models.parts import grid_positions, unfold_patches
from graftvit.transfer.methods.mismatch import compare_models
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


def encoder(
    size: tuple[int, int] = (8, 12), patch: int = 4, channels: int = 1, **more: object
) -> VisionTransformer:
    torch.manual_seed(0)
    options: dict[str, object] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0} | more
    model = VisionTransformer(img_size=size, patch_size=patch, in_chans=channels, **options)  # type: ignore[arg-type]
    return model.double()


def autoencoder(model: nn.Module, ratio: float = 0.5, **more: object) -> MaskedAutoencoder:
    options: dict[str, object] = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2} | more
    return MaskedAutoencoder(model, mask_ratio=ratio, **options).double()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("width", "blocks", "given", "sizes"),
    [
        (768, 12, {}, (512, 8, 16)), (1024, 24, {}, (512, 8, 16)), (1280, 32, {}, (512, 8, 16)),
        (384, 12, {}, (256, 8, 8)), (192, 12, {}, (128, 8, 4)), (64, 4, {}, (32, 2, 1)), (16, 1, {}, (32, 1, 1)),
        (192, 12, {"dim": 512, "depth": 3, "heads": 8}, (512, 3, 8)), (192, 12, {"dim": 100}, (100, 8, 2)),
        (192, 12, {"dim": 8}, (8, 8, 1)),
    ],
)  # fmt: skip
def test_the_decoder_is_maes_and_a_smaller_encoder_has_a_smaller_one(
    width: int, blocks: int, given: dict[str, int], sizes: tuple[int, int, int]
) -> None:
    assert decoder_sizes(width, blocks, **given) == sizes


def test_the_sizes_of_the_decoder_follow_the_encoder() -> None:
    model = MaskedAutoencoder(encoder(embed_dim=96, depth=3))
    assert (model.decoder_embed.out_features, len(model.decoder_blocks)) == (64, 2)
    assert model.decoder_blocks[0].attn.num_heads == 2


def fix_order(model: MaskedAutoencoder, order_BN: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "random_order", lambda batch, device: order_BN)


def patch_of(image_CHW: Tensor, index: int, patch: int, columns: int) -> Tensor:
    row, column = divmod(index, columns)
    return image_CHW[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]


def naive_loss(
    model: MaskedAutoencoder, images: Tensor, order_BN: Tensor, patch: int, columns: int
) -> Tensor:
    """One image and one patch at a time, straight from the paper's description."""
    vit, errors = model.encoder, []
    prefix = vit.num_prefix_tokens
    offset = 0 if vit.no_embed_class else prefix
    for image, order in zip(images, order_BN.tolist(), strict=True):
        visible, hidden = order[: len(order) - model.num_masked], order[len(order) - model.num_masked :]
        tokens = []
        for kind in ("cls_token", "reg_token"):
            if getattr(vit, kind) is not None:
                tokens += list(getattr(vit, kind)[0])
        if not vit.no_embed_class:
            tokens = [token + vit.pos_embed[0, i] for i, token in enumerate(tokens)]
        for index in visible:
            pixels = patch_of(image, index, patch, columns)
            embedded = (vit.patch_embed.proj.weight * pixels).flatten(1).sum(1)
            if vit.patch_embed.proj.bias is not None:  # models with a norm before the blocks have none
                embedded = embedded + vit.patch_embed.proj.bias
            tokens.append(embedded + vit.pos_embed[0, offset + index])
        encoded = vit.norm(vit.blocks(vit.norm_pre(torch.stack(tokens)[None])))
        narrow = model.decoder_embed(encoded)[0]
        line = [model.mask_token[0, 0] + model.positions[0, index] for index in range(len(order))]
        for place, index in enumerate(visible):
            line[index] = narrow[prefix + place] + model.positions[0, index]
        x = torch.stack([*narrow[:prefix], *line])[None]
        for block in model.decoder_blocks:
            x = block(x)
        painted = model.decoder_head(model.decoder_norm(x))[0, prefix:]
        for index in hidden:
            target = patch_of(image, index, patch, columns).permute(1, 2, 0).flatten().float()
            if model.norm_pixels:
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            errors.append((painted[index] - target).square().mean())
    return torch.stack(errors).mean()


CASES = [
    ({"size": (8, 12), "patch": 4, "channels": 1}, 0.5, True),
    ({"size": (16, 8), "patch": 2, "channels": 3, "reg_tokens": 4, "no_embed_class": True}, 0.75, False),
    ({"size": (12, 8), "patch": 4, "channels": 3, "class_token": False, "global_pool": "avg"}, 0.34, True),
    ({"size": (6, 9), "patch": 3, "channels": 1, "reg_tokens": 2, "pre_norm": True}, 0.5, False),
]


@pytest.mark.parametrize(("options", "ratio", "norm_pixels"), CASES)
def test_loss_and_gradients_are_those_of_a_loop(
    options: dict[str, object], ratio: float, norm_pixels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = autoencoder(encoder(**options), ratio, norm_pixels=norm_pixels)  # type: ignore[arg-type]
    height, width = options["size"]  # type: ignore[misc]
    patch = int(options["patch"])  # type: ignore[call-overload]
    images = torch.randn(3, int(options["channels"]), height, width, dtype=torch.float64)  # type: ignore[call-overload]
    order_BN = model.random_order(3, images.device)
    fix_order(model, order_BN, monkeypatch)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours = model(images)
    plain = naive_loss(model, images, order_BN, patch, width // patch)
    torch.testing.assert_close(ours.double(), plain.double(), rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(_gradients(ours, parameters), _gradients(plain, parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def _gradients(loss: Tensor, parameters: list[nn.Parameter]) -> Iterator[Tensor]:
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return (torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True))


@given(
    ratio=st.floats(0.05, 0.95), rows=st.integers(1, 4), columns=st.integers(2, 5), batch=st.integers(1, 3)
)
@settings(max_examples=20)
def test_as_many_patches_are_hidden_as_stated(ratio: float, rows: int, columns: int, batch: int) -> None:
    patches = rows * columns
    expected = round(ratio * patches)
    vit = encoder((rows * 2, columns * 2), patch=2)
    if not 0 < expected < patches:
        with pytest.raises(ConfigError, match="mask_ratio"):
            autoencoder(vit, ratio)
        return
    _, mask = autoencoder(vit, ratio)._predict(torch.randn(batch, 1, rows * 2, columns * 2).double())
    assert mask.shape == (batch, patches)
    assert mask.sum(dim=1).tolist() == [expected] * batch


def test_masks_differ_between_images_and_steps_and_follow_the_seed() -> None:
    model = autoencoder(encoder((16, 16)))
    images = torch.randn(8, 1, 16, 16, dtype=torch.float64)
    torch.manual_seed(3)
    first, second = model._predict(images)[1], model._predict(images)[1]
    torch.manual_seed(3)
    assert torch.equal(first, model._predict(images)[1])
    assert not torch.equal(first, second)
    assert len(set(map(tuple, first.tolist()))) > 1


def test_every_parameter_but_the_unused_head_learns() -> None:
    model = autoencoder(encoder(reg_tokens=2))
    model(torch.randn(2, 1, 8, 12, dtype=torch.float64)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_it_learns_to_paint_a_pattern() -> None:
    torch.manual_seed(0)
    model = autoencoder(encoder((8, 8)).float(), norm_pixels=False).float()
    stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 1, 8, 8)
    images = stripes * torch.tensor([1.0, -1.0])[:, None, None, None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(80):
        loss = model(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.9
    assert losses[-1] < 0.05


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    ph=st.integers(1, 3),
    pw=st.integers(1, 3),
    c=st.integers(1, 3),
)
@settings(max_examples=20)
def test_unfolding_goes_row_by_row(rows: int, columns: int, ph: int, pw: int, c: int) -> None:
    images = torch.randn(2, c, rows * ph, columns * pw)
    patches = unfold_patches(images, (ph, pw))
    assert patches.shape == (2, rows * columns, ph * pw * c)
    for number, patch in enumerate(patches.unbind(1)):
        row, column = divmod(number, columns)
        cut = images[:, :, row * ph : (row + 1) * ph, column * pw : (column + 1) * pw]
        assert torch.equal(patch.reshape(2, ph, pw, c), cut.permute(0, 2, 3, 1))


def test_positions_are_the_sine_and_cosine_of_row_and_column() -> None:
    table = grid_positions((2, 3), 8)
    assert table.shape == (1, 6, 8)
    for row in range(2):
        for column in range(3):
            waves = [f(axis * w) for axis in (row, column) for f in (math.sin, math.cos) for w in (1.0, 1e-2)]
            assert table[0, row * 3 + column].tolist() == pytest.approx(waves, abs=1e-6)


@pytest.mark.parametrize(("options", "key"), [
    ({"decoder_dim": 6}, "decoder_dim=6"),
    ({"decoder_dim": 8, "decoder_heads": 3}, "decoder_heads=3"),
    ({"ratio": 0.01}, "mask_ratio=0.01"),
    ({"ratio": 0.99}, "mask_ratio=0.99"),
])  # fmt: skip
def test_impossible_sizes_are_named(options: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        autoencoder(encoder(), **options)  # type: ignore[arg-type]


def test_other_models_and_sizes_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Eva"):
        autoencoder(
            timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=1, embed_dim=24, num_heads=2)
        )
    with pytest.raises(UnsupportedModelError, match="9x12"):
        autoencoder(encoder())(torch.zeros(1, 1, 9, 12).double())


# A mirrored student has the teacher's parts, its own size and fresh weights, in every family.


SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
STUDENT: dict[str, Any] = {
    **SMALL, "embed_dim": 48, "depth": 3, "num_heads": 3, "img_size": 48, "num_classes": 5,
}  # fmt: skip
TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "no class token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg", "reg_tokens": 2}),
    "no position": ("vit_tiny_patch16_224", {"pos_embed": "none"}),
    "qk-norm": ("vit_tiny_patch16_224", {"qk_norm": True, "qkv_bias": False, "scale_attn_norm": True}),
    "deit distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {"init_values": 0.01}),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {}),
    "dinov2 giant": ("vit_giant_patch14_dinov2", {}),
    "clip": ("vit_base_patch16_clip_quickgelu_224", {}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "beit": ("beit_base_patch16_224", {}),
    "beitv2": ("beitv2_base_patch16_224", {}),
    "shared bias": ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    "eva": ("eva_giant_patch14_224", {}),
    "eva02 small": ("eva02_small_patch14_224", {}),
    "eva02": ("eva02_base_patch14_224", {}),
    "eva02 clip": ("eva02_base_patch16_clip_224", {}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "rope mixed": ("vit_small_patch16_rope_mixed_224", {}),
}
SIZES = {"depth", "width", "heads", "head width", "patch grid", "pooling"}


def teacher_of(name: str) -> torch.nn.Module:
    architecture, arguments = TEACHERS[name]
    torch.manual_seed(0)
    return timm.create_model(architecture, **{**SMALL, **arguments})


def mirrored(teacher: torch.nn.Module, arguments: dict[str, Any] | None = None) -> torch.nn.Module:
    architecture, made = mirror_arguments(teacher, "vit_tiny_patch16_224", arguments or STUDENT)
    torch.manual_seed(1)
    return timm.create_model(architecture, **json.loads(json.dumps(made)))


@pytest.mark.parametrize("name", TEACHERS)
def test_only_sizes_differ_after_mirroring(name: str) -> None:
    teacher = teacher_of(name)
    student = mirrored(teacher, {**STUDENT, "global_pool": "avg"})
    found = compare_models(teacher, student)
    assert {mismatch.name for mismatch in found} <= SIZES
    assert not any(mismatch.warning for mismatch in found)
    assert type(student) is type(teacher)
    assert token_layout(student).prefix == token_layout(teacher).prefix
    assert token_layout(student).grid == (6, 6)
    shape = attention_shape(student)
    assert (shape.depth, shape.width, shape.num_heads) == (3, 48, 3)
    assert student.num_classes == 5
    assert student(torch.zeros(2, 3, 48, 48)).shape[-1] == 5


@pytest.mark.parametrize("name", TEACHERS)
def test_mirror_of_the_same_size_has_the_same_shapes_and_other_weights(name: str) -> None:
    teacher = teacher_of(name)
    keep = {**SMALL, "num_classes": teacher.num_classes, "global_pool": teacher.global_pool}
    if not teacher.num_prefix_tokens or teacher.cls_token is None:
        keep["class_token"] = False
    student = mirrored(teacher, keep)
    ours, theirs = student.state_dict(), teacher.state_dict()
    same_mlp = native_parts(teacher).mlp == "MLP"
    assert set(ours) == set(theirs)
    assert all(ours[key].shape == theirs[key].shape for key in ours if not same_mlp or ".mlp." not in key)
    assert not torch.equal(ours["blocks.0.attn.proj.weight"], theirs["blocks.0.attn.proj.weight"])
    assert not torch.equal(ours["patch_embed.proj.weight"], theirs["patch_embed.proj.weight"])


def test_layer_scale_starts_where_the_teachers_started() -> None:
    teacher = teacher_of("beit")
    torch.nn.init.constant_(teacher.blocks[0].gamma_1, 7.0)  # as after training
    student = mirrored(teacher)
    assert student.blocks[0].gamma_1.eq(0.1).all()


def test_the_students_own_part_gives_way_and_the_rest_is_kept() -> None:
    asked = {**STUDENT, "reg_tokens": 4, "init_values": 0.5, "drop_path_rate": 0.3, "mlp_ratio": 2}
    student = mirrored(teacher_of("clip"), asked)
    parts = native_parts(student)
    assert (parts.registers, parts.layer_scale, parts.activation) == (0, None, "quick_gelu")
    assert student.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert student.blocks[0].mlp.fc1.out_features == 96


@pytest.mark.parametrize("name", ["eva02", "dinov2 giant"])
def test_a_gated_mlp_keeps_the_teachers_ratio(name: str) -> None:
    teacher, student = teacher_of(name), mirrored(teacher_of(name))
    assert teacher.blocks[0].mlp.fc2.in_features * 48 // 32 == student.blocks[0].mlp.fc2.in_features


def test_non_square_images_and_patches() -> None:
    asked = {**STUDENT, "img_size": (32, 64), "patch_size": (8, 16)}
    assert token_layout(mirrored(teacher_of("beit"), asked | {"global_pool": "avg"})).grid == (4, 4)


def test_distilled_deit_reads_its_tokens_whatever_pooling_was_asked() -> None:
    assert mirrored(teacher_of("deit distilled"), {**STUDENT, "global_pool": "avg"}).global_pool == "token"


@pytest.mark.parametrize(("name", "change", "message"), [
    ("beit", {"dynamic_img_size": True}, r"student\.model_args\.dynamic_img_size.*Beit.*valid: "),
    ("no class token", {"global_pool": "token"}, r"student\.global_pool=token.*class token"),
    ("beit", {"global_pool": "map"}, r"student\.global_pool=map.*valid: avg, token"),
    ("vit", {"num_heads": 5}, r"student\.model vit_tiny_patch16_224 cannot be built"),
    ("vit", {"depht": 5}, r"student\.model .*depht"),
])  # fmt: skip
def test_mistakes_name_the_key(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(TransferError, match=message):
        mirror_arguments(teacher_of(name), "vit_tiny_patch16_224", STUDENT | change)


def test_models_without_a_name_or_of_other_families_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="architecture's name"):
        mirror_arguments(VisionTransformer(**SMALL), "vit_tiny_patch16_224", STUDENT)
    with pytest.raises(UnsupportedModelError, match="supported are"):
        mirror_arguments(teacher_of("vit"), "resnet18", {})
