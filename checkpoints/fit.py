"""Loading weights into a model: resample positions, check every key and shape, then load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from torch import Tensor, nn

from ..models.errors import CheckpointError
from .keys import KeyRules, Role, sort_keys
from .position import Method, find_grid, resample_position
from .report import LoadReport, some
from .weights import Weights

BIAS_TABLE = "relative_position_bias_table"


def fit(
    model: nn.Module, weights: Weights, *, role: Role, method: Method, classifiers: tuple[str, ...]
) -> LoadReport:
    """Loads `weights` into `model` in place.

    Position embeddings are resampled to the model's grid by `method`; nothing else changes its shape.
    Keys that are missing or unexpected must have a reason (`KeyRules`).

    Raises CheckpointError naming the first keys without a reason, with another shape, or with values
    that are not finite.
    """
    target = model.state_dict()
    tensors, resampled = _resample(model, weights, target, method)
    head_fits = _head_fits(tensors, target, classifiers)
    if not head_fits and role == "init":
        dropped = {key for key in tensors if key.rpartition(".")[0] in classifiers}
    else:
        dropped = set()
    present = {key: tensor for key, tensor in tensors.items() if key in target and key not in dropped}
    rules = KeyRules(
        role, frozenset(target), frozenset(tensors), classifiers, getattr(model, "num_classes", 0), head_fits
    )
    missing, absent = sort_keys((key for key in target if key not in present), rules.missing)
    unexpected, foreign = sort_keys((key for key in tensors if key not in present), rules.unexpected)
    _refuse(weights.origin, model, absent, foreign, _wrong_shapes(present, target))
    _refuse_not_finite(weights.origin, present)
    model.load_state_dict(present, strict=False)
    return LoadReport(
        weights.origin,
        weights.format,
        len(present),
        missing,
        {**weights.left_out, **unexpected},
        resampled,
        weights.notes,
        weights.pretrained_cfg.get("license"),
        weights.revision,
    )


def _head_fits(
    tensors: Mapping[str, Tensor], target: Mapping[str, Tensor], classifiers: tuple[str, ...]
) -> bool:
    heads = [key for key in target if key.rpartition(".")[0] in classifiers]
    return all(key in tensors and tensors[key].shape == target[key].shape for key in heads)


def _wrong_shapes(present: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{key} is {tuple(tensor.shape)} and not {tuple(target[key].shape)}"
        for key, tensor in present.items()
        if tensor.shape != target[key].shape
    ]


def _refuse(origin: str, model: Any, absent: list[str], foreign: list[str], shapes: list[str]) -> None:
    problems = []
    if shapes:
        problems.append(f"wrong shapes: {some(shapes, 3)}")
    if absent:
        problems.append(f"missing keys: {some(absent)}")
    if foreign:
        problems.append(f"unexpected keys: {some(foreign)}")
    if problems:
        name = model.default_cfg.get("architecture") if hasattr(model, "default_cfg") else None
        raise CheckpointError(f"{origin} does not fit {name or type(model).__name__}: {'; '.join(problems)}")


def _refuse_not_finite(origin: str, tensors: Mapping[str, Tensor]) -> None:
    bad = [
        key
        for key, tensor in tensors.items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    if bad:
        raise CheckpointError(f"{origin} holds values that are not finite in {some(bad)}")


def _resample(
    model: Any, weights: Weights, target: Mapping[str, Tensor], method: Method
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors with position embeddings on the model's grid, and what was done to which."""
    tensors, done = dict(weights.tensors), {}
    for key in [key for key in tensors if key in target]:
        if key == "pos_embed" and tensors[key].ndim == 3 and target[key].ndim == 3:
            tensors[key], how = _absolute(model, weights, target[key], method)
        elif key.endswith(BIAS_TABLE) and tensors[key].shape != target[key].shape:
            tensors[key], how = _relative(model, weights, key, target[key], method)
        else:
            continue
        if how:
            done[key] = how
    return tensors, done


def source_grid(model: Any, weights: Weights) -> tuple[int, int] | None:
    """The patch grid that the weights' `pos_embed` covers, for a model of their kind; None if unknown."""
    position = weights.tensors.get("pos_embed")
    if position is None or position.ndim != 3 or getattr(model, "pos_embed", None) is None:
        return None
    declared = None
    if weights.img_size is not None:
        height, width = model.patch_embed.patch_size
        declared = weights.img_size[0] // height, weights.img_size[1] // width
    return find_grid(position.shape[1] - _num_prefix(model), declared)


def _num_prefix(model: Any) -> int:
    height, width = model.patch_embed.grid_size
    return int(model.pos_embed.shape[1] - height * width)


def _absolute(model: Any, weights: Weights, target: Tensor, method: Method) -> tuple[Tensor, str]:
    position = weights.tensors["pos_embed"]
    new = tuple(model.patch_embed.grid_size)
    old = source_grid(model, weights)
    if old == new or position.shape[2] != target.shape[2]:
        return position, ""
    if old is None:
        raise CheckpointError(
            f"{weights.origin}: pos_embed has {position.shape[1]} tokens, which with {_num_prefix(model)} "
            "prefix tokens is no square grid; give the images' size as model_args img_size=[height, width]"
        )
    resized = resample_position(position, old, new, _num_prefix(model), method)
    return resized, f"from grid {old[0]}x{old[1]} to {new[0]}x{new[1]} ({method}'s bicubic)"


def _relative(model: Any, weights: Weights, key: str, target: Tensor, method: Method) -> tuple[Tensor, str]:
    table = weights.tensors[key]
    if method != "timm":
        raise CheckpointError(
            f"{weights.origin}: {key} is resampled by timm's way only; position_embedding=timm does it"
        )
    if table.shape[1:] != target.shape[1:]:
        return table, ""  # other heads: refused by its shape
    window = model.get_submodule(key.rpartition(".")[0]).window_size
    resized = resize_rel_pos_bias_table(table, new_window_size=window, new_bias_shape=tuple(target.shape))
    return resized, f"from {table.shape[0]} to {target.shape[0]} offsets (timm's way)"
