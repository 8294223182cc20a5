"""Copied attention: the teacher's maps, queries, keys or values in place of the student's own (arXiv:2411.09702)."""

from __future__ import annotations

from torch import nn

from ...models.copying.copying_operators import COPIES, Copy
from ...models.copying.tape import Link
from ..loss_config import LossConfig
from .map_loss import LayerMaps, differ, differ_in, mixing, padding
from .method import AttentionMethod, Pairing


class CopyAttention(AttentionMethod):
    """The student computes with what its teacher has just computed."""

    joins_heads = False
    whole_maps = True
    equal_grids = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.kind = COPIES[name]
        self.words, self.parts = self.kind.words, self.kind.parts
        self.head_widths = "any" if self.kind.copies_map else "equal"

    def averages_heads(self, config: LossConfig) -> bool:
        return self.kind.copies_map

    def refuses(self, config: LossConfig, teacher: LayerMaps, student: LayerMaps) -> str | None:
        if teacher.structure.mixed or student.structure.mixed:
            return mixing(teacher, student)
        if teacher.structure != student.structure:
            return f"{differ(teacher, student)}, and a layer copies only from one of the same structure"
        if teacher.structure.padded:
            return padding(teacher, student)
        return None if self.kind.copies_map else differ_in(self.parts[0], teacher, student)

    def operator(self, pairing: Pairing, link: Link, projectors: nn.ModuleDict) -> Copy:
        return self.kind.operator(link, pairing.tape)


METHODS = tuple(CopyAttention(name) for name in COPIES)
