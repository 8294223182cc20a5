"""Which layers to keep as softmax: greedily, the one whose return brings the features nearest the teacher's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.converted import converted_layers, whole_plan
from ..models.copying.teacher_view import shallow
from ..models.errors import TransferError
from ..models.families import attention_of, attention_place, family_of, sites
from .align import check_alike


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

    student: nn.Module
    error: float
    """With no layer kept."""
    kept: tuple[Kept, ...]

    def plan_keeping(self, count: int) -> str:
        """Return the student's plan with the teacher's layer in the first `count` choices."""
        return whole_plan(self.student, keep=[choice.layer for choice in self.kept[:count]])


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
    if not layers:
        raise TransferError(
            "no layer of the student is converted, so none can be given back: give a converted student"
        )
    if not 1 <= keep <= len(layers):
        raise TransferError(
            f"keep={keep}: the student has {len(layers)} converted layers; keep 1 to {len(layers)}"
        )
    check_alike(teacher, student, layers)
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
    return LayerSearch(student, error_with([]), tuple(chosen))


def tokens_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return the final tokens in float32, before pooling and head."""
    family = family_of(model)
    return family.tokens(family.features(model, images)).float()


@contextmanager
def _given_back(teacher: nn.Module, student: nn.Module, layers: Sequence[int]) -> Iterator[None]:
    """Give these layers of the student the teacher's attention inside the block."""
    places = sites(student)
    own = {layer: places[layer].block(student) for layer in layers}
    try:
        for layer, block in own.items():
            places[layer].replace_block(student, _with_layer_of(places[layer].block(teacher), block))
        yield
    finally:
        for layer, block in own.items():
            places[layer].replace_block(student, block)


def _with_layer_of(theirs: nn.Module, own: nn.Module) -> nn.Module:
    """Return a block of the teacher with the parts of the student's block, except for the attention.

    The block is the teacher's, because one of Swin cuts its tokens into windows itself.
    """
    twin = shallow(theirs)
    twin._modules = {**own._modules, attention_place(own): attention_of(theirs)}
    twin._parameters = own._parameters
    return twin
