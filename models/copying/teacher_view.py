"""The teacher as a step runs it: up to the last block that is needed and, in it, up to what is needed.

A view shares every parameter and buffer with the teacher and changes nothing in it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import parts as any_timm
from ..attention.base import Operator
from ..errors import TransferError
from ..families import (
    Block,
    attention_of,
    attention_place,
    blocks_of,
    family_of,
    find_family,
    native_host,
    whole_grid,
)
from ..families import shallow as shallow
from ..host import AttentionHost
from ..parts import patch_features, run_features, run_head
from .copying_operators import KeepHeads
from .grids import GridRule, Grids, ImageSizes
from .tape import Tape

# Turn the student's images into the teacher's: its normalization and its image size.

LARGEST = 1e6
"""Bound of a mean, of a deviation and of its inverse, so that an image is finite in float32."""


class Normalization(NamedTuple):
    """Mean and standard deviation of each channel, of images in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Renormalized(nn.Module):
    """x · std_s / std_t + (mean_s − mean_t) / std_t, then a bicubic resize to `size`, where it is given."""

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        channels: int,
        teacher_norm: Normalization,
        student_norm: Normalization,
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        teacher_mean, teacher_std, mean, std = (
            torch.tensor(values, dtype=torch.float64).expand(channels)
            for values in (*teacher_norm, *student_norm)
        )
        self.register_buffer("scale", (std / teacher_std).float().view(-1, 1, 1), persistent=False)
        self.register_buffer(
            "shift", ((mean - teacher_mean) / teacher_std).float().view(-1, 1, 1), persistent=False
        )
        self.same_normalization = teacher_norm == student_norm
        self.size = size

    def teacher_size(self, images: tuple[int, int]) -> tuple[int, int]:
        """Height and width at which images of this size are shown."""
        return images if self.size is None else self.size

    def forward(self, images: Tensor) -> Tensor:
        size, dtype = self.teacher_size((images.shape[-2], images.shape[-1])), images.dtype
        if not self.same_normalization:
            images = images * self.scale + self.shift  # float32 where a loader gives only the weights a type
        if images.shape[-2:] != size:  # in float32: torch has no such resize in half precision
            precise = images.to(torch.promote_types(images.dtype, torch.float32))
            images = F.interpolate(precise, size, mode="bicubic", antialias=True)
        return images.to(dtype)


class ShownImages(Renormalized):
    """The images of a student, as a teacher of it is shown them."""

    dtype: torch.dtype | None = None
    """Of a teacher with weights of its own type; None for the type of the student's images."""

    def forward(self, images: Tensor) -> Tensor:
        shown: Tensor = super().forward(images)
        return shown if self.dtype is None else shown.to(self.dtype)

    def grids(self, images: Tensor, rule: GridRule | None) -> Grids | None:
        """Return the patch grids of teacher and student for these images; None where no patches are compared.

        Raises TransferError: a model does not take images of this size, or the rule refuses the grids.
        """
        return None

    def describe(self) -> list[str]:
        """Describe each change to the images in one sentence."""
        return [] if self.same_normalization else ["images are renormalized for the teacher"]


class WholeInput(ShownImages):
    """The images of a student, as a teacher is shown them of which only whole results are used.

    They are shown at `size` (height, width); by default at the only size that the teacher takes, or as they are.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        teacher_norm: Normalization,
        student_norm: Normalization,
        size: tuple[int, int] | None = None,
    ) -> None:
        channels = any_timm.image_channels(teacher), any_timm.image_channels(student)
        _check_channels(*channels)
        super().__init__(channels[0], teacher_norm, student_norm, size or any_timm.fixed_size(teacher))
        family = find_family(student)
        self.own_size = any_timm.fixed_size(student) if family is None else family.image_size(student)

    def describe(self) -> list[str]:
        resized = (
            [] if self.size in (None, self.own_size) else [f"images are shown to the teacher at {self.size}"]
        )
        return super().describe() + resized


class TeacherInput(ShownImages):
    """The images of a student, as a teacher of it is shown them.

    It sees them at its own size; `ImageSizes.teacher_size` says how those of another size than the student's own.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, teacher_norm: Normalization, student_norm: Normalization
    ) -> None:
        channels = any_timm.image_channels(teacher), any_timm.image_channels(student)
        _check_channels(*channels)
        super().__init__(channels[0], teacher_norm, student_norm)
        self.sizes = ImageSizes(teacher, student)
        _, own = self.sizes.own_sizes
        self.sizes.grids(own)  # a size that a model does not take is refused at once

    def teacher_size(self, images: tuple[int, int]) -> tuple[int, int]:
        """Height and width at which images of this size are shown."""
        return self.sizes.teacher_size(images)

    def grids(self, images: Tensor, rule: GridRule | None) -> Grids:
        """Return the patch grids of teacher and student for these images.

        Raises `TransferError`: a model does not take images of this size, or the rule refuses the grids.
        """
        size = (images.shape[-2], images.shape[-1])
        grids = self.sizes.grids(size)
        if rule is not None:
            rule.check_batch(grids, size)
        return grids

    def describe(self) -> list[str]:
        teacher, student = self.sizes.own_sizes
        resized = [] if teacher == student else [f"images are resized to {teacher} for the teacher"]
        return super().describe() + resized


def _check_channels(teacher: int, student: int) -> None:
    if teacher != student:
        raise TransferError(
            f"teacher takes {teacher} image channels and student {student}; "
            "set student.model_args.in_chans or teacher.model_args.in_chans so that they agree"
        )


AFTER_BLOCKS = ("norm", "fc_norm", "attn_pool", "head_drop", "head", "head_dist")


class LastAttention(nn.Module):
    """The attention of the last block that is needed, and nothing after it."""

    def __init__(self, norm: nn.Module, host: AttentionHost, recorder: KeepHeads) -> None:
        super().__init__()
        self.norm1 = norm
        self.attn = host
        self.recorder = recorder
        _leave_out(host, host.after_heads)

    def forward(self, x: Tensor, *more: Any, **options: Any) -> Tensor:
        heads = self.attn.attended(self.attn.heads_of(self.norm1(x), *more, **options))
        if self.recorder.keep_output:
            self.recorder(heads)
        else:
            self.recorder.keep(heads)
        return x


class RecordedBlock(nn.Module):
    """A block that puts its output on the tape."""

    def __init__(
        self, block: nn.Module, in_sequence: Callable[[Any], Tensor], layer: int, tape: Tape
    ) -> None:
        super().__init__()
        self.block = block
        self.in_sequence = in_sequence
        self.layer = layer
        self.tape = tape

    def forward(self, *args: Any, **options: Any) -> Any:
        out = self.block(*args, **options)
        self.tape.blocks[self.layer] = self.in_sequence(out)
        return out


class TokensOnly(nn.Module):
    """A truncated model without its final norm, pooling and head, always in eval mode."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        _leave_out(model, AFTER_BLOCKS)
        self.model = model
        self.eval()

    def forward(self, images: Tensor) -> None:
        family_of(self.model).features(self.model, images)

    def train(self, mode: bool = True) -> TokensOnly:
        """Stay in eval mode."""
        return super().train(False)


class WholeModel(nn.Module):
    """A whole teacher of timm, of any architecture, whose results go on the tape; always in eval mode."""

    def __init__(self, model: nn.Module, wanted: Collection[str], tape: Tape) -> None:
        super().__init__()
        self.model = model
        self.wanted = frozenset(wanted)
        self.tape = tape
        self.eval()

    def forward(self, images: Tensor) -> None:
        whole = self.tape.whole
        if not self.wanted:
            family_of(self.model).run_blocks(self.model, images)
            return
        features = run_features(self.model, images)
        if "patches" in self.wanted:
            whole["patches"] = patch_features(self.model, features, (images.shape[-2], images.shape[-1]))
        if "pooled" in self.wanted:
            whole["pooled"] = run_head(self.model, features, pre_logits=True)
        if "classes" in self.wanted:
            whole["classes"] = run_head(self.model, features)

    def train(self, mode: bool = True) -> WholeModel:
        """Stay in eval mode."""
        return super().train(False)


@dataclass(frozen=True)
class Wanted:
    """The parts of a teacher that a step needs. `a | b` has the parts of both."""

    parts: Mapping[int, frozenset[str]] = field(default_factory=dict)
    """Projections to keep, by attention layer."""
    outputs: frozenset[int] = frozenset()
    """Attention layers whose output to keep, before the output projection."""
    blocks: frozenset[int] = frozenset()
    """Blocks whose output to keep."""
    whole: frozenset[str] = frozenset()
    """Results of the whole model: any of `WHOLE`."""

    @classmethod
    def attention(cls, layers: Collection[int], parts: Collection[str], *, output: bool = False) -> Wanted:
        """Return the projections `parts` of attention layers and, with `output`, their output."""
        kept = dict.fromkeys(layers, frozenset(parts))
        return cls(kept, frozenset(layers if output else ()))

    def __or__(self, other: Wanted) -> Wanted:
        layers = {*self.parts, *other.parts}
        none: frozenset[str] = frozenset()
        parts = {
            layer: self.parts.get(layer, none) | other.parts.get(layer, none) for layer in sorted(layers)
        }
        return Wanted(
            parts, self.outputs | other.outputs, self.blocks | other.blocks, self.whole | other.whole
        )

    @property
    def layers(self) -> frozenset[int]:
        """Blocks of which something is kept."""
        return frozenset(self.parts) | self.outputs | self.blocks


WHOLE = ("pooled", "patches", "classes")
"""Results of a whole model: the pooled feature (B, C), features of the patches (B, rows, columns, C) or
(B, N, C), logits (B, classes)."""


def view_teacher(teacher: nn.Module, wanted: Wanted, tape: Tape) -> nn.Module:
    """Return a view that puts what is `wanted` on the tape, and computes nothing beyond."""
    if wanted.whole and not wanted.layers:
        return WholeModel(shallow(teacher), wanted.whole, tape)
    if not family_of(teacher).reads_attention:
        return _watch_outputs(teacher, wanted, tape)
    own = blocks_of(teacher)
    blocks = [_view_block(teacher, block, index, wanted, tape) for index, block in enumerate(own)]
    if wanted.whole:
        twin = family_of(teacher).with_blocks(teacher, blocks, cut=False)
        return WholeModel(twin, wanted.whole, tape)
    last = max(wanted.layers)
    norm = family_of(teacher).attention_input(own[last])
    if last not in wanted.blocks and norm is not None:
        host = attention_of(blocks[last])
        if not host.operator.keep_output:
            host.operator.needs = wanted.parts[last]
        blocks[last] = LastAttention(norm, host, host.operator)
    return truncated(teacher, blocks[: last + 1])


@dataclass(eq=False)
class _KeepBlock:
    """Keeps the output of a block of the teacher."""

    tape: Tape
    layer: int

    def __call__(self, tokens_BNC: Tensor) -> None:
        self.tape.blocks[self.layer] = tokens_BNC


def _watch_outputs(teacher: nn.Module, wanted: Wanted, tape: Tape) -> nn.Module:
    """Return a view of a teacher whose blocks stay as they are."""
    twin, family = shallow(teacher), family_of(teacher)
    for layer in sorted(wanted.blocks):
        family.watch_block(twin, layer, _KeepBlock(tape, layer))
    return WholeModel(twin, wanted.whole, tape)


def view_attention(
    teacher: nn.Module, layers: Collection[int], tape: Tape, parts: Collection[str]
) -> nn.Module:
    """Return a view that records the projections `parts` of `layers`, then stops."""
    return view_teacher(teacher, Wanted.attention(layers, parts), tape)


def _view_block(teacher: nn.Module, block: Block, index: int, wanted: Wanted, tape: Tape) -> nn.Module:
    twin: nn.Module = shallow(block)
    if index in wanted.parts or index in wanted.outputs:
        recorder = KeepHeads(index, tape, keep_output=index in wanted.outputs)
        host = recording_host(teacher, block, recorder)
        twin = shallow(whole_grid(block))
        twin._modules[attention_place(twin)] = host
    if index not in wanted.blocks:
        return twin
    return RecordedBlock(twin, family_of(teacher).sequencer(teacher), index, tape)


def recording_host(teacher: nn.Module, block: Block, operator: Operator) -> AttentionHost:
    """Return a host of a block's attention with an operator that sees what timm's softmax sees."""
    host = native_host(teacher, block)
    if host is attention_of(block):  # the student's own, or a layer that was converted
        return AttentionHost(host, operator)
    host.operator = operator
    return host


def truncated(teacher: nn.Module, blocks: Sequence[nn.Module]) -> TokensOnly:
    """Return the teacher with these blocks alone, its first ones, and without what comes after them."""
    return TokensOnly(family_of(teacher).with_blocks(teacher, blocks, cut=True))


def _leave_out(module: nn.Module, names: Collection[str]) -> None:
    """Put nothing in place of these children, where they are there."""
    for name in names:
        if module._modules.get(name) is not None:
            module._modules[name] = nn.Identity()
