"""Files of research repositories and of Google give the features that the papers' equations give."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from graftvit.checkpoints.fit import resample_position
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.models.errors import CheckpointError
from support.files import source_files as files
from support.files.source_checks import HALF, IMAGENET, TINY, Load, doubled, loader, plain, same_features
from support.files.source_files import DEPTH, HEADS, SIDE, Tensors
from support.models import reference_vit as reference
from torch import Tensor


@pytest.fixture
def load(tmp_path: Path) -> Load:
    return loader(tmp_path)


def test_mae_autoencoder(load: Load) -> None:
    tensors = files.mae()
    teacher = load({"model": tensors}, "vit_tiny_patch16_224")
    assert same_features(teacher, plain(tensors))
    assert teacher.mean == IMAGENET
    left = {key for key in tensors if key.startswith(("decoder", "mask_token"))}
    assert set(teacher.report.unexpected) == left
    assert set(teacher.report.unexpected.values()) == {"the decoder of masked autoencoding"}


def test_mae_fine_tuned_reads_the_mean_of_the_patches(load: Load) -> None:
    tensors = files.plain(final="fc_norm", classes=files.CLASSES)
    t = doubled(tensors)

    def expected(images: Tensor) -> Tensor:
        pooled = reference.plain_vit(t, images, HEADS, DEPTH)[:, 1:].mean(1)
        return reference.linear(reference.norm(pooled, t, "fc_norm"), t, "head")

    assert same_features(load({"model": tensors}, "vit_tiny_patch16_224"), expected, logits=True)


def test_deit_and_its_distilled_form(load: Load) -> None:
    tensors = files.plain(classes=files.CLASSES)
    t = doubled(tensors)
    teacher = load({"model": tensors}, "deit_tiny_patch16_224")
    features = plain(tensors)
    assert same_features(
        teacher, lambda images: reference.linear(features(images)[:, 0], t, "head"), logits=True
    )

    tensors = files.distilled()
    t = doubled(tensors)
    teacher = load({"model": tensors}, "deit_tiny_distilled_patch16_224")

    def mean_of_heads(images: Tensor) -> Tensor:
        tokens = plain(tensors)(images)
        first = reference.linear(tokens[:, 0], t, "head")
        return (first + reference.linear(tokens[:, 1], t, "head_dist")) / 2

    assert same_features(teacher, plain(tensors))
    assert same_features(teacher, mean_of_heads, logits=True)
    assert (teacher.has_head, teacher.mean) == (True, IMAGENET)


def test_deit3(load: Load) -> None:
    tensors = files.deit3()
    t = doubled(tensors)
    teacher = load({"model": tensors}, "deit3_small_patch16_224")
    assert same_features(teacher, lambda images: reference.deit3(t, images, HEADS, DEPTH))
    assert teacher.has_head
    assert "DeiT III" in teacher.report.format


@pytest.mark.parametrize("wrap", ["model", "module"])
@pytest.mark.parametrize("positions", [False, True])
def test_beit_fine_tuned(load: Load, wrap: str, positions: bool) -> None:
    tensors = files.beit(shared=False, final="fc_norm", classes=files.CLASSES, positions=positions)
    t = doubled(tensors)

    def expected(images: Tensor) -> Tensor:
        pooled = reference.beit(t, images, HEADS, DEPTH, SIDE)[:, 1:].mean(1)
        return reference.linear(reference.norm(pooled, t, "fc_norm"), t, "head")

    teacher = load({wrap: tensors}, "beit_base_patch16_224")
    assert same_features(teacher, expected, logits=True)
    assert teacher.mean == (HALF if wrap == "model" else IMAGENET)
    assert teacher.model.patch_embed.img_size == (16, 16)  # by the table, not timm's 224
    assert not teacher.report.resampled
    assert set(teacher.report.unexpected) == {key for key in tensors if key.endswith("position_index")}
    assert ("model=beitv2_base_patch16_224" in teacher.report.summary()) == (wrap == "model")


@pytest.mark.parametrize("second", [False, True])
def test_beit_pre_trained_shares_its_positions(load: Load, second: bool) -> None:
    tensors = files.beit(shared=True, final="norm")
    t = doubled(tensors)
    more = files.block("cls_pt_layers.0.") if second else {}
    teacher = load({"model": {**tensors, **more}}, "beit_base_patch16_224")
    assert same_features(
        teacher, lambda images: reference.norm(reference.beit(t, images, HEADS, DEPTH, SIDE), t, "norm")
    )
    assert teacher.mean == (IMAGENET if second else HALF)
    left = {"mask_token", "lm_head.weight", "lm_head.bias", "rel_pos_bias.relative_position_index", *more}
    assert set(teacher.report.unexpected) == left


def test_a_tag_of_beit2_brings_its_statistics(load: Load) -> None:
    tree = {"model": files.beit(shared=False, final="fc_norm", classes=1000)}
    assert load(tree, "beitv2_base_patch16_224.in1k_ft_in1k").mean == IMAGENET


@pytest.mark.parametrize("mode", ["distill", "copy", "copy_q"])
@pytest.mark.parametrize("part", ["", "#student", "#teacher", "#ema"])
def test_official_attention_transfer(load: Load, mode: str, part: str) -> None:
    models = {
        name: files.plain(final="fc_norm", classes=files.CLASSES) for name in ("student", "teacher", "ema")
    }

    def dual(student: str) -> Tensors:
        pairs = (("student", models[student]), ("teacher", models["teacher"]))
        return {f"{name}.{key}": t for name, tensors in pairs for key, t in tensors.items()}

    args = argparse.Namespace(mode=mode, atd_weight=3.0, model="dual_vit_base_patch16")
    tree = {"model": dual("student"), "model_ema": dual("ema"), "optimizer": {}, "epoch": 1, "args": args}
    teacher = load(tree, "vit_tiny_patch16_224", part)
    chosen = part.removeprefix("#") or "student"
    t = doubled(models[chosen])

    def expected(images: Tensor) -> Tensor:
        pooled = reference.plain_vit(t, images, HEADS, DEPTH)[:, 1:].mean(1)
        pooled = reference.norm(pooled, t, "fc_norm")
        return pooled if chosen == "teacher" else reference.linear(pooled, t, "head")

    assert same_features(teacher, expected, logits=True)
    assert teacher.has_head == (chosen != "teacher")  # its head is as it was drawn
    copied = mode != "distill" and chosen != "teacher"
    assert ("without the teacher it is not the model" in teacher.report.summary()) == copied


def resized(tensors: Tensors, rows: int, method: Any) -> Tensor:
    return resample_position(tensors["pos_embed"], (SIDE, SIDE), (6, 8), rows, method)


@pytest.mark.parametrize("method", ["timm", "mae"])
def test_positions_are_resampled_to_another_size(tmp_path: Path, method: Any) -> None:
    blocks = ["blocks.0.", "blocks.1."]
    for tensors, name, rows, arguments in (
        (files.plain(), "vit_small_patch16_224", 1, {}),
        (files.distilled(), "deit_tiny_distilled_patch16_224", 2, {}),
        (files.deit3(), "deit3_small_patch16_224", 0, {}),
        (files.dinov2(blocks, registers=0), "vit_base_patch14_dinov2", 1, {}),
        (files.dinov2(blocks, registers=2), "vit_base_patch14_reg4_dinov2", 0, {"reg_tokens": 2}),
    ):
        torch.save({"model": tensors}, tmp_path / "source.pth")
        teacher = load_pretrained(
            str(tmp_path / "source.pth"),
            model=name,
            model_args={**TINY, **arguments},
            img_size=(24, 32),
            position_embedding=method,
        )
        assert teacher.report.resampled == {"pos_embed": f"from grid 4x4 to 6x8 ({method}'s bicubic)"}
        whole = (
            {**tensors, "pos_embed": tensors["pos_embed"][:, 1:]} if "reg_tokens" in arguments else tensors
        )
        assert torch.equal(teacher.model.pos_embed, resized(whole, rows, method))
        assert teacher.model(torch.randn(1, 3, 24, 32)).isfinite().all()


def test_beits_tables_are_resampled_too(load: Load) -> None:
    for shared, final in ((True, "norm"), (False, "fc_norm")):
        tree = {"model": files.beit(shared=shared, final=final, classes=0 if shared else 3)}
        teacher = load(tree, "beit_base_patch16_224", img_size=24)
        assert all(how == "from 52 to 124 offsets (timm's way)" for how in teacher.report.resampled.values())
        assert len(teacher.report.resampled) == (1 if shared else DEPTH)


@pytest.mark.parametrize(("name", "rename"), [
    ("deit_tiny_distilled_patch16_224", {}),
    ("deit3_small_patch16_224", {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}),
])  # fmt: skip
def test_a_published_size_needs_no_name(tmp_path: Path, name: str, rename: dict[str, str]) -> None:
    with torch.random.fork_rng():
        model = timm.create_model(name, img_size=32, num_classes=3, init_values=0.1 if rename else None)
    tensors = dict(model.state_dict())
    for ours, theirs in rename.items():
        tensors = {key.replace(ours, theirs): tensor for key, tensor in tensors.items()}
    torch.save({"model": tensors}, tmp_path / "source.pth")
    teacher = load_pretrained(str(tmp_path / "source.pth"))
    assert teacher.architecture == name
    assert teacher.has_head
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(teacher.model(images), model.eval()(images))


# Files of self-supervised ViTs (DINO, DINOv2, DINOv3, iBOT, MoCo-v3) give their papers' features.


@pytest.mark.parametrize("part", ["", "#teacher", "#student"])
def test_dino_training_file(load: Load, part: str) -> None:
    networks = {name: files.plain() for name in ("student", "teacher")}
    tree = {
        name: {f"{wrap}backbone.{key}": t for key, t in networks[name].items()}
        | {f"{wrap}{key}": t for key, t in files.dino_head("head").items()}
        for name, wrap in (("student", "module."), ("teacher", ""))
    }
    center = {"center": torch.zeros(1, 8)}
    teacher = load({**tree, "epoch": 3, "dino_loss": center}, "vit_small_patch16_224", part)
    assert same_features(teacher, plain(networks[part.removeprefix("#") or "teacher"]))
    assert teacher.mean == IMAGENET
    assert set(teacher.report.unexpected) == set(files.dino_head("head"))
    assert set(teacher.report.unexpected.values()) == {"the projection head of self-distillation"}


def test_a_backbone_alone_takes_imagenets_statistics_and_says_so(load: Load) -> None:
    tensors = files.plain()
    for tree in (
        tensors,
        {"state_dict": tensors},
        {"state_dict": {f"module.{k}": t for k, t in tensors.items()}},
    ):
        teacher = load(tree, "vit_small_patch16_224")
        assert same_features(teacher, plain(tensors))
        assert teacher.mean == IMAGENET
        assert "ImageNet's assumed" in teacher.report.summary()


def test_ibot_with_and_without_its_mask_token(load: Load) -> None:
    tensors = files.plain()
    masked = {**tensors, "masked_embed": files.random(1, 16)}
    head = files.dino_head("head") | {"head.last_layer2.weight_g": files.random(8, 1)}
    tree = {
        "teacher": {f"backbone.{key}": t for key, t in masked.items()} | head,
        "student": {"backbone.x": head["head.mlp.0.bias"]},
    }
    teacher = load(tree, "vit_small_patch16_224")
    assert same_features(teacher, plain(tensors))
    assert teacher.report.unexpected["masked_embed"] == "the mask token of masked image modelling"
    assert set(teacher.report.unexpected) == {"masked_embed", *head}
    assert same_features(load({"state_dict": masked}, "vit_small_patch16_224"), plain(tensors))


@pytest.mark.parametrize("part", ["", "#student", "#ema"])
def test_moco(load: Load, part: str) -> None:
    encoders = {name: files.plain() for name in ("base", "momentum")}
    tensors = {f"module.predictor.{i}.weight": files.random(8, 8) for i in (0, 3)}
    for name, encoder in encoders.items():
        whole = {**encoder, **files.moco_head("head")}
        tensors |= {f"module.{name}_encoder.{key}": t for key, t in whole.items()}
    # Its `arch` is the source's own word, which timm does not know.
    tree = {"epoch": 1, "arch": "vit_small", "state_dict": tensors, "optimizer": {}}
    teacher = load(tree, "vit_small_patch16_224", part)
    assert same_features(teacher, plain(encoders["momentum" if part == "#ema" else "base"]))
    assert teacher.mean == IMAGENET
    left = teacher.report.unexpected
    assert left["head.0.weight"] == "the projection head of MoCo"
    assert left["predictor.0.weight"].startswith("outside of ")
    expected = {key.removeprefix("module.") for key in tensors} | set(files.moco_head("head"))
    assert set(left) < expected


def sines(side: int, width: int, *, rows_first: bool) -> Tensor:
    """Fixed positions in two dimensions: MoCo-v3's begin with the rows, MAE's with the columns."""
    position = torch.zeros(1, 1 + side * side, width)
    quarter = width // 4
    for i in range(side * side):
        row, column = divmod(i, side)
        for half, place in enumerate((row, column) if rows_first else (column, row)):
            for j in range(quarter):
                angle = place / 10000 ** (j / quarter)
                position[0, 1 + i, 2 * half * quarter + j] = math.sin(angle)
                position[0, 1 + i, (2 * half + 1) * quarter + j] = math.cos(angle)
    return position


@pytest.mark.parametrize(("rows_first", "heads"), [(True, 12), (False, 6)])
@pytest.mark.parametrize("converted", [True, False])
def test_the_small_moco_has_twelve_heads(load: Load, rows_first: bool, heads: int, converted: bool) -> None:
    with torch.random.fork_rng():
        model = timm.create_model("vit_small_patch16_224", img_size=64, depth=1, num_classes=0)
    tensors = dict(model.state_dict()) | {"pos_embed": sines(4, 384, rows_first=rows_first)}
    if not converted and rows_first:
        tensors = {f"base_encoder.{key}": t for key, t in (tensors | files.moco_head("head")).items()}
    torch_file = {"model" if converted else "state_dict": tensors}
    teacher = load(
        torch_file, "vit_small_patch16_224", embed_dim=None, depth=1, num_heads=None, patch_size=None
    )
    assert teacher.model.blocks[0].attn.num_heads == heads
    assert ("heads: 12, as MoCo-v3's small ViT has" in teacher.report.summary()) == (heads == 12)


@pytest.mark.parametrize("registers", [0, 4, 2])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_dinov2(load: Load, registers: int, gated: bool, chunked: bool) -> None:
    blocks = ["blocks.0.0.", "blocks.1.1."] if chunked else ["blocks.0.", "blocks.1."]
    tensors = files.dinov2(blocks, registers=registers, gated=gated)
    t = doubled(tensors)
    name = ("vit_giant_patch14" if gated else "vit_base_patch14") + (
        "_reg4_dinov2" if registers else "_dinov2"
    )
    arguments = {"reg_tokens": registers} if registers else {}
    teacher = load(tensors, name, **arguments, **({"mlp_ratio": 4} if gated else {}))
    assert same_features(teacher, lambda images: reference.dinov2(t, images, HEADS, blocks, gated=gated))
    assert teacher.mean == IMAGENET
    assert set(teacher.report.unexpected) == {"mask_token"}


def test_dinov2_training_file(load: Load) -> None:
    blocks = ["blocks.0.0.", "blocks.1.1."]
    networks = {name: files.dinov2(blocks, registers=0) for name in ("student", "teacher")}
    tensors: Tensors = {"dino_loss.center": torch.zeros(1, 8)}
    for name, network in networks.items():
        tensors |= {f"{name}.backbone.{key}": t for key, t in network.items()}
        tensors |= {f"{name}.{key}": t for key, t in files.dino_head("dino_head").items()}
    for tree, part, of in (
        ({"model": tensors}, "", "teacher"),
        ({"model": tensors}, "#student", "student"),
        (
            {"teacher": {key.removeprefix("teacher."): t for key, t in tensors.items() if key[0] == "t"}},
            "",
            "teacher",
        ),
    ):
        t = doubled(networks[of])
        teacher = load(tree, "vit_base_patch14_dinov2", part)
        assert same_features(teacher, lambda x, t=t: reference.dinov2(t, x, HEADS, blocks, gated=False))  # type: ignore[misc]


@pytest.mark.parametrize("gated", [False, True])
def test_dinov3(load: Load, gated: bool) -> None:
    tensors = files.dinov3(gated=gated)
    t = doubled(tensors)
    name = "vit_small_plus_patch16_dinov3_qkvb" if gated else "vit_small_patch16_dinov3_qkvb"
    teacher = load(tensors, name, img_size=16, **({"mlp_ratio": 1.5} if gated else {}))
    assert same_features(teacher, lambda images: reference.dinov3(t, images, HEADS, DEPTH, (SIDE, SIDE)))
    assert teacher.model.global_pool == "token"
    assert teacher.mean == IMAGENET
    assert {"mask_token", "rope_embed.periods"} < set(teacher.report.unexpected)


def test_dinov3_with_rounded_periods_says_so(load: Load) -> None:
    tensors = files.dinov3()
    tensors["rope_embed.periods"] = torch.tensor([1.0, 10.06]).bfloat16()
    teacher = load(tensors, "vit_small_patch16_dinov3_qkvb", img_size=16)
    assert "the file's are rounded" in teacher.report.summary()


# Google's flax archives give the features that flax's layers give on their tensors.


NAME = "vit_tiny_patch16_224"


@pytest.fixture
def google_load(load: Load) -> Load:
    """Heads are known by the shapes of kernels, a format by its keys, whatever the file."""
    return lambda tensors, model=NAME, **arguments: load(tensors, model, num_heads=None, **arguments)


def flax(tensors: Tensors, *, old: bool) -> Callable[[Tensor], Tensor]:
    """All tokens after the final norm."""
    t = doubled(tensors)
    return lambda images: reference.flax_vit(t, images, DEPTH, old=old)


@pytest.mark.parametrize("prefix", ["", "opt/target/", "params/"])
@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("old", [True, False])
def test_vit_jax_and_big_vision(google_load: Load, prefix: str, cls: bool, old: bool) -> None:
    tensors = files.flax(old=old, cls=cls, classes=files.CLASSES)
    state = {"opt/state/step": torch.tensor(3)} if prefix.startswith("opt") else {}
    teacher = google_load({f"{prefix}{key}": t for key, t in tensors.items()} | state)
    tokens, t = flax(tensors, old=old), doubled(tensors)

    def logits(images: Tensor) -> Tensor:
        pooled = tokens(images)[:, 0] if cls else tokens(images).mean(1)
        return reference.flax_dense(pooled, t, "head")

    assert same_features(teacher, tokens)
    assert same_features(teacher, logits, logits=True)
    assert teacher.mean == teacher.std == (0.5, 0.5, 0.5)
    assert set(teacher.report.unexpected) == set(state)
    assert teacher.model.blocks[0].attn.num_heads == HEADS  # by the kernels' shapes
    assert "tanh form of GELU" in teacher.report.summary()


def test_blocks_on_each_other(google_load: Load) -> None:
    tensors = files.flax(old=False, cls=True)
    teacher = google_load({f"params/{key}": t for key, t in files.stacked(tensors).items()})
    assert same_features(teacher, flax(tensors, old=False))


def test_siglips_tower_and_its_pooling(google_load: Load) -> None:
    tensors = files.flax(old=False, cls=False, pooled=True)
    text = {
        "params/txt/head/kernel": files.random(3, 3), "params/t": files.random(1), "params/b": files.random(1),
    }  # fmt: skip
    tower = {f"params/img/{key}": t for key, t in tensors.items()}
    teacher = google_load({**tower, **text}, "vit_base_patch16_siglip_224")
    tokens, t = flax(tensors, old=False), doubled(tensors)
    assert same_features(teacher, tokens)
    assert same_features(teacher, lambda images: reference.map_head(tokens(images), t), logits=True)
    assert set(teacher.report.unexpected) == set(text)


def test_a_head_on_a_representation_layer_is_left_out_with_it(google_load: Load) -> None:
    tensors = files.flax(old=True, cls=True, classes=files.CLASSES) | files.flax_layer("pre_logits", 16, 16)
    teacher = google_load(tensors)
    assert not teacher.has_head
    left = {"head/kernel", "head/bias", "pre_logits/kernel", "pre_logits/bias"}
    assert set(teacher.report.unexpected) == left
    assert same_features(teacher, flax(tensors, old=True))


BLOCK_0, BLOCK_1 = "Transformer/encoderblock_0", "Transformer/encoderblock_1"
QUERY, KEY = "MultiHeadDotProductAttention_1/query/kernel", "MultiHeadDotProductAttention_1/key/kernel"


@pytest.mark.parametrize("cls", [True, False])
def test_a_size_of_google_needs_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cls: bool) -> None:
    for name, value in {"WIDTH": 192, "DEPTH": 12, "HEADS": 3, "PATCH": 16, "SIDE": 2}.items():
        monkeypatch.setattr(files, name, value)
    tensors = files.flax(old=False, cls=cls)
    torch.save({f"params/{key}": t for key, t in tensors.items()}, tmp_path / "archive.pth")
    teacher: Any = load_pretrained(str(tmp_path / "archive.pth"))
    assert teacher.architecture == "vit_tiny_patch16_224"
    assert (len(teacher.model.blocks), teacher.model.blocks[0].attn.num_heads) == (12, 3)
    assert teacher.model.patch_embed.img_size == (32, 32)
    assert teacher.model.num_prefix_tokens == int(cls)


def test_positions_are_resampled_to_another_size_of_google(google_load: Load) -> None:
    for old in (True, False):
        tensors = files.flax(old=old, cls=True)
        teacher = google_load(tensors, img_size=24)
        assert teacher.report.resampled == {"pos_embed": "from grid 4x4 to 6x6 (timm's bicubic)"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{BLOCK_1}/{KEY}"), r"not whole: blocks\.1\.attn\.qkv\.weight lacks its k part"),
        (lambda t: t.pop(f"{BLOCK_1}/MlpBlock_3/Dense_0/bias"), r"keys: blocks\.1\.mlp\.fc1\.bias"),
        (lambda t: [t.pop(k) for k in list(t) if "block_0" in k and "query" not in k], r"lacks its k, v part"),
        (lambda t: [t.pop(k) for k in list(t) if "block_1" in k], r"missing keys: blocks\.1\."),
        (lambda t: t.update({f"{BLOCK_0}/{QUERY}": torch.zeros(16, 16)}), "query kernels"),
        (lambda t: t.update({f"{BLOCK_1}/{QUERY}": torch.zeros(())}), r"parts of blocks\.1\.attn\.qkv\.weight"),
        (lambda t: t.update({"head/kernel": torch.zeros(8, 5)}), r"head\.weight is \(5, 8\) and not \(5, 16\)"),
        (lambda t: t.update({"conv_root/kernel": torch.zeros(3)}), "unexpected keys: conv_root/kernel"),
        (lambda t: t.update({"cls": torch.zeros(1, 1, 8)}), "cls_token is"),
        (lambda t: t["embedding/kernel"].fill_(float("nan")), "not finite"),
    ],
)  # fmt: skip
def test_half_an_archive_is_refused_in_one_sentence(
    google_load: Load, change: Callable[[Tensors], object], said: str
) -> None:
    tensors = files.flax(old=True, cls=True, classes=files.CLASSES)
    change(tensors)
    with pytest.raises(CheckpointError, match=said):
        google_load(tensors)


def test_stacks_of_other_depths_and_a_pooling_without_values_are_refused(google_load: Load) -> None:
    tensors = files.stacked(files.flax(old=False, cls=True))
    tensors["Transformer/encoderblock/LayerNorm_0/bias"] = torch.zeros(3, 16)
    with pytest.raises(CheckpointError, match="different depths"):
        google_load(tensors)
    tensors = files.flax(old=False, cls=False, pooled=True)
    del tensors["MAPHead_0/MultiHeadDotProductAttention_0/value/kernel"]
    with pytest.raises(CheckpointError, match=r"not whole: MAPHead_0/.*/value/kernel"):
        google_load(tensors, "vit_base_patch16_siglip_224")
