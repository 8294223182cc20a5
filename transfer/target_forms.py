"""The forms in which a cache keeps what teachers compute: fewer numbers of it, in fewer bytes, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.errors import ConfigError
from .loss_config import CacheType
from .methods.feature import average_to

INDEX, SCALE = ".index", ".scale"
"""Ends of the names of what is kept beside a target."""
LARGEST_INT8 = 127
KEPT = ("float32", "bfloat16", "float16", "int8", "int16", "int32")
TYPES: dict[str, torch.dtype] = {f"torch.{name}": getattr(torch, name) for name in KEPT}
"""The types of all that `pack` gives: no other one is read from a file of a cache."""


@dataclass(frozen=True)
class TargetForm:
    """What is kept of whole teachers' `classes` (B, C), `pooled` features (B, C) and `patches` (B, rows, columns, C).

    Of logits z with `top` = k, the k largest and their classes are kept, and r = log Σ exp(z_i) over the others, which
    `unpack` takes for equal: z_i = r - log(C - k). Patches are averaged over squares of `pool` a side. The numbers are
    then kept as they are (`exact`), in `bf16`, or in `int8`: x = s q with a scale s = max |x| / 127 for each vector,
    so that no number is wrong by more than s / 2.
    """

    type: CacheType = "exact"
    top: int | None = None
    pool: int = 1
    classes: int = 0
    """The number of classes C, for `top`."""

    def __post_init__(self) -> None:
        """Raise ConfigError: all logits are among the largest."""
        if self.top is not None and self.top >= self.classes:
            raise ConfigError(
                f"transfer.cache_top={self.top} is no part of the teacher's {self.classes} classes: leave it out"
            )

    def pack(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what is kept of the targets of some images, each with the images first.

        Raises ConfigError: a teacher does not say how its patches lie, and they are to be averaged.
        """
        packed: dict[str, Tensor] = {}
        for name, values in targets.items():
            kept, result = values, name.rpartition(".")[2]
            if result == "classes" and self.top is not None:
                kept, packed[name + INDEX] = _largest(values, self.top)
            if result == "patches" and self.pool > 1:
                kept = _averaged(values, self.pool)
            if self.type == "int8":
                kept, packed[name + SCALE] = _to_int8(kept)
            packed[name] = kept.to(torch.bfloat16) if self.type == "bf16" else kept
        return packed

    def unpack(self, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the targets: what `pack` was given, but for what its form leaves out."""
        targets = {name: each for name, each in packed.items() if not name.endswith((INDEX, SCALE))}
        for name, values in targets.items():
            if (scale := packed.get(name + SCALE)) is not None:
                targets[name] = values = values * scale[..., None]
            if (index := packed.get(name + INDEX)) is not None:
                targets[name] = self._spread(values, index)
        return targets

    def _spread(self, kept: Tensor, index: Tensor) -> Tensor:
        """Return the logits (B, C) of the k largest and of the others together, (B, k + 1)."""
        largest, rest = kept.float().split((index.shape[1], 1), dim=1)
        others = rest - math.log(self.classes - index.shape[1])
        return others.repeat(1, self.classes).scatter(1, index.long(), largest)


def _largest(logits_BC: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest logits and the log-sum-exp of the others (B, k + 1), and the classes of the largest (B, k)."""
    largest, index = logits_BC.topk(count, dim=1)
    rest = logits_BC.float().scatter(1, index, -torch.inf).logsumexp(1, keepdim=True)
    few = logits_BC.shape[1] <= torch.iinfo(torch.int16).max
    kept = torch.cat((largest, rest.to(largest.dtype)), dim=1)
    return kept, index.to(torch.int16 if few else torch.int32)


def _averaged(patches: Tensor, side: int) -> Tensor:
    if patches.dim() == 3:
        raise ConfigError(
            f"transfer.cache_pool={side} averages patches that are neighbors, and this teacher does not say how its "
            "patches lie: leave it out"
        )
    grid = math.ceil(patches.shape[1] / side), math.ceil(patches.shape[2] / side)
    return average_to(patches, grid).to(patches.dtype)


def _to_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return vectors (..., C) in int8, and the scale of each (...) in float32."""
    scale = values.float().abs().amax(-1) / LARGEST_INT8
    steps = values.float() / torch.where(scale == 0, 1.0, scale)[..., None]
    return steps.round().to(torch.int8), scale
