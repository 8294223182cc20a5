"""Every transfer method as a dense reference knows it: one row a method, one table for all tests.

What a method reads and how it treats heads stands in its facts and its class, which the tests ask. A row adds what
must not be asked: the loss written out in the plainest words, and between which layers of pyramids it is defined.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from graftvit.transfer.methods.method_facts import facts_of, reads_setting
from support.models.dense import Layer
from torch import Tensor

Size = tuple[int, int]
Kind = tuple[Any, ...]
Both = tuple[Tensor, Tensor]


@dataclass
class Place:
    """One block of a model: its grid, the kind of its maps, and where its windows take their tokens from."""

    grid: Size
    kind: Kind
    windows: list[list[int | None]] | None = None
    """The token of each place of each window; None where timm pads."""
    cosine: bool = False
    prefix: int = 0
    """Prefix tokens, which are left out where the other layer has none."""


class Sides(Protocol):
    """A student and a teacher, or a layer of each on the tokens that both have: the student's tensor comes first."""

    heads: Mapping[int, list[int]]
    """By the student's head, those of the teacher; empty where all are joined."""
    options: Mapping[str, Any]

    def part(self, name: str) -> Both:
        """Queries, keys, values or outputs: q, k, v, out (B, H, N, D)."""

    def logits(self) -> Both:
        """The attention logits (B, H, N, K), minus infinity where a query does not see a key."""

    def block(self) -> Both:
        """What comes out of the blocks (B, N, C)."""

    def features(self) -> Both:
        """What goes into the heads of the models (B, C)."""

    def classes(self) -> Both:
        """The class logits (B, classes)."""

    def project(self, x: Tensor) -> Tensor:
        """The student's tensor at the teacher's width, by the map that is learned where they differ."""


def only_read(method: str, **options: Any) -> dict[str, Any]:
    """The options without those that a method does not read, which `DualViT` refuses."""
    return {name: value for name, value in options.items() if reads_setting(method, name)}


def compare_maps(sides: Sides) -> Tensor:
    """Cross-entropy, or KL divergence, of the mean of the teacher's maps and the student's, by head."""
    warmth, losses = sides.options.get("temperature", 1.0), []
    mine, theirs = (logits / warmth for logits in sides.logits())
    for head, group in sides.heads.items():
        wanted = theirs[:, group].softmax(-1).mean(1)
        own = mine[:, head].log_softmax(-1).masked_fill(wanted == 0, 0.0)
        loss = -(wanted * own).sum(-1).mean()
        if sides.options.get("loss") == "kl":
            loss = loss + torch.xlogy(wanted, wanted).sum(-1).mean()
        losses.append(loss * warmth**2)
    return torch.stack(losses).mean()


def compare_part(name: str) -> Callable[[Sides], Tensor]:
    """The mean squared error of a part, its heads joined."""

    def loss(sides: Sides) -> Tensor:
        mine, theirs = sides.part(name)
        if sides.heads:
            mine, theirs = mine[:, list(sides.heads)], theirs[:, [one for (one,) in sides.heads.values()]]
        mine, theirs = (each.transpose(1, 2).flatten(2) for each in (mine, theirs))
        return F.mse_loss(sides.project(mine), theirs)

    return loss


def compare_blocks(sides: Sides) -> Tensor:
    mine, theirs = sides.block()
    return F.mse_loss(sides.project(mine), theirs)


def compare_features(sides: Sides) -> Tensor:
    mine, theirs = sides.features()
    if sides.options.get("feature_loss") == "smooth_l1":
        return F.smooth_l1_loss(sides.project(mine), theirs)
    return 1 - F.cosine_similarity(sides.project(mine), theirs, dim=-1).mean()


def compare_classes(sides: Sides) -> Tensor:
    warmth = sides.options.get("temperature", 1.0)
    mine, wanted = (each.div(warmth).softmax(-1) for each in sides.classes())
    return (wanted * (wanted.log() - mine.log())).sum(-1).mean() * warmth**2


def dense_copy(
    method: str, own: Layer, ours: list[int] | slice, given: Tensor, heads: Mapping[int, list[int]]
) -> Tensor:
    """The output of a layer with what is given of the teacher, on the tokens `ours`: attention logits, or a part."""
    if method == "copy":
        maps, out = given.softmax(-1), own.out.clone()
        for head, group in heads.items():
            out[:, head, ours] = maps[:, group].mean(1) @ own.v[:, head][:, ours]
        return out
    parts = {name: getattr(own, name).clone() for name in "qkv"}
    for head, (one,) in heads.items():
        parts[method[-1]][:, head, ours] = given[:, one]
    q, k, v = parts.values()
    bias = own.logits - own.scale * own.q @ own.k.transpose(-2, -1)
    return (own.scale * q @ k.transpose(-2, -1) + bias).softmax(-1) @ v


def all_fit(teacher: Place, student: Place) -> bool:
    return True


def same_kind(teacher: Place, student: Place) -> bool:
    return teacher.kind == student.kind


def same_kind_and_logits(teacher: Place, student: Place) -> bool:
    return teacher.kind == student.kind and teacher.cosine == student.cosine


def same_kind_or_within_windows(teacher: Place, student: Place) -> bool:
    return teacher.kind == student.kind or (teacher.kind[0] == "window" and student.kind[0] == "whole")


def same_queries(teacher: Place, student: Place) -> bool:
    return teacher.cosine == student.cosine


def same_values(teacher: Place, student: Place) -> bool:
    return (
        len({place.kind if place.kind[0] in ("keys", "pool") else None for place in (teacher, student)}) == 1
    )


def same_keys(teacher: Place, student: Place) -> bool:
    return same_queries(teacher, student) and same_values(teacher, student)


@dataclass(frozen=True)
class MethodCase:
    """A transfer method: its dense loss, and whether a layer of a pyramid can learn from another one."""

    name: str
    loss: Callable[[Sides], Tensor] | None = None
    """None of a method that copies, whose part is the last letter of its name."""
    fits: Callable[[Place, Place], bool] = all_fit
    """For the teacher's layer and the student's; ignored for a method without layers."""


CASES = [
    MethodCase("copy", fits=same_kind),
    MethodCase("copy_q", fits=same_kind_and_logits),
    MethodCase("copy_k", fits=same_kind_and_logits),
    MethodCase("copy_v", fits=same_kind),
    MethodCase("distill", compare_maps, same_kind_or_within_windows),
    MethodCase("distill_q", compare_part("q"), same_queries),
    MethodCase("distill_k", compare_part("k"), same_keys),
    MethodCase("distill_v", compare_part("v"), same_values),
    MethodCase("attention_output", compare_part("out")),
    MethodCase("block_output", compare_blocks),
    MethodCase("feature", compare_features),
    MethodCase("logits", compare_classes),
]
BY_NAME = {case.name: case for case in CASES}
METHODS = list(BY_NAME)
COPIES = [name for name in METHODS if facts_of(name).copies]
LOSSES = [name for name in METHODS if not facts_of(name).copies]


def dense_loss(method: str, sides: Sides) -> Tensor:
    """Return the loss of a method that does not copy."""
    loss = BY_NAME[method].loss
    assert loss is not None, method
    return loss(sides)
