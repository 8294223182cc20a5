"""EcoFormer's PVTv2 and Twins-SVT: hashed attention in stages 1 to 3, softmax over all tokens in stage 4."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ...models.conversion import with_plan
from ...models.converted import MARK, as_mark
from ...models.errors import CheckpointError, Json
from ...models.layer_plan import AS_IT_IS, parse_choice
from ..weights import Weights
from .keymap import KeyMap

HASH = r"attn\.fast_attention\.ksh\."
UNREAD = "a projection of Performer that EcoFormer does not read"
Models = Mapping[tuple[int, tuple[int, ...]], str]
"""timm's names by the width of the first stage and the depths of all."""
PVT_MODELS: Models = {
    (32, (2, 2, 2, 2)): "pvt_v2_b0",
    (64, (2, 2, 2, 2)): "pvt_v2_b1",
    (64, (3, 4, 6, 3)): "pvt_v2_b2",
    (64, (3, 4, 18, 3)): "pvt_v2_b3",
    (64, (3, 8, 27, 3)): "pvt_v2_b4",
}
TWINS_MODELS: Models = {
    (64, (2, 2, 10, 4)): "twins_svt_small",
    (96, (2, 2, 18, 2)): "twins_svt_base",
    (128, (2, 2, 18, 2)): "twins_svt_large",
}
PVT_BLOCK = re.compile(r"stages\.([0-3])\.blocks\.(\d+)\.")
TWINS_BLOCK = re.compile(r"blocks\.([0-3])\.(\d+)\.")

OPERATOR = (
    (rf"(.+)\.{HASH}A", r"\1.attn.operator.weight"),
    (rf"(.+)\.{HASH}anchor", r"\1.attn.operator.anchors"),
    (rf"(.+)\.{HASH}mvec", r"\1.attn.operator.mean"),
)


def _without_batch(name: str, tensor: Tensor) -> Tensor:
    """Return anchors (H, M, D) and means (H, M) without the dimensions that they are broadcast along."""
    if name.endswith("operator.anchors") and tensor.ndim == 4:
        return tensor[0]
    if name.endswith("operator.mean") and tensor.ndim == 4:
        return tensor[0, :, 0]
    return tensor


PVT_PARTS = {"patch_embed": "downsample", "norm": "norm", "block": "blocks"}


def _stage_name(key: str) -> str:
    """Return a key with the name of timm's stage, from 0, for the published one, from 1."""
    found = re.match(r"(patch_embed|norm|block)([1-4])\.(.+)", key)
    if found is None:
        return key
    rest = found[3].replace(".dwconv.dwconv.", ".dwconv.")
    stage = f"stages.{int(found[2]) - 1}.{PVT_PARTS[found[1]]}"
    return f"patch_embed.{rest}" if key.startswith("patch_embed1.") else f"{stage}.{rest}"


def _prepare_pvt(weights: Weights) -> Weights:
    """Name the projections as timm does: q and kv, of which hashed layers have only v."""
    tensors = _renamed(weights.tensors, lambda key: True)
    return replace(weights, tensors={_stage_name(key): tensor for key, tensor in tensors})


def _prepare_twins(weights: Weights) -> Weights:
    """Name the projections as timm does: qkv in the local layers, the even ones, and q and kv in the others."""
    return replace(weights, tensors=dict(_renamed(weights.tensors, _is_reduced)))


def _is_reduced(key: str) -> bool:
    found = TWINS_BLOCK.match(key)
    return found is not None and int(found[2]) % 2 == 1


def _renamed(tensors: Mapping[str, Tensor], separate: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors with projections that are joined as in timm; `separate` keeps queries apart from the others."""
    for key, tensor in tensors.items():
        shared, value = re.search(r"\.attn\.to_qk\.", key), re.search(r"\.attn\.to_v\.", key)
        if shared and separate(key):
            yield key.replace(".to_qk.", ".q."), tensor
        elif value and separate(key):
            yield key.replace(".to_v.", ".kv."), tensor
        elif shared:
            other = key.replace(".to_qk.", ".to_v.")
            if other not in tensors:
                raise CheckpointError(f"the weights hold {key} without {other}")
            yield key.replace(".to_qk.", ".qkv."), torch.cat([tensor, tensors[other]])
        elif not value and ".attn.qkv." in key and separate(key):
            rows = len(tensor) // 3
            yield key.replace(".qkv.", ".q."), tensor[:rows]
            yield key.replace(".qkv.", ".kv."), tensor[rows:]
        elif not value:
            yield key, tensor


def _describe(
    models: Models, block: re.Pattern[str], width: str, last: str
) -> Callable[[Weights, Json], Weights]:
    """Return what finds the architecture by width and depths, and the plan by the sizes of the hash functions."""

    def describe(weights: Weights, config: Json) -> Weights:
        depths = _depths(weights.tensors, block)
        architecture = models.get((len(weights.tensors[width]), depths))
        if architecture is None:
            known = ", ".join(models.values())
            raise CheckpointError(
                f"{weights.origin} has {len(weights.tensors[width])} channels and {depths} blocks, which no published "
                f"EcoFormer has: {known}"
            )
        sizes = next(tensor for name, tensor in weights.tensors.items() if name.endswith("operator.weight"))
        options = "".join(
            f"{name}={size}, "
            for name, size, usual in zip(("bits", "anchors"), sizes.shape[1:], (16, 25), strict=True)
            if size != usual
        )
        hashed, operator = sum(depths[:3]), f"hash({options}mode=reference)"
        plan = f"0-{hashed - 1}: {operator}; {hashed}-{sum(depths) - 1}: {last}"
        marks = {
            f"{found[0]}attn.{MARK}": as_mark(parse_choice(last if found[1] == "3" else operator))
            for found in map(block.match, weights.tensors)
            if found is not None and (found[1] != "3" or last != AS_IT_IS)
        }
        name, arguments = with_plan(architecture, weights.model_args, plan)
        note = f"architecture: {architecture} with {plan}, as EcoFormer publishes"
        tensors = {**weights.tensors, **marks}
        return replace(
            weights, tensors=tensors, architecture=name, model_args=arguments, notes=(*weights.notes, note)
        )

    return describe


def _depths(tensors: Mapping[str, Tensor], block: re.Pattern[str]) -> tuple[int, ...]:
    found = {(int(each[1]), int(each[2])) for each in map(block.match, tensors) if each is not None}
    return tuple(
        1 + max(place for at, place in found if at == stage) for stage in sorted({at for at, _ in found})
    )


ECOFORMER_MAPS: tuple[KeyMap, ...] = (
    KeyMap(
        "EcoFormer's PVTv2",
        marks=(rf"block1\.0\.{HASH}A", r"block4\.0\.attn\.qkv\.weight", r"patch_embed1\.proj\.weight"),
        prepare=_prepare_pvt,
        names=OPERATOR,
        left_out=((r".+\.projection_matrix", UNREAD),),
        reshape=_without_batch,
        describe=_describe(PVT_MODELS, PVT_BLOCK, "patch_embed.proj.weight", "keep"),
    ),
    KeyMap(
        "EcoFormer's Twins-SVT",
        marks=(rf"blocks\.0\.0\.{HASH}A", r"blocks\.3\.0\.attn\.qkv\.weight"),
        prepare=_prepare_twins,
        names=OPERATOR,
        left_out=((r".+\.projection_matrix", UNREAD),),
        reshape=_without_batch,
        describe=_describe(TWINS_MODELS, TWINS_BLOCK, "patch_embeds.0.proj.weight", "softmax"),
    ),
)
