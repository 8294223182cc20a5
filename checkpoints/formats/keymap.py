"""Apply key maps: rename the parts of a vision transformer from other libraries to timm's names.

A map is data, and `apply` is the only code that reads it. A new family is one more row of `formats.KEY_MAPS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from torch import Tensor

from ...models.errors import CheckpointError, Json
from ..report import some
from ..weight_files import Weights

PIECE = re.compile(r"(.+)\[(gate|up|[qkv])\w*\]")
"""A name that ends in [q], [k] or [v] (or [query] …) is that third of a tensor that timm keeps in one."""
ORDERS = (("q", "k", "v"), ("gate", "up"))
"""How timm orders the pieces of a tensor: queries, keys and values, or the gate and what it is for."""

Prepare = Callable[[Weights], Weights]
Describe = Callable[[Weights, Json], Weights]


@dataclass(frozen=True)
class KeyMap:
    """How one library names the tensors of one family of models."""

    name: str
    """Of the family and the library, for reports and errors."""
    marks: tuple[str, ...]
    """Patterns; a file is of this family where each one matches some key whole."""
    unless: tuple[str, ...] = ()
    """Patterns of keys that no file of this family has."""
    prepare: Prepare | None = None
    """What one name for another cannot say (tensors cut, joined, added): done under the source's names."""
    names: tuple[tuple[str, str], ...] = ()
    """(pattern, timm's name): the first that matches a key whole; a key that none matches keeps its name."""
    left_out: tuple[tuple[str, str], ...] = ()
    """(pattern, reason): what timm's model has no place for. Looked at before `names`."""
    reshape: Callable[[str, Tensor], Tensor] | None = None
    """(timm's name, tensor) to the tensor as timm keeps it."""
    describe: Describe | None = None
    """Adds architecture and normalization, from the tensors and the source's config.json ({} without one)."""


def recognize(tensors: Mapping[str, Tensor], maps: tuple[KeyMap, ...]) -> KeyMap | None:
    """Return the first map all of whose marks are among the keys, and none of what it excludes."""

    def among(pattern: str) -> bool:
        return any(re.fullmatch(pattern, key) for key in tensors)

    for candidate in maps:
        if all(map(among, candidate.marks)) and not any(map(among, candidate.unless)):
            return candidate
    return None


def apply(found: KeyMap, weights: Weights, config: Json) -> Weights:
    """`weights` under timm's names, with what the map knows of the model.

    Raises CheckpointError: two keys would get the same name, or a third of a fused tensor is not there.
    """
    if found.prepare is not None:
        weights = found.prepare(weights)
    renamed: dict[str, Tensor] = {}
    left_out = dict(weights.left_out)
    for key, tensor in weights.tensors.items():
        reason = _first(found.left_out, key)
        if reason is not None:
            left_out[key] = reason
            continue
        name = _first(found.names, key) or key
        if name in renamed:
            raise CheckpointError(f"{weights.origin}: {key!r} would be a second {name!r} ({found.name})")
        renamed[name] = tensor
    tensors = _joined(renamed, weights.origin)
    if found.reshape is not None:
        tensors = {name: found.reshape(name, tensor) for name, tensor in tensors.items()}
    words = f"{weights.format}, {found.name}" if weights.format else found.name
    mapped = replace(weights, tensors=tensors, format=words, left_out=left_out)
    return mapped if found.describe is None else found.describe(mapped, config)


def _first(rules: tuple[tuple[str, str], ...], key: str) -> str | None:
    for pattern, result in rules:
        match = re.fullmatch(pattern, key)
        if match is not None:
            return match.expand(result)
    return None


def _joined(tensors: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Return the pieces of what timm keeps in one tensor as that tensor, in timm's order."""
    joined: dict[str, Tensor] = {}
    pieces: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        piece = PIECE.fullmatch(name)
        if piece is None:
            joined[name] = tensor
        else:
            pieces.setdefault(piece[1], {})[piece[2]] = tensor
    for name, parts in pieces.items():
        order = next(order for order in ORDERS if not parts.keys().isdisjoint(order))
        absent = [part for part in order if part not in parts]
        if absent:
            raise CheckpointError(f"{origin} is not whole: {name} lacks its {some(absent)} part")
        kinds = {(tuple(part.shape), part.dtype) for part in parts.values()}
        if name in joined or len(kinds) > 1 or () in next(iter(kinds)):
            raise CheckpointError(f"{origin}: the {', '.join(order)} parts of {name} do not fit together")
        joined[name] = torch.cat([parts[part] for part in order])
    return joined


# Give the mean and the standard deviation of the images that a family was trained on.

IMAGENET = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
INCEPTION = {"mean": IMAGENET_INCEPTION_MEAN, "std": IMAGENET_INCEPTION_STD}
"""One half each: values from -1 to 1."""
NOTE = "normalization: "
BEIT2_NOTE = NOTE + "ImageNet's, as BEiTv2 trains"


def normalized(weights: Weights, statistics: Json, reason: str) -> Weights:
    """`weights` with mean and std, and the one note of the report that says why these."""
    notes = (note for note in weights.notes if not note.startswith(NOTE))
    described = {**weights.pretrained_cfg, **statistics}
    return replace(weights, pretrained_cfg=described, notes=(*notes, NOTE + reason))


def imagenet(families: str) -> Describe:
    """Return a description that knows ImageNet's mean and std of `families` and nothing else."""

    def describe(weights: Weights, config: Json) -> Weights:
        return normalized(weights, IMAGENET, f"ImageNet's, as {families}")

    return describe
