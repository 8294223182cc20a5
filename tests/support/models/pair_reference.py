"""What every transfer method gives for any pair of small models, dense and in the plainest words.

A `Pair` says in plain numbers which layers, heads and tokens go together; nothing here asks the library for that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graftvit.transfer.methods.dual import DualViT
from support.models.dense import Layer, gradient, relative_error, run
from support.models.method_cases import COPIES, Both, dense_copy, dense_loss
from torch import Tensor, nn

Grid = tuple[int, int]


@dataclass(frozen=True)
class Pair:
    """A method and which layers and heads of a teacher and a student go together."""

    method: str
    layers: tuple[tuple[int, int], ...] = ()  # teacher, student
    heads: dict[int, list[int]] = field(default_factory=dict)  # student: teacher's; empty: all joined
    options: dict[str, Any] = field(default_factory=dict)  # those of `DualViT`
    scale: float = 1.0  # the student's standard deviation over the teacher's
    shift: float = 0.0


def expected(
    pair: Pair, teacher: nn.Module, student: nn.Module, x: Tensor, projectors: nn.ModuleDict
) -> tuple[Tensor, Tensor]:
    """The student's logits and the weighted transfer loss."""
    with torch.no_grad():
        shown = resized(x * pair.scale + pair.shift, teacher, student)
        target = Target(teacher, student, shown, x)
    if pair.method in COPIES:
        logits, _ = run(student, x, copying(pair, target))
        return logits, logits.new_zeros(())
    blocks: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, out: blocks.append(out)) for block in student.blocks]
    logits, layers = run(student, x)
    for hook in hooks:
        hook.remove()
    losses = [
        dense_loss(pair.method, Shown(pair, target, student, x, logits, projectors, each, layers, blocks))
        for each in pair.layers or [None]
    ]
    loss = torch.stack(losses).sum()
    if pair.options.get("reduction") == "mean":
        loss = loss / len(losses)
    return logits, loss * pair.options.get("weight", 3.0)


def check_step(
    pair: Pair,
    teacher: nn.Module,
    dual: DualViT,
    twin: nn.Module,
    x: Tensor,
    near: float = 1e-9,
    grads: float = 1e-9,
) -> None:
    """Compare logits, loss and gradients of a step with the reference; `teacher` and `twin` are of no wrapper."""
    dual.zero_grad()
    twin.zero_grad()
    projectors = copy.deepcopy(dual.projectors).double()
    logits, loss = expected(pair, teacher, twin, x, projectors)
    (logits.square().mean() + loss).backward()
    out = dual(x.to(next(dual.student.parameters()).dtype))
    (out.logits.square().mean() + out.transfer_loss).backward()
    assert relative_error(out.logits, logits) <= near
    assert float(out.transfer_loss.detach()) == pytest.approx(float(loss.detach()), rel=near, abs=1e-12)
    assert relative_error(gradient(dual.student), gradient(twin)) <= grads
    if dual.projectors:
        assert gradient(dual.projectors).any()
        assert relative_error(gradient(dual.projectors), gradient(projectors)) <= grads


def resized(x: Tensor, teacher: Any, student: Any) -> Tensor:
    """At the teacher's own size; with as many more patches as the student has where the teacher takes any size."""
    size = tuple(teacher.patch_embed.img_size)
    if x.shape[-2:] != student.patch_embed.img_size and not teacher.patch_embed.strict_img_size:
        ours, theirs = student.patch_embed, teacher.patch_embed
        growth = [n // p / g for n, p, g in zip(x.shape[-2:], ours.patch_size, ours.grid_size, strict=True)]
        patches = [max(1, int(g * more + 0.5)) for g, more in zip(theirs.grid_size, growth, strict=True)]
        size = tuple(n * p for n, p in zip(patches, theirs.patch_size, strict=True))
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bicubic", antialias=True)


class Target:
    """The teacher's side, and which of its tokens stand for which of the student's."""

    def __init__(self, teacher: Any, student: Any, shown: Tensor, x: Tensor) -> None:
        self.blocks: list[Tensor] = []
        hooks = [b.register_forward_hook(lambda _, __, out: self.blocks.append(out)) for b in teacher.blocks]
        self.logits, self.layers = run(teacher, shown)
        for hook in hooks:
            hook.remove()
        self.feature = pooled(teacher, shown)
        self.grids = grid_of(teacher, shown), grid_of(student, x)
        self.prefix = teacher.num_prefix_tokens
        kinds = prefix_kinds(teacher), prefix_kinds(student)
        shared = [kind for kind in kinds[1] if kind in kinds[0]]
        patches = self.grids[1][0] * self.grids[1][1]
        self.ours = [kinds[1].index(k) for k in shared] + list(range(len(kinds[1]), len(kinds[1]) + patches))
        self.theirs = [kinds[0].index(k) for k in shared] + list(
            range(len(kinds[0]), len(kinds[0]) + patches)
        )

    def part(self, layer: int, name: str) -> Tensor:
        """Queries, keys, values or outputs at the tokens that the student has, on its grid."""
        return self._moved(getattr(self.layers[layer], name))[:, :, self.theirs]

    def logits_of(self, layer: int) -> Tensor:
        """The attention logits between those tokens."""
        logits = self.layers[layer].logits
        if self.grids[0] != self.grids[1]:
            logits = self._moved(self._moved(logits).transpose(-2, -1)).transpose(-2, -1)
        return logits[:, :, self.theirs][..., self.theirs]

    def _moved(self, rows: Tensor) -> Tensor:
        """Rows (B, H, N, K) brought from the teacher's grid to the student's."""
        if self.grids[0] == self.grids[1]:
            return rows
        batch, heads, _, width = rows.shape
        image = rows[:, :, self.prefix :].transpose(2, 3).reshape(batch, heads * width, *self.grids[0])
        image = F.interpolate(image, self.grids[1], mode="bilinear", align_corners=False)
        return torch.cat(
            [rows[:, :, : self.prefix], image.reshape(batch, heads, width, -1).transpose(2, 3)], dim=2
        )


def grid_of(model: Any, x: Tensor) -> Grid:
    height, width = (
        side // patch for side, patch in zip(x.shape[-2:], model.patch_embed.patch_size, strict=True)
    )
    return height, width


def prefix_kinds(model: Any) -> list[str]:
    kinds = ["class"] if model.cls_token is not None else []
    kinds += ["distillation"] if getattr(model, "dist_token", None) is not None else []
    return kinds + [f"register {index}" for index in range(model.num_prefix_tokens - len(kinds))]


def pooled(model: Any, x: Tensor) -> Tensor:
    """What goes into the head; DeiT's two heads read a token each, and the mean of both is taken."""
    if getattr(model, "head_dist", None) is not None:
        return model.forward_features(x)[:, :2].mean(1)
    feature: Tensor = model.forward_head(model.forward_features(x), pre_logits=True)
    return feature


def copying(pair: Pair, target: Target) -> Callable[[int, Layer], Tensor]:
    """The attention output of each student layer, of which a part is the teacher's."""
    teacher_of = {student: teacher for teacher, student in pair.layers}

    def attend(index: int, own: Layer) -> Tensor:
        if index not in teacher_of:
            return own.out
        teacher = teacher_of[index]
        given = target.logits_of(teacher) if pair.method == "copy" else target.part(teacher, pair.method[-1])
        return dense_copy(pair.method, own, target.ours, given, pair.heads)

    return attend


@dataclass(frozen=True)
class Shown:
    """The two models, or a layer of each, as a dense loss sees them (`Sides`)."""

    pair: Pair
    target: Target
    student: nn.Module
    images: Tensor
    class_logits: Tensor
    projectors: nn.ModuleDict
    layer: tuple[int, int] | None
    """Those of the teacher and the student; None for a method without layers."""
    layers: list[Layer]
    blocks: list[Tensor]

    @property
    def heads(self) -> dict[int, list[int]]:
        return self.pair.heads

    @property
    def options(self) -> dict[str, Any]:
        return self.pair.options

    @property
    def numbers(self) -> tuple[int, int]:
        assert self.layer is not None
        return self.layer

    def part(self, name: str) -> Both:
        teacher, student = self.numbers
        return getattr(self.layers[student], name)[:, :, self.target.ours], self.target.part(teacher, name)

    def logits(self) -> Both:
        (teacher, student), ours = self.numbers, self.target.ours
        return self.layers[student].logits[:, :, ours][..., ours], self.target.logits_of(teacher)

    def block(self) -> Both:
        teacher, student = self.numbers
        return self.blocks[student][:, self.target.ours], self.target.blocks[teacher][:, self.target.theirs]

    def features(self) -> Both:
        return pooled(self.student, self.images), self.target.feature

    def classes(self) -> Both:
        return self.class_logits, self.target.logits

    def project(self, x: Tensor) -> Tensor:
        key = "feature" if self.layer is None else f"layer{self.layer[1]:02d}"
        projected: Tensor = self.projectors[key](x) if key in self.projectors else x
        return projected
