"""The parts of a pyramid that a conversion drops: in the layer, and in weights of the original model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .attention.base import QKV
from .families import NoAttention, Site, is_pyramid, sites
from .merges import deformable_merges

REDUCTION = ("sr", "norm", "pool", "act")
BIAS = ("relative_position_bias_table", "relative_position_index", "cpb_mlp", "relative_coords_table")
FUSED = ("qkv", "kv")
"""Projections whose rows are equal parts, in the order of the name."""


def dropped_names(kept: Collection[str], keeps_bias: bool) -> list[str]:
    """Return the names of the parameters and modules that a layer loses, which keeps these parts of q, k and v."""
    names = [*REDUCTION, *(() if keeps_bias else BIAS)]
    names += [f"{part}_bias" for part in QKV if part not in kept]
    return names if "q" in kept else [*names, "q", "logit_scale"]


def kept_rows(tensor: Tensor, name: str, kept: Collection[str]) -> Tensor:
    """Return the rows of a fused projection `name` that belong to the kept parts."""
    rows = tensor.chunk(len(name))
    return torch.cat([part for part, letter in zip(rows, name, strict=True) if letter in kept])


def drop_parts(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return weights of the original model without what a converted pyramid lacks, and the reason of each key left out.

    Weights of a model that was converted by the same plan, and those for a plain vision transformer, stay as they are.
    """
    found, reasons = dict(tensors), dict[str, str]()
    if not is_pyramid(model):
        return found, reasons
    own = model.state_dict()
    for path in deformable_merges(model):
        if not any(key.startswith(f"{path}.dconv.") for key in found):
            for key in [key for key in found if key.startswith(f"{path}.")]:
                reasons[key] = "deformable merging replaces it"
                del found[key]
    for site in sites(model):
        reason = _reason(site.block(model).attn)
        if not reason:
            continue
        for key in [
            key for key in found if key not in own and _is_dropped(key, site, site.block(model).attn)
        ]:
            reasons[key] = reason
            del found[key]
        for name in FUSED:
            _cut(found, own, f"{site.path}.attn.{name}.", name, site.block(model).attn)
    return found, reasons


def _reason(layer: Any) -> str:
    if isinstance(layer, NoAttention):
        return "the layer has no attention"
    choice = getattr(layer, "choice", None)
    return "" if choice is None else f"{choice} does not need it"


def _is_dropped(key: str, site: Site, layer: Any) -> bool:
    """Return whether a conversion drops this part of a block; a part that timm's layer has not is not one of them."""
    if isinstance(layer, NoAttention):
        return key.startswith((f"{site.path}.attn.", f"{site.path}.norm1."))
    prefix = f"{site.path}.attn."
    name = key.removeprefix(prefix).partition(".")[0]
    return key.startswith(prefix) and name in (*dropped_names((), keeps_bias=False), *FUSED)


def _cut(tensors: dict[str, Tensor], own: Mapping[str, Tensor], prefix: str, name: str, layer: Any) -> None:
    """Cut the rows of a fused projection in `tensors` to those of the converted layer."""
    kept: Sequence[str] = getattr(layer, "kept", QKV)
    full = len(name) * int(layer.original.proj.in_features) if hasattr(layer, "original") else 0
    for key in [f"{prefix}weight", f"{prefix}bias"]:
        if key in tensors and key in own and len(tensors[key]) == full != len(own[key]):
            tensors[key] = kept_rows(tensors[key], name, kept)
