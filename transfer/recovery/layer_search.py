"""Which layers to keep as softmax: greedily, the one whose return brings the features nearest the teacher's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...models.conversion import converted_layers, plan_of
from ...models.errors import TransferError
from ...models.families import attention_blocks, attention_shape, vit
from ...models.layer_plan import KEEP, Choice, parse_plan, plan_text


@dataclass(frozen=True)
class Kept:
    """One choice: the layer that was given back, and what it left of the error."""

    layer: int
    error: float
    """Relative error of the final tokens with this layer and all before it kept: ‖f_s − f_t‖ / ‖f_t‖."""
    others: dict[int, float]
    """The error with each of the other layers in its place."""


@dataclass(frozen=True)
class LayerSearch:
    """The choices in their order."""

    plan: str
    """The student's own."""
    depth: int
    error: float
    """With no layer kept."""
    kept: tuple[Kept, ...]

    def plan_keeping(self, count: int) -> str:
        """Return the student's plan with the first `count` choices kept as softmax."""
        layers = {choice.layer for choice in self.kept[:count]}
        choices = parse_plan(self.plan, self.depth)
        return plan_text(tuple(Choice(KEEP) if i in layers else choice for i, choice in enumerate(choices)))


@torch.no_grad()
def search_layers(
    teacher: nn.Module, student: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], keep: int
) -> LayerSearch:
    """Return the `keep` converted layers of `student` to give back to softmax, the most useful first.

    A layer that is given back is the teacher's own, so a student that was aligned is judged fairly. The cost is
    about `keep` x depth forward passes over `batches`, each a pair of the same images for teacher and student.

    Raises TransferError: nothing is converted, fewer layers are than are to be kept, or the two do not fit.
    """
    layers = converted_layers(student)
    if not 1 <= keep <= len(layers):
        raise TransferError(
            f"keep={keep}: the student has {len(layers)} converted layers; keep 1 to {len(layers)}"
        )
    if attention_shape(teacher) != attention_shape(student):
        raise TransferError(
            "teacher and student differ in depth, heads or width: give the model it was converted from"
        )
    targets = [tokens_of(teacher, images) for images, _ in batches]

    def error_with(kept: Sequence[int]) -> float:
        with _given_back(teacher, student, kept):
            errors = [
                (tokens_of(student, images) - target).norm() / target.norm()
                for (_, images), target in zip(batches, targets, strict=True)
            ]
        return float(torch.stack(errors).mean())

    chosen: list[Kept] = []
    for _ in range(keep):
        done = [choice.layer for choice in chosen]
        errors = {layer: error_with([*done, layer]) for layer in layers if layer not in done}
        best = min(errors, key=lambda layer: errors[layer])
        others = {layer: error for layer, error in errors.items() if layer != best}
        chosen.append(Kept(best, errors[best], others))
    depth = attention_shape(student).depth
    return LayerSearch(str(plan_of(student)), depth, error_with([]), tuple(chosen))


def tokens_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return the final tokens in float32, before pooling and head."""
    return vit(model).forward_features(images).float()


@contextmanager
def _given_back(teacher: nn.Module, student: nn.Module, layers: Sequence[int]) -> Iterator[None]:
    """Give these layers of the student the teacher's attention inside the block."""
    blocks, theirs = attention_blocks(student), attention_blocks(teacher)
    own = {layer: blocks[layer].attn for layer in layers}
    try:
        for layer in layers:
            blocks[layer].attn = theirs[layer].attn
        yield
    finally:
        for layer, attention in own.items():
            blocks[layer].attn = attention
