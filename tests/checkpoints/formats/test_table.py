"""Every row of the table of key maps: features against a reference, and half of a file refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from graftvit.checkpoints.describe import describe_source
from graftvit.checkpoints.formats import KEY_MAPS
from graftvit.checkpoints.formats.hf_key_maps import TRANSFORMERS_MAPS
from graftvit.checkpoints.formats.keymap import recognize
from graftvit.checkpoints.formats.lit_keys import ECOFORMER_MAPS, LIT_MAPS
from graftvit.checkpoints.formats.research import RESEARCH_MAPS
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.provenance import Pretrained
from graftvit.models.errors import CheckpointError
from support.files import source_files as files
from support.files.source_checks import TINY, doubled, plain, same_features
from support.files.source_files import DEPTH, HEADS, SIDE, Tensors
from support.models import reference_vit as reference
from torch import Tensor

WRONG = (torch.zeros(()), torch.zeros(0, 3), torch.zeros(5, 7, 2))
BLOCKS = ["blocks.0.", "blocks.1."]


def beit(tensors: Tensors) -> Callable[[Tensor], Tensor]:
    t = doubled(tensors)
    return lambda images: reference.norm(reference.beit(t, images, HEADS, DEPTH, SIDE), t, "norm")


def dinov2(tensors: Tensors) -> Callable[[Tensor], Tensor]:
    t = doubled(tensors)
    return lambda images: reference.dinov2(t, images, HEADS, BLOCKS, gated=False)


def dinov3(tensors: Tensors) -> Callable[[Tensor], Tensor]:
    t = doubled(tensors)
    return lambda images: reference.dinov3(t, images, HEADS, DEPTH, (SIDE, SIDE))


def deit3(tensors: Tensors) -> Callable[[Tensor], Tensor]:
    t = doubled(tensors)
    return lambda images: reference.deit3(t, images, HEADS, DEPTH)


def flax(tensors: Tensors) -> Callable[[Tensor], Tensor]:
    t = doubled(tensors)
    return lambda images: reference.flax_vit(t, images, DEPTH, old=True)


@dataclass(frozen=True)
class Case:
    """A small file of a family, the timm model that it is, and what it computes."""

    tensors: Callable[[], Tensors]
    model: str
    features: Callable[[Tensors], Callable[[Tensor], Tensor]] = plain
    unread: tuple[str, ...] = ()
    """Beginnings of the names that the encoder has no use for."""
    arguments: dict[str, Any] = field(default_factory=lambda: dict(TINY))

    def load(self, folder: Path, tensors: Tensors) -> Pretrained:
        return load_pretrained(self.save(folder, tensors), model=self.model, model_args=self.arguments)

    def save(self, folder: Path, tensors: Tensors) -> str:
        torch.save(tensors, folder / "source.pth")
        return str(folder / "source.pth")


CASES = {
    "Google's ViT (flax)": Case(lambda: files.flax(old=True, cls=True), "vit_tiny_patch16_224", flax),
    "BEiT": Case(
        lambda: files.beit(shared=True, final="norm", positions=True), "beit_base_patch16_224", beit,
        ("mask_token", "lm_head", "rel_pos_bias.relative_position_index", "pos_embed"),
    ),
    "DINOv3's backbone": Case(
        files.dinov3, "vit_small_patch16_dinov3_qkvb", dinov3, ("mask_token", "rope_embed"), {**TINY, "img_size": 16}
    ),
    "DINOv2's backbone": Case(
        lambda: files.dinov2(BLOCKS, registers=0), "vit_base_patch14_dinov2", dinov2, ("mask_token",)
    ),
    "MAE's autoencoder": Case(files.mae, "vit_tiny_patch16_224", plain, ("mask_token", "decoder_")),
    "an encoder of MoCo-v3": Case(
        lambda: files.plain() | files.moco_head("head"), "vit_small_patch16_224", plain, ("head.",)
    ),
    "iBOT's backbone": Case(
        lambda: files.plain() | {"masked_embed": files.random(1, 16)}, "vit_small_patch16_224", plain, ("masked_",)
    ),
    "a distilled DeiT": Case(files.distilled, "deit_tiny_distilled_patch16_224"),
    "DeiT III": Case(files.deit3, "deit3_small_patch16_224", deit3),
    "a plain ViT": Case(lambda: files.plain(classes=3), "vit_tiny_patch16_224"),
}  # fmt: skip
"""A case of every row but transformers', which have theirs in hf_models."""


def test_each_row_has_a_case_and_one_name() -> None:
    own = (*ECOFORMER_MAPS, *LIT_MAPS)  # pyramids: tests/checkpoints/test_ecoformer.py and test_lit_keys.py
    assert list(CASES) == [row.name for row in RESEARCH_MAPS if row not in own]
    assert (*TRANSFORMERS_MAPS, *RESEARCH_MAPS) == KEY_MAPS
    assert len({row.name for row in KEY_MAPS}) == len(KEY_MAPS)


@pytest.mark.parametrize("row", CASES)
def test_features_are_those_of_the_reference(tmp_path: Path, row: str) -> None:
    case, tensors = CASES[row], CASES[row].tensors()
    found = recognize(tensors, KEY_MAPS)
    assert found is not None
    assert found.name == row
    assert same_features(case.load(tmp_path, tensors), case.features(tensors))


def refusal(case: Case, folder: Path, tensors: Tensors) -> str:
    with pytest.raises(CheckpointError) as caught:
        case.load(folder, tensors)
    said = str(caught.value)
    assert "source.pth" in said
    assert "\n" not in said
    assert len(said) < 600
    return said


@pytest.mark.parametrize("row", CASES)
@pytest.mark.parametrize("seed", range(2))
def test_half_of_the_tensors_is_refused_also_without_a_name(tmp_path: Path, row: str, seed: int) -> None:
    case, tensors = CASES[row], CASES[row].tensors()
    keep = torch.rand(len(tensors), generator=torch.Generator().manual_seed(seed)) < 0.5
    half = {key: tensor for (key, tensor), kept in zip(tensors.items(), keep, strict=True) if kept}
    refusal(case, tmp_path, half)
    with pytest.raises(CheckpointError, match=r"source\.pth"):
        load_pretrained(case.save(tmp_path, half))


@pytest.mark.slow
@pytest.mark.parametrize("row", CASES)
def test_no_tensor_may_be_absent_or_of_another_shape(tmp_path: Path, row: str) -> None:
    case, tensors = CASES[row], CASES[row].tensors()
    for number, key in enumerate(key for key in tensors if not key.startswith(case.unread or "-")):
        rest = {name: tensor for name, tensor in tensors.items() if name != key}
        wrong = {**tensors, key: WRONG[number % len(WRONG)]}
        refusal(case, tmp_path, wrong if number % 2 else rest)
    assert "unexpected keys: adapter.down" in refusal(
        case, tmp_path, {**tensors, "adapter.down": torch.ones(2)}
    )


@pytest.mark.parametrize("wrong", WRONG)
def test_a_mask_of_dinov3s_biases_has_their_size(tmp_path: Path, wrong: Tensor) -> None:
    case = CASES["DINOv3's backbone"]
    said = refusal(case, tmp_path, {**case.tensors(), "blocks.0.attn.qkv.bias_mask": wrong})
    assert "qkv.bias" in said


@pytest.mark.parametrize("row", CASES)
def test_info_says_what_it_is_and_what_of_it_would_load(tmp_path: Path, row: str) -> None:
    case, tensors = CASES[row], CASES[row].tensors()
    norm = next(
        key
        for key in tensors
        if key in ("blocks.1.norm2.weight", "Transformer/encoderblock_1/LayerNorm_2/scale")
    )
    source = case.save(tmp_path, {key: tensor for key, tensor in tensors.items() if key != norm})
    text, error = describe_source(source, model=case.model, model_args=case.arguments)
    facts = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert row in facts["weights"]
    assert text.endswith("missing keys: blocks.*.norm2.weight\n")
    assert "missing keys: blocks.1.norm2.weight" in str(error)
