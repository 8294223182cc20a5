"""Copied attention: a student and the part of its teacher that it runs with, as one model.

It is known to timm as `graftvit_copied` with the arguments `student` (an architecture) and `copied` (what of which
teacher, `Copying`) beside the student's own, so `timm.create_model` and saved folders rebuild it wherever this package
is imported. The model is the student, of timm's own class; its weights are the student's, and under `teacher.` those
of the teacher up to the last copied layer's queries and keys.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from timm.models import load_pretrained, register_model
from torch import Tensor, nn

from . import conversion
from .copying.copying_operators import COPIES, Copy
from .copying.grids import GridRule, match_tokens
from .copying.tape import HeadMap, LayerPair, Link, Tape
from .copying.teacher_view import LARGEST, Normalization, TeacherInput, view_attention
from .errors import WEIGHT_ARGUMENTS, Json, JsonDict, UnsupportedModelError, check_types
from .families import (
    attention_blocks,
    attention_shape,
    check_supported,
    construct,
    find_constructor,
    patch_size,
    sites,
    token_layout,
    vit,
)
from .host import AttentionHost
from .replay import replay_blocks

ARCHITECTURE = "graftvit_copied"
EQUAL = GridRule(copy=True)


@dataclass(frozen=True)
class CopiedTeacher:
    """How timm builds the teacher, and how its images are normalized."""

    architecture: str
    model_args: Json
    normalization: Normalization
    norm_eps: float | None = None
    """The epsilon of all its norms, where it differs from the architecture's."""

    def build(self) -> nn.Module:
        """Return the whole teacher, with fresh weights."""
        model = construct(self.architecture, **self.model_args)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm) and self.norm_eps is not None:
                module.eps = self.norm_eps
        return model


@dataclass(frozen=True)
class Copying:
    """What a student copies: the method, the layers, for each of them the heads, and from which teacher."""

    method: str
    layers: tuple[LayerPair, ...]
    heads: tuple[tuple[tuple[int, ...] | None, ...], ...]
    """By layer: for each student head the teacher heads whose mean it takes; None where it is left alone."""
    normalization: Normalization
    """How the student's images are normalized."""
    teacher: CopiedTeacher

    def to_json(self) -> JsonDict:
        """Return the argument `copied` of the architecture."""
        norms = [dict(each.normalization._asdict()) for each in (self, self.teacher)]
        return {
            **asdict(self),
            "normalization": norms[0],
            "teacher": {**asdict(self.teacher), "normalization": norms[1]},
        }

    @classmethod
    def from_json(cls, described: Json) -> Copying:
        """Read that argument. Raises ValueError where it is invalid."""
        try:
            return cls(
                str(described["method"]),
                tuple(
                    LayerPair(_index(pair["teacher"]), _index(pair["student"]))
                    for pair in described["layers"]
                ),
                tuple(tuple(group and tuple(group) for group in groups) for groups in described["heads"]),
                _norm(described),
                _teacher(described["teacher"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"copied={reprlib.repr(described)} does not describe what a student copies"
            ) from error

    def links(self, teacher: nn.Module, student: nn.Module) -> list[Link]:
        """Pair the heads and tokens of each pair of layers. Raises ValueError for one that does not exist."""
        shapes = attention_shape(teacher), attention_shape(student)
        given = {(pair.teacher < shapes[0].depth, pair.student < shapes[1].depth) for pair in self.layers}
        students = {pair.student for pair in self.layers}
        one_each = len(students) == len(self.layers) == len(self.heads)
        if self.method not in COPIES or given != {(True, True)} or not one_each:
            raise ValueError(f"{self} does not go with these models, of {shapes[0]} and {shapes[1]}")
        tokens = match_tokens(token_layout(teacher), token_layout(student), EQUAL)
        theirs, ours, links = sites(teacher), sites(student), []
        for pair, groups in zip(self.layers, self.heads, strict=True):
            source, place = theirs[pair.teacher], ours[pair.student]
            _check_heads(groups, source.num_heads, place.num_heads)
            links.append(Link(pair, HeadMap(groups, source.num_heads), tokens, source, place))
        return links


class CopiedAttention(AttentionHost):
    """A permanent host: its layer runs with the teacher's attention, in training and afterwards."""

    permanent = True
    operator: Copy

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Attention over tokens (B, N, C), once the teacher has run on the images."""
        if not self.operator.tape.active:
            raise UnsupportedModelError(
                "a layer that copies the teacher's attention runs within its model alone: call the model, on images"
            )
        return super().forward(x, *args, **options)


class TeacherFirst:
    """A hook that runs the teacher's part on the images that the student's patch embedding has just seen."""

    def __init__(self, student: nn.Module, tape: Tape) -> None:
        self.student = student
        self.tape = tape

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        student = vit(self.student)
        self.tape.begin(student.teacher_input.grids(inputs[0], EQUAL))
        try:
            student.teacher(student.teacher_input(inputs[0]))
        except BaseException:
            self.tape.end()
            raise
        replay_blocks(student, self.tape.moment)

    def forget(self, module: nn.Module, inputs: object, output: object) -> None:
        """Drop the teacher's outputs once no layer of this forward pass needs them."""
        if not self.tape.replaying:
            self.tape.end()


def copy_attention(student: nn.Module, teacher: nn.Module, copying: Copying) -> nn.Module:
    """`student`, changed in place, with the part of `teacher` that it needs, frozen and sharing its tensors.

    Raises:
        UnsupportedModelError: no adapter covers a model, or a layer has no softmax attention to replace.
        ValueError: `copying` does not go with these models.
    """
    check_supported(student, to="copying")
    check_supported(teacher, to="copying")
    model, tape, links = vit(student), Tape(), copying.links(teacher, student)
    layers, kind = {pair.teacher for pair in copying.layers}, COPIES[copying.method]
    model.teacher = view_attention(teacher, layers, tape, kind.parts)
    model.teacher.requires_grad_(False)
    norms = copying.teacher.normalization, copying.normalization
    model.teacher_input = TeacherInput(model.teacher.model, student, *norms)
    for link in links:
        block = attention_blocks(student)[link.pair.student]
        if getattr(block.attn, "permanent", False):
            raise UnsupportedModelError(f"layer {link.pair.student} has no softmax attention to replace")
        block.attn = CopiedAttention(block.attn, kind.operator(link, tape))
    run = TeacherFirst(student, tape)
    model.patch_embed.register_forward_hook(run)
    attention_blocks(student)[max(copied_layers(student))].register_forward_hook(run.forget)
    model.copied = copying
    conversion.name_for_timm(student, lambda model, name, arguments: with_copying(name, arguments, copying))
    return student


def copying_of(model: nn.Module) -> Copying | None:
    """Return what a model copies, None for one that runs with its own attention."""
    return getattr(model, "copied", None)


@check_types()
def copied_layers(model: nn.Module) -> dict[int, CopiedAttention]:
    """Return the copied layers by their number.

    Args:
        model: any model.
    """
    layers = enumerate(getattr(block, "attn", None) for block in attention_blocks(model))
    return {index: layer for index, layer in layers if isinstance(layer, CopiedAttention)}


def with_copying(architecture: str, arguments: Json, copying: Copying) -> tuple[str, JsonDict]:
    """Name and arguments with which timm builds `architecture` with what it copies."""
    return ARCHITECTURE, {**arguments, "student": architecture, "copied": copying.to_json()}


def resize(model: nn.Module, img_size: int | tuple[int, int]) -> None:
    """Change the image size (height, width) of a model in place, also of one that copies attention.

    As `conversion.resize`; the teacher's part gets the size at which its grid is the student's.

    Args:
        model: a supported model, which is changed in place.
        img_size: height and width in pixels, or one number for both.

    Raises:
        UnsupportedModelError: a family cannot, or the patches do not fit.
    """
    conversion.resize(model, img_size)
    copying = copying_of(model)
    if copying is None:
        return
    own = vit(model)
    teacher, grid = own.teacher.model, token_layout(model).grid
    patch = patch_size(teacher)
    size = grid[0] * patch[0], grid[1] * patch[1]
    conversion.resize(teacher, size)
    teacher.requires_grad_(False)
    arguments = {**copying.teacher.model_args, "img_size": size}
    own.copied = replace(copying, teacher=replace(copying.teacher, model_args=arguments))
    now = {"copied": own.copied.to_json(), "plan_size": conversion.plan_size(model)}
    own._model_args = {**getattr(own, "_model_args", {}), **now}  # type: ignore[assignment]


def _check_heads(groups: tuple[tuple[int, ...] | None, ...], teacher: int, student: int) -> None:
    """ValueError where a layer's heads are not those of the two models."""
    given = [group for group in groups if group is not None]
    numbers = [head for group in given for head in group]
    valid = len(groups) == student and given and all(given)
    if not valid or not all(type(head) is int and 0 <= head < teacher for head in numbers):
        raise ValueError(
            f"heads={groups!r} do not go with {student} heads of the student and {teacher} of the teacher"
        )


def _index(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"copied names a layer {reprlib.repr(value)}, and layers are numbered from 0")
    return value


def _teacher(described: Json) -> CopiedTeacher:
    """ValueError where no teacher of timm is described, or one with weights of its own."""
    teacher = CopiedTeacher(**{**described, "normalization": _norm(described)})
    name, arguments, epsilon = teacher.architecture, teacher.model_args, teacher.norm_eps
    if not isinstance(name, str) or find_constructor(name) is None:
        raise ValueError(
            f"copied says teacher.architecture={reprlib.repr(name)}, which is no architecture of timm"
        )
    if not isinstance(arguments, Mapping):
        raise ValueError(
            f"copied says teacher.model_args={reprlib.repr(arguments)}, which is no table of settings"
        )
    if WEIGHT_ARGUMENTS & set(arguments):
        raise ValueError(f"copied names weights of its own: {sorted(WEIGHT_ARGUMENTS & set(arguments))}")
    if epsilon is not None and not (isinstance(epsilon, float) and 0 < epsilon < 1):
        raise ValueError(
            f"copied says teacher.norm_eps={reprlib.repr(epsilon)}, which is no number from 0 to 1"
        )
    return teacher


def _norm(described: Json) -> Normalization:
    """ValueError where no image can be normalized so."""
    mean, std = (tuple(described["normalization"][name]) for name in Normalization._fields)
    numbers = all(isinstance(value, (int, float)) and abs(value) <= LARGEST for value in mean + std)
    if not numbers or not mean or len(mean) != len(std) or min(std) < 1 / LARGEST:
        raise ValueError(
            f"copied says normalization={reprlib.repr(described['normalization'])}, and valid are one mean and one "
            f"deviation a channel, means from {-LARGEST:,.0f} to {LARGEST:,.0f}, deviations from {1 / LARGEST:g}"
        )
    return Normalization(mean, std)


@register_model
def graftvit_copied(
    pretrained: bool = False,
    *,
    student: str,
    copied: Json,
    cache_dir: str | None = None,
    **arguments: Any,
) -> nn.Module:
    """Build the timm model `student` with what it copies of a teacher; `pretrained` loads what its `pretrained_cfg`
    names."""
    copying = Copying.from_json(copied)
    model = copy_attention(construct(student, **arguments), copying.teacher.build(), copying)
    if pretrained:
        channels = arguments.get("in_chans", 3)
        load_pretrained(model, num_classes=vit(model).num_classes, in_chans=channels, cache_dir=cache_dir)
    return model
