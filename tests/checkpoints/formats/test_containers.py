"""Which family a file is of, which part of it is taken, and what is refused in one sentence."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from graftvit.checkpoints.describe import describe_source
from graftvit.checkpoints.formats import KEY_MAPS, read_weights
from graftvit.checkpoints.formats.containers import NAMES, TABLES
from graftvit.checkpoints.formats.hf_key_maps import TRANSFORMERS_MAPS
from graftvit.checkpoints.formats.keymap import recognize
from graftvit.checkpoints.formats.lit_keys import ECOFORMER_MAPS, LIT_MAPS
from graftvit.checkpoints.formats.research import RESEARCH_MAPS
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.provenance import Pretrained
from graftvit.checkpoints.state import TrainingState, write_state
from graftvit.checkpoints.weight_files import Weights
from graftvit.models.errors import CheckpointError
from support.files import source_files as files
from support.files.hostile import ARCHITECTURE, ARGUMENTS, weights
from support.files.hostile_configs import changed
from support.files.source_checks import TINY as TINY
from support.files.source_files import Tensors
from torch import Tensor

BLOCKS = ["blocks.0.", "blocks.1."]
FAMILIES: dict[str, Callable[[], Tensors]] = {
    "MAE's autoencoder": files.mae,
    "a plain ViT": files.plain,
    "a plain ViT ": lambda: files.plain(final="fc_norm", classes=3),
    "an encoder of MoCo-v3": lambda: files.plain() | files.moco_head("head"),
    "iBOT's backbone": lambda: files.plain() | {"masked_embed": files.random(1, 16)},
    "a distilled DeiT": files.distilled,
    "DeiT III": files.deit3,
    "DINOv2's backbone": lambda: files.dinov2(BLOCKS, registers=0),
    "DINOv2's backbone ": lambda: files.dinov2(["blocks.0.0.", "blocks.1.1."], registers=4, gated=True),
    "DINOv3's backbone": files.dinov3,
    "DINOv3's backbone ": lambda: files.dinov3(gated=True),
    "BEiT": lambda: files.beit(shared=False, final="fc_norm", classes=3),
    "BEiT ": lambda: files.beit(shared=True, final="norm"),
    "BEiT  ": lambda: files.beit(shared=True, final="norm", positions=True),
    "Google's ViT (flax)": lambda: files.flax(old=True, cls=True, classes=3),
    "Google's ViT (flax) ": lambda: files.stacked(files.flax(old=False, cls=False, pooled=True)),
}


def read(tree: Any, part: Any = None) -> Weights:
    return read_weights(Weights({}, "x.pth", "torch", tree=tree), part)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_known_by_exactly_one_row(family: str) -> None:
    """Over the whole table, transformers' rows too: the order of the rows does not matter here."""
    tensors = FAMILIES[family]()
    found = [row.name for row in KEY_MAPS if recognize(tensors, (row,)) is not None]
    if family.strip() != "a plain ViT":
        found = [name for name in found if name != "a plain ViT"]  # the last resort of those it covers
    assert found == [family.strip()]
    first = recognize(tensors, KEY_MAPS)
    assert first is not None
    assert first.name == family.strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_left_out_has_a_reason_and_no_other_is_lost(family: str) -> None:
    tensors = FAMILIES[family]()
    weights = read(tensors)
    assert all(weights.left_out.values())
    assert set(weights.left_out) <= {*tensors, *(key for key in weights.left_out if "encoderblock_" in key)}
    if "flax" not in family:
        merged = {"blocks.0.attn.qkv.bias", "blocks.1.attn.qkv.bias"} & (
            tensors.keys() - weights.tensors.keys()
        )
        assert len(weights.tensors) == len(tensors) - len(weights.left_out) + len(merged)


def named(**models: Tensors) -> dict[str, Any]:
    return dict(models)


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + key: tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("tree", "part", "said"),
    [
        (lambda: named(model=files.plain()), "ema", "holds no moving average, only #student; leave #ema out"),
        (lambda: named(model=files.plain()), "teacher", "holds no teacher, only #student"),
        (lambda: named(state_dict=files.plain()), "teacher", "holds no teacher"),
        (lambda: files.plain(), "ema", "only one model; leave #ema out"),
        (lambda: named(teacher=files.plain(), student=files.plain()), "ema", "only #teacher and #student"),
        (lambda: named(teacher=under("backbone.", files.plain())), "student", "holds no student, only #teacher"),
        (lambda: named(teacher={}, student=files.plain()), None, r"its 'teacher' holds no weights; write #student"),
        (lambda: named(student=files.plain(), teacher={"epoch": 3}), None, "write #student behind the path"),
        (lambda: named(model={}, model_ema=files.plain()), None, r"its 'model' holds no weights; write #ema"),
        (lambda: named(model=under("student.", files.plain())), "teacher", "holds no teacher, only #student"),
        (lambda: named(model=under("teacher.backbone.", files.plain())), "student", "only #teacher"),
        (lambda: named(state_dict=under("module.base_encoder.", files.plain())), "ema", "no moving average"),
        (lambda: named(optimizer={}, epoch=torch.zeros(1)), None, "of no known format: it holds 'optimizer'"),
        (lambda: {"_orig_mod.a": torch.zeros(1), "a": torch.zeros(1)}, None, "two of its names differ"),
    ],
)  # fmt: skip
def test_a_part_that_is_not_there_is_refused(tree: Callable[[], Any], part: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        read(tree(), part)


@pytest.mark.parametrize("part", [None, "student", "ema", "teacher"])
def test_the_parts_of_a_dual_model_are_told_apart(part: Any) -> None:
    student, average, teacher = files.plain(), files.plain(), files.plain()
    tree = named(
        model=under("student.", student) | under("teacher.", teacher),
        model_ema=under("student.", average) | under("teacher.", teacher),
    )
    chosen = {"ema": average, "teacher": teacher}.get(part, student)
    weights = read(tree, part)
    assert weights.tensors.keys() == chosen.keys()
    assert all(torch.equal(weights.tensors[key], chosen[key]) for key in chosen)
    assert len(weights.left_out) == len(chosen)


def test_an_empty_student_does_not_stand_in_the_way() -> None:
    tensors = files.plain()
    assert read(named(teacher=under("backbone.", tensors), student={})).tensors.keys() == tensors.keys()
    student = read(named(teacher={}, student=under("module.backbone.", tensors)), "student")
    assert student.tensors.keys() == tensors.keys()


def test_wrappers_anywhere_in_a_name_are_taken_off() -> None:
    tensors = files.plain()
    wrapped = {
        f"module._orig_mod.{key}".replace("blocks.1.", "blocks.1._fsdp_wrapped_module."): tensor
        for key, tensor in tensors.items()
    }
    assert read(named(model=wrapped)).tensors.keys() == tensors.keys()


def detector(blocks: Tensors) -> Tensors:
    return {
        **under("backbone.", blocks), "neck.0.weight": files.random(2), "roi_head.fc.weight": files.random(2),
    }  # fmt: skip


@pytest.mark.parametrize(
    "tree",
    [
        lambda: named(state_dict=detector({"layers.0.blocks.0.attn.qkv.weight": files.random(2)})),  # Swin
        lambda: named(
            state_dict=detector({"conv1.weight": files.random(2), "layer1.0.bn1.bias": files.random(2)})
        ),
        lambda: named(state_dict=detector(files.plain())),  # its ViT attends in windows: not this one
        lambda: named(model=under("backbone.bottom_up.net.", files.plain())),  # ViTDet
        lambda: named(state_dict=under("backbone.", {"layers.0.attn.weight": files.random(2)})),
        lambda: {"conv1.weight": files.random(2), "layer1.0.conv1.weight": files.random(2)},
        lambda: named(state_dict=under("module.encoder_q.", {"conv1.weight": files.random(2)})),  # MoCo-v2
        lambda: named(state_dict=under("module.base_encoder.", {"layer1.0.bn1.bias": files.random(2)})),
    ],
)
def test_other_models_are_of_no_supported_family(tmp_path: Path, tree: Callable[[], Any]) -> None:
    torch.save(tree(), tmp_path / "other.pth")
    said = r"other\.pth (is of no supported family: |does not say its architecture)"
    with pytest.raises(CheckpointError, match=said):
        load_pretrained(str(tmp_path / "other.pth"))


# Every row of the table of key maps: features against a reference, and half of a file refused.


WRONG = (torch.zeros(()), torch.zeros(0, 3), torch.zeros(5, 7, 2))


@dataclass(frozen=True)
class Case:
    """A small file of a family, and the timm model that it is."""

    tensors: Callable[[], Tensors]
    model: str
    unread: tuple[str, ...] = ()
    """Beginnings of the names that the encoder has no use for."""
    arguments: dict[str, Any] = field(default_factory=lambda: dict(TINY))

    def load(self, folder: Path, tensors: Tensors) -> Pretrained:
        return load_pretrained(self.save(folder, tensors), model=self.model, model_args=self.arguments)

    def save(self, folder: Path, tensors: Tensors) -> str:
        torch.save(tensors, folder / "source.pth")
        return str(folder / "source.pth")


CASES = {
    "Google's ViT (flax)": Case(lambda: files.flax(old=True, cls=True), "vit_tiny_patch16_224"),
    "BEiT": Case(
        lambda: files.beit(shared=True, final="norm", positions=True), "beit_base_patch16_224",
        ("mask_token", "lm_head", "rel_pos_bias.relative_position_index", "pos_embed"),
    ),
    "DINOv3's backbone": Case(
        files.dinov3, "vit_small_patch16_dinov3_qkvb", ("mask_token", "rope_embed"),
        {**TINY, "img_size": 16},
    ),
    "DINOv2's backbone": Case(
        lambda: files.dinov2(BLOCKS, registers=0), "vit_base_patch14_dinov2", ("mask_token",)
    ),
    "MAE's autoencoder": Case(files.mae, "vit_tiny_patch16_224", ("mask_token", "decoder_")),
    "an encoder of MoCo-v3": Case(
        lambda: files.plain() | files.moco_head("head"), "vit_small_patch16_224", ("head.",)
    ),
    "iBOT's backbone": Case(
        lambda: files.plain() | {"masked_embed": files.random(1, 16)}, "vit_small_patch16_224", ("masked_",)
    ),
    "a distilled DeiT": Case(files.distilled, "deit_tiny_distilled_patch16_224"),
    "DeiT III": Case(files.deit3, "deit3_small_patch16_224"),
    "a plain ViT": Case(lambda: files.plain(classes=3), "vit_tiny_patch16_224"),
}  # fmt: skip
"""A case of every row but transformers', which have theirs in hf_models."""


def test_each_row_has_a_case_and_one_name() -> None:
    own = (*ECOFORMER_MAPS, *LIT_MAPS)  # pyramids: test_lit_keys.py
    assert list(CASES) == [row.name for row in RESEARCH_MAPS if row not in own]
    assert (*TRANSFORMERS_MAPS, *RESEARCH_MAPS) == KEY_MAPS
    assert len({row.name for row in KEY_MAPS}) == len(KEY_MAPS)


QKV = "blocks.1.attn.qkv.weight"
NAMED = [row for row in CASES if row not in ("Google's ViT (flax)", "iBOT's backbone", "a plain ViT")]


@pytest.mark.parametrize("family", NAMED)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("blocks.1.")], r"missing keys: blocks\.1\."),
        (lambda t: t.update({QKV: t[QKV][: 2 * 16]}), r"blocks\.1\.attn\.qkv\.weight is \(32, 16\) and not \(48, 16\)"),
        (lambda t: t.pop(QKV), r"missing keys: blocks\.1\.attn\.qkv\.weight"),
        (lambda t: t.update(files.layer("head", 3, 8)), r"head\.weight is \(3, 8\) and not \(3, 16\)"),
        (lambda t: t.update({"blocks.1.extra": files.random(1)}), r"unexpected keys: blocks\.1\.extra"),
        (lambda t: t[QKV].fill_(float("inf")), r"not finite in blocks\.1\.attn\.qkv\.weight"),
        (lambda t: t.update(files.block("blocks.2.")), r"unexpected keys: blocks\.2\.|blocks\.2\.attn\.qkv\.bias has"),
    ],
)  # fmt: skip
def test_half_a_file_is_refused(
    tmp_path: Path, family: str, change: Callable[[Tensors], object], said: str
) -> None:
    tensors = FAMILIES[family]()
    change(tensors)
    torch.save({"model": tensors, "args": argparse.Namespace()}, tmp_path / "half.pth")
    with pytest.raises(CheckpointError, match=said) as caught:
        load_pretrained(
            str(tmp_path / "half.pth"), model=CASES[family].model, model_args=CASES[family].arguments
        )
    assert "half.pth" in str(caught.value)


def refusal(case: Case, folder: Path, tensors: Tensors) -> str:
    with pytest.raises(CheckpointError) as caught:
        case.load(folder, tensors)
    said = str(caught.value)
    assert "source.pth" in said
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


# The JSON of a training state is read by kind: what is no table or no text where one belongs is one sentence.


META: dict[str, Any] = {
    "student": {"architecture": ARCHITECTURE, "model_args": ARGUMENTS},
    "position": {"step": 3},
}


def state(path: Path, meta: Any) -> str:
    write_state(path, TrainingState({f"student.{key}": tensor for key, tensor in weights().items()}, meta))
    return str(path)


@pytest.mark.parametrize("value", [5, "abc", [1], True, 2e9])
@pytest.mark.parametrize("place", TABLES)
def test_what_is_no_table_is_refused(place: str, value: Any, tmp_path: Path) -> None:
    meta = changed(META, tuple(filter(None, place.split("."))), value)
    with pytest.raises(CheckpointError, match=r"last\.safetensors is damaged: .* is no table"):
        load_pretrained(state(tmp_path / "last.safetensors", meta))


@pytest.mark.parametrize("value", [5, [1], {"a": 1}])
@pytest.mark.parametrize("place", NAMES)
def test_what_is_no_text_is_refused(place: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"last\.safetensors is damaged: {place}=.* is no text"):
        load_pretrained(state(tmp_path / "last.safetensors", changed(META, tuple(place.split(".")), value)))


def test_adapters_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    tensors = {f"student.{key}": tensor for key, tensor in weights().items()}
    tensors["student.blocks.0.attn.qkv.base_layer.weight"] = tensors.pop("student.blocks.0.attn.qkv.weight")
    write_state(path, TrainingState(tensors, META))
    with pytest.raises(CheckpointError, match=r"last\.safetensors is damaged: KeyError"):
        load_pretrained(str(path))
