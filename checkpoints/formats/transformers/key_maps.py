"""Key maps of Hugging Face transformers: one row for each kind of file, recognized by its keys alone."""

from __future__ import annotations

from ..keymap import KeyMap
from . import hf_to_timm as to_timm
from . import names, tensors

FOR_VIT = (names.MASK_TOKEN, names.POOLER, names.SIMMIM)
FOR_DINO = (names.MASK_TOKEN, names.INDEX)
CLASSIFIER = r"classifier\.weight"

TRANSFORMERS_MAPS: tuple[KeyMap, ...] = (
    KeyMap(
        "transformers' DeiT with one classifier",
        marks=(*names.VIT_MARKS, names.DISTILLATION, CLASSIFIER),
        names=((names.DISTILLATION, "reg_token"), *names.VIT_NAMES),
        left_out=FOR_VIT,
        describe=to_timm.deit,
    ),
    KeyMap(
        "transformers' DeiT",
        marks=(*names.VIT_MARKS, names.DISTILLATION),
        names=names.DEIT_NAMES,
        left_out=FOR_VIT,
        describe=to_timm.distilled,
    ),
    KeyMap(
        "transformers' BEiT",
        marks=(
            r"(?:beit\.)?embeddings\.cls_token",
            r".*layers?\.\d+\..*",
            rf".*(?:\.lambda_1|{names.TABLE}|pooler\.layernorm\.weight)",
        ),
        names=names.BEIT_NAMES,
        left_out=(names.MASK_TOKEN, names.INDEX, (r"lm_head\..*", "the head that predicts visual tokens")),
        describe=to_timm.beit,
    ),
    KeyMap(
        "transformers' ViTMAE",
        marks=(*names.VIT_MARKS, r"decoder\.decoder_embed\.weight"),
        names=names.VIT_NAMES,
        left_out=(names.MASK_TOKEN, (r"decoder\..*", "the decoder of masked autoencoding")),
        describe=to_timm.mae,
    ),
    KeyMap(
        "transformers' ViT",
        marks=names.VIT_MARKS,
        names=names.VIT_NAMES,
        left_out=FOR_VIT,
        describe=to_timm.vit,
    ),
    KeyMap(
        "transformers' DINOv2 with registers",
        marks=(*names.DINO_MARKS, names.DINO + r"embeddings\.register_tokens"),
        unless=names.DINOV3_MARKS[:1],
        prepare=tensors.fold_registers,
        names=names.DINOV2_NAMES,
        left_out=(*FOR_DINO, names.DINOV2_CLASSIFIER),
        describe=to_timm.dinov2,
    ),
    KeyMap(
        "transformers' DINOv2",
        marks=names.DINO_MARKS,
        unless=names.DINOV3_MARKS[:1],
        names=names.DINOV2_NAMES,
        left_out=(*FOR_DINO, names.DINOV2_CLASSIFIER),
        describe=to_timm.dinov2,
    ),
    KeyMap(
        "transformers' DINOv3 (SwiGLU)",
        marks=(*names.DINOV3_MARKS, names.GATE),
        prepare=tensors.drop_empty_registers,
        names=names.dinov3_names(names.GATED),
        left_out=FOR_DINO,
        describe=to_timm.dinov3,
    ),
    KeyMap(
        "transformers' DINOv3",
        marks=names.DINOV3_MARKS,
        prepare=tensors.drop_empty_registers,
        names=names.dinov3_names(names.NOT_GATED),
        left_out=FOR_DINO,
        describe=to_timm.dinov3,
    ),
    KeyMap(
        "transformers' CLIP with a classifier",
        marks=(*names.TOWER_MARKS, names.CLASS_EMBEDDING, CLASSIFIER),
        names=names.TOWER_NAMES,
        left_out=(
            *names.TEXT,
            (names.TOWER + r"post_layernorm\..*", "the classifier reads the patches without it"),
        ),
        reshape=tensors.as_batch,
        describe=to_timm.clip,
    ),
    KeyMap(
        "transformers' CLIP",
        marks=(*names.TOWER_MARKS, names.CLASS_EMBEDDING),
        names=names.TOWER_NAMES,
        left_out=names.TEXT,
        reshape=tensors.as_batch,
        describe=to_timm.clip,
    ),
    KeyMap(
        "transformers' SigLIP with a classifier",
        marks=(*names.TOWER_MARKS, CLASSIFIER),
        names=names.TOWER_NAMES,
        left_out=(
            *names.TEXT,
            (names.TOWER + r"head\..*", "the classifier reads the mean of the patches without it"),
        ),
        reshape=tensors.as_batch,
        describe=to_timm.siglip,
    ),
    KeyMap(
        "transformers' SigLIP",
        marks=names.TOWER_MARKS,
        prepare=tensors.split_probe,
        names=names.TOWER_NAMES,
        left_out=names.TEXT,
        reshape=tensors.as_batch,
        describe=to_timm.siglip,
    ),
)
