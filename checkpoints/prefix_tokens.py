"""Prefix tokens (class, distillation, registers) and their rows of the position embedding.

One model keeps a row for each prefix token before those of the patches, another none (timm's `no_embed_class`).
Both compute token + row, so weights of one fit the other: a row is added to its token, or is zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..models.errors import CheckpointError
from ..models.families import patch_size, vit
from .position import Grid, find_grid
from .report import some
from .weights import Weights

TOKENS = ("cls_token", "dist_token", "reg_token")
"""In the order of the sequence."""


def num_prefix_rows(model: nn.Module) -> int:
    """Return rows of a model's `pos_embed` before those of the patches."""
    height, width = vit(model).patch_embed.grid_size
    return int(model.get_parameter("pos_embed").shape[1] - height * width)


def match_prefix(model: nn.Module, weights: Weights) -> Weights:
    """`weights` with as many prefix rows as the model has; unchanged where that is so, or where no grid is known.

    Features stay as they are. A row for a token that the weights lack is zero.

    Raises CheckpointError: a token and its row differ in shape.
    """
    position = weights.tensors.get("pos_embed")
    if position is None or position.ndim != 3 or getattr(model, "pos_embed", None) is None:
        return weights
    wanted = num_prefix_rows(model)
    rows = _num_rows(model, weights, position, wanted)
    if rows in (None, wanted):
        return weights
    tensors, width = dict(weights.tensors), position.shape[2]
    own = _rows_by_token(_counts(tensors), position[:, :rows])
    if wanted == 0:
        _check_shapes(weights, own)
        for name, row in own.items():
            tensors[name] = tensors[name] + row
        first = position[:, :0]
        note = f"positions of {some(own)}: added to the tokens, the model has no rows for them"
    else:
        counts = _counts({name: getattr(model, name, None) for name in TOKENS})
        if sum(counts.values()) != wanted:
            return weights
        first = torch.cat(
            [own.get(name, position.new_zeros(1, count, width)) for name, count in counts.items()], dim=1
        )
        fresh = [name for name in counts if name not in own]
        note = f"positions of {some(fresh)}: zero, the weights have none" if fresh else ""
    tensors["pos_embed"] = torch.cat([first, position[:, rows:]], dim=1)
    return replace(weights, tensors=tensors, notes=(*weights.notes, note) if note else weights.notes)


def _check_shapes(weights: Weights, rows: Mapping[str, Tensor]) -> None:
    for name, row in rows.items():
        shape = tuple(weights.tensors[name].shape)
        if shape != tuple(row.shape):
            raise CheckpointError(f"{weights.origin}: {name} is {shape} and its position {tuple(row.shape)}")


def _num_rows(model: nn.Module, weights: Weights, position: Tensor, wanted: int) -> int | None:
    """Return how many rows of the weights are of prefix tokens: all, none, or the class token's, as the grid allows."""
    counts = _counts(weights.tensors)
    possible = [sum(counts.values()), 0, counts.get("cls_token", 0)]
    if wanted in possible:
        possible.insert(0, wanted)
    grid = declared_grid(model, weights)
    return next((rows for rows in possible if find_grid(position.shape[1] - rows, grid) is not None), None)


def declared_grid(model: nn.Module, weights: Weights) -> Grid | None:
    """Return the patch grid of the images that the weights say they were trained on."""
    if weights.img_size is None:
        return None
    height, width = patch_size(model)
    return weights.img_size[0] // height, weights.img_size[1] // width


def _counts(tensors: Mapping[str, Tensor | None]) -> dict[str, int]:
    """Return how many tokens of each kind there are."""
    present = {name: tensors.get(name) for name in TOKENS}
    return {name: token.shape[1] for name, token in present.items() if token is not None and token.ndim == 3}


def _rows_by_token(counts: Mapping[str, int], rows_1PD: Tensor) -> dict[str, Tensor]:
    """Return the rows of each kind of token, of those that have any."""
    if rows_1PD.shape[1] < sum(counts.values()):
        counts = {name: count for name, count in counts.items() if name == "cls_token" and rows_1PD.shape[1]}
    return dict(zip(counts, rows_1PD.split(list(counts.values()), dim=1), strict=True)) if counts else {}
