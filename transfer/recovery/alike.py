"""Whether a student is a conversion of its teacher, layer by layer."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from ...models.copying.teacher_view import Normalization, ShownImages, TeacherInput, WholeInput
from ...models.errors import TransferError
from ...models.families import (
    Site,
    TokenLayout,
    attention_shape,
    depths,
    family_of,
    is_pyramid,
    sites,
    token_layout,
)
from ...models.grid_hosts import native_host
from ...models.merges import describe_unequal
from ...models.pyramid_conversion import has_bias


def check_alike(teacher: nn.Module, student: nn.Module, layers: Collection[int]) -> None:
    """Raise TransferError unless these `layers` have the same heads, widths and tokens in teacher and student."""
    if is_pyramid(teacher) or is_pyramid(student):
        _check_stages(teacher, student, layers)
        return
    shapes = attention_shape(teacher), attention_shape(student)
    if shapes[0] != shapes[1]:
        raise TransferError(
            f"the teacher has {shapes[0]} and the student {shapes[1]}: give the model that the student was converted "
            "from, because both need the same"
        )
    layouts = token_layout(teacher), token_layout(student)
    if layouts[0] != layouts[1]:
        raise TransferError(
            f"the teacher's tokens are {_words(layouts[0])}, the student's {_words(layouts[1])}: both need the same; "
            "leave teacher.img_size out, or set it so that the patch grids agree"
        )


def has_whole_map(teacher: nn.Module, site: Site) -> bool:
    """Return whether a layer of the teacher has a map of all pairs of tokens and nothing else in its softmax."""
    if not is_pyramid(teacher):
        return True
    layer, tokens = site.block(teacher).attn, site.shape.geometry.num_tokens
    pairs = native_host(site.block(teacher)).native_pairs(site.shape.geometry)
    return pairs == (tokens, tokens) and not has_bias(layer)


def shown_to(
    teacher: nn.Module, student: nn.Module, teacher_norm: Normalization, student_norm: Normalization
) -> ShownImages:
    """Return how the images of a student are shown to the teacher that it was converted from."""
    if is_pyramid(teacher) or is_pyramid(student):
        size = family_of(teacher).image_size(teacher)
        return WholeInput(teacher, student, teacher_norm, student_norm, size)
    return TeacherInput(teacher, student, teacher_norm, student_norm)


def _check_stages(teacher: nn.Module, student: nn.Module, layers: Collection[int]) -> None:
    """Raise TransferError for a pyramid that is no conversion of the teacher in these layers."""
    if family_of(teacher) is not family_of(student) or depths(teacher) != depths(student):
        words = [f"a {type(model).__name__} of {depths(model)} blocks" for model in (teacher, student)]
        raise TransferError(
            f"the teacher is {words[0]} and the student {words[1]}: give the model that the student was converted from"
        )
    for theirs, ours in zip(sites(teacher), sites(student), strict=True):
        if ours.index in layers and (theirs.width, theirs.shape) != (ours.width, ours.shape):
            raise TransferError(
                f"layer {ours.index} has {_sizes(theirs)} in the teacher and {_sizes(ours)} in the student: "
                + _advice(teacher, student)
            )


def _advice(teacher: nn.Module, student: nn.Module) -> str:
    """Return what to do about layers of other sizes: where merging alone makes them so, the teacher is not wrong."""
    sizes = [family_of(model).image_size(model) for model in (teacher, student)]
    merging = describe_unequal(teacher, student) if sizes[0] == sizes[1] else ""
    if merging:
        return f"{merging}; train with mode=transfer and transfer.method=feature, which needs no equal grids"
    return "give the model that the student was converted from, and leave teacher.img_size out"


def _sizes(site: Site) -> str:
    rows, columns = site.shape.geometry.grid
    return f"{site.num_heads} heads of {site.head_dim}, width {site.width} and {rows}x{columns} tokens"


def _words(layout: TokenLayout) -> str:
    return " + ".join((*layout.prefix, f"{layout.grid[0]}x{layout.grid[1]} patches"))
