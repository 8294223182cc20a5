"""The operators of a student's layer that copies from its teacher's, and of the teacher's own; alone, each is plain
softmax attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..attention.base import QKV, Heads
from ..attention.fused import apply_map
from ..attention.softmax import Softmax
from .grids import pick_dim, put_dim
from .tape import Link, Tape, average_heads, spread_heads

Part = Literal["q", "k", "v"]
softmax = Softmax()


@dataclass
class Copy(ABC):
    """An operator that computes with a part of the teacher's attention; plain softmax when no teacher ran."""

    link: Link
    tape: Tape

    @property
    def needs(self) -> Collection[str]:
        return self.taught_needs if self.tape.active else QKV

    @property
    @abstractmethod
    def taught_needs(self) -> Collection[str]:
        """Projections of the student that `taught` uses."""

    def __call__(self, heads: Heads) -> Tensor:
        return self.taught(heads) if self.tape.active else softmax(heads)

    @abstractmethod
    def taught(self, heads: Heads) -> Tensor:
        """Return the layer's attention while the teacher's side is on the tape."""

    @abstractmethod
    def map(self, heads: Heads) -> Tensor:
        """Return the map that `taught` applies, (B, H, N, N): for looking at small images, never in a hot path."""


@dataclass
class CopyMap(Copy):
    """The teacher's map applied to the student's values: softmax(s_t Q_t K_tᵀ) V_s.

    Student heads that are not copied, and student tokens that the teacher does not have, attend by the
    student's own map; only for them are its queries and keys computed.
    """

    @property
    def taught_needs(self) -> Collection[str]:
        return ("v",) if self.link.all_heads and not self.link.tokens.student_only else QKV

    def taught(self, heads: Heads) -> Tensor:
        link, teacher = self.link, self.link.teacher_heads(self.tape)
        values = pick_dim(heads.values(), 1, None if link.all_heads else link.student_index)
        values = spread_heads(link.tokens.student.pick(values, 2), link.sizes)
        copied = average_heads(apply_map(*teacher.qk(), values, teacher.scale, teacher.bias), link.sizes)
        if "q" not in self.taught_needs:
            return copied
        own = softmax(heads)
        return blend(link, copied, own)

    def map(self, heads: Heads) -> Tensor:
        return self.taught(_with_values(heads, _identity(heads)))


@dataclass
class CopyProjection(Copy):
    """The teacher's queries, keys or values in place of the student's; the rest is the student's own."""

    part: Part = "q"

    @property
    def taught_needs(self) -> Collection[str]:
        if self.link.all_heads and not self.link.tokens.student_only:
            return [part for part in QKV if part != self.part]
        return QKV

    def taught(self, heads: Heads) -> Tensor:
        return softmax(self.mixed(heads))

    def map(self, heads: Heads) -> Tensor:
        mixed = self.mixed(heads)
        return softmax(_with_values(mixed, _identity(mixed)))

    def mixed(self, heads: Heads) -> Heads:
        """Return the student's projections with the teacher's in their place."""
        copied = getattr(self.link.teacher_heads(self.tape), self.part)
        own = getattr(heads, self.part)
        mixed = copied if own is None else blend(self.link, copied, own)
        mixed = mixed.to((heads.values() if self.part != "v" else heads.qk()[0]).dtype)
        return Heads(
            q=mixed if self.part == "q" else heads.q,
            k=mixed if self.part == "k" else heads.k,
            v=mixed if self.part == "v" else heads.v,
            bias=heads.bias,
            scale=heads.scale,
            dropout=heads.dropout,
        )


@dataclass(frozen=True)
class CopyKind:
    """What a student can compute with in place of its own."""

    parts: tuple[Part, ...]
    """What the teacher's layer must give."""
    words: str

    @property
    def copies_map(self) -> bool:
        """Whether the student copies the whole map, made of the teacher's queries and keys."""
        return len(self.parts) > 1

    def operator(self, link: Link, tape: Tape) -> Copy:
        """Return the operator of a student's layer."""
        return CopyMap(link, tape) if self.copies_map else CopyProjection(link, tape, part=self.parts[0])


COPIES = {
    "copy": CopyKind(
        ("q", "k"), "the teacher's attention maps in place of the student's, on the student's values"
    ),
    "copy_q": CopyKind(("q",), "the teacher's queries in place of the student's"),
    "copy_k": CopyKind(("k",), "the teacher's keys in place of the student's"),
    "copy_v": CopyKind(("v",), "the teacher's values in place of the student's"),
}
"""By the name of the transfer method that trains such a student."""


def blend(link: Link, copied: Tensor, own: Tensor) -> Tensor:
    """`own` (B, H, N, D) with the heads and tokens that the link covers taken from `copied`."""
    copied = copied.to(own.dtype)
    if link.tokens.student_only:
        picked = pick_dim(own, 1, None if link.all_heads else link.student_index)
        copied = put_dim(copied, picked, 2, link.tokens.student.index(own.shape[2]))
    return copied if link.all_heads else put_dim(copied, own, 1, link.student_index)


def _identity(heads: Heads) -> Tensor:
    """Return values (B, H, N, N) to which a map applied is the map itself."""
    known = heads.known
    eye = torch.eye(known.shape[2], dtype=known.dtype, device=known.device)
    return eye.expand(*known.shape[:2], -1, -1)


def _with_values(heads: Heads, values: Tensor) -> Heads:
    return Heads(heads.q, heads.k, values, heads.bias, heads.scale, geometry=heads.geometry)


@dataclass
class KeepHeads:
    """A teacher operator: keeps the layer's projections, and its output where that is asked for."""

    layer: int
    tape: Tape
    keep_output: bool = False
    needs: Collection[str] = QKV

    def __call__(self, heads: Heads) -> Tensor:
        out = softmax(heads)
        self.keep(heads)
        if self.keep_output:
            self.tape.outputs[self.layer] = heads.joined(out)
        return out

    def keep(self, heads: Heads) -> None:
        self.tape.heads[self.layer] = heads
