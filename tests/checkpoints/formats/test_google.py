"""Google's flax archives give the features that flax's layers give on their tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.provenance import Pretrained
from graftvit.models.errors import CheckpointError
from support.files import source_files as files
from support.files.source_files import DEPTH, HEADS, Tensors
from support.models import reference_vit as reference
from torch import Tensor

NAME = "vit_tiny_patch16_224"
TINY: dict[str, Any] = {"embed_dim": 16, "depth": 2, "patch_size": 4}
Load = Callable[..., Pretrained]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Saves named arrays and loads them; a format is known by its keys, whatever the file."""

    def save_and_load(tensors: Tensors, model: str = NAME, **arguments: Any) -> Pretrained:
        torch.save(tensors, tmp_path / "archive.pth")
        return load_pretrained(str(tmp_path / "archive.pth"), model=model, model_args={**TINY, **arguments})

    return save_and_load


def same(ours: Tensor, theirs: Tensor) -> bool:
    return float((ours.double() - theirs).norm() / theirs.norm()) < 1e-5


def outputs(teacher: Pretrained, tensors: Tensors, *, old: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and outputs of the teacher, and the reference's tokens, of the same images."""
    images = torch.randn(2, 3, 16, 16)
    doubled = {key: tensor.double() for key, tensor in tensors.items()}
    with torch.no_grad():
        tokens: Tensor = teacher.model.forward_features(images)  # type: ignore[operator]
        return tokens, teacher.model(images), reference.flax_vit(doubled, images.double(), DEPTH, old=old)


@pytest.mark.parametrize("prefix", ["", "opt/target/", "params/"])
@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("old", [True, False])
def test_vit_jax_and_big_vision(load: Load, prefix: str, cls: bool, old: bool) -> None:
    tensors = files.flax(old=old, cls=cls, classes=files.CLASSES)
    state = {"opt/state/step": torch.tensor(3)} if prefix.startswith("opt") else {}
    teacher = load({f"{prefix}{key}": t for key, t in tensors.items()} | state)
    tokens, logits, expected = outputs(teacher, tensors, old=old)
    assert same(tokens, expected)
    pooled = expected[:, 0] if cls else expected.mean(1)
    assert same(logits, reference.flax_dense(pooled, {k: t.double() for k, t in tensors.items()}, "head"))
    assert teacher.mean == teacher.std == (0.5, 0.5, 0.5)
    assert set(teacher.report.unexpected) == set(state)
    assert teacher.model.blocks[0].attn.num_heads == HEADS  # by the kernels' shapes
    assert "tanh form of GELU" in teacher.report.summary()


def test_blocks_on_each_other(load: Load) -> None:
    tensors = files.flax(old=False, cls=True)
    teacher = load({f"params/{key}": t for key, t in files.stacked(tensors).items()})
    tokens, _, expected = outputs(teacher, tensors, old=False)
    assert same(tokens, expected)


def test_siglips_tower_and_its_pooling(load: Load) -> None:
    tensors = files.flax(old=False, cls=False, pooled=True)
    text = {
        "params/txt/head/kernel": files.random(3, 3),
        "params/t": files.random(1),
        "params/b": files.random(1),
    }
    tower = {f"params/img/{key}": t for key, t in tensors.items()}
    teacher = load({**tower, **text}, "vit_base_patch16_siglip_224")
    tokens, pooled, expected = outputs(teacher, tensors, old=False)
    assert same(tokens, expected)
    assert same(pooled, reference.map_head(expected, {k: t.double() for k, t in tensors.items()}))
    assert set(teacher.report.unexpected) == set(text)


def test_a_head_on_a_representation_layer_is_left_out_with_it(load: Load) -> None:
    tensors = files.flax(old=True, cls=True, classes=files.CLASSES) | files.flax_layer("pre_logits", 16, 16)
    teacher = load(tensors)
    assert not teacher.has_head
    left = {"head/kernel", "head/bias", "pre_logits/kernel", "pre_logits/bias"}
    assert set(teacher.report.unexpected) == left
    tokens, _, expected = outputs(teacher, tensors, old=True)
    assert same(tokens, expected)


BLOCK_0, BLOCK_1 = "Transformer/encoderblock_0", "Transformer/encoderblock_1"
QUERY, KEY = "MultiHeadDotProductAttention_1/query/kernel", "MultiHeadDotProductAttention_1/key/kernel"


@pytest.mark.parametrize("cls", [True, False])
def test_a_published_size_needs_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cls: bool) -> None:
    for name, value in {"WIDTH": 192, "DEPTH": 12, "HEADS": 3, "PATCH": 16, "SIDE": 2}.items():
        monkeypatch.setattr(files, name, value)
    tensors = files.flax(old=False, cls=cls)
    torch.save({f"params/{key}": t for key, t in tensors.items()}, tmp_path / "archive.pth")
    teacher: Any = load_pretrained(str(tmp_path / "archive.pth"))
    assert teacher.architecture == "vit_tiny_patch16_224"
    assert (len(teacher.model.blocks), teacher.model.blocks[0].attn.num_heads) == (12, 3)
    assert teacher.model.patch_embed.img_size == (32, 32)
    assert teacher.model.num_prefix_tokens == int(cls)


def test_positions_are_resampled_to_another_size(load: Load) -> None:
    for old in (True, False):
        tensors = files.flax(old=old, cls=True)
        teacher = load(tensors, img_size=24)
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
    load: Load, change: Callable[[Tensors], object], said: str
) -> None:
    tensors = files.flax(old=True, cls=True, classes=files.CLASSES)
    change(tensors)
    with pytest.raises(CheckpointError, match=said) as caught:
        load(tensors)
    assert "\n" not in str(caught.value)


def test_stacks_of_other_depths_and_a_pooling_without_values_are_refused(load: Load) -> None:
    tensors = files.stacked(files.flax(old=False, cls=True))
    tensors["Transformer/encoderblock/LayerNorm_0/bias"] = torch.zeros(3, 16)
    with pytest.raises(CheckpointError, match="different depths"):
        load(tensors)
    tensors = files.flax(old=False, cls=False, pooled=True)
    del tensors["MAPHead_0/MultiHeadDotProductAttention_0/value/kernel"]
    with pytest.raises(CheckpointError, match=r"not whole: MAPHead_0/.*/value/kernel"):
        load(tensors, "vit_base_patch16_siglip_224")
