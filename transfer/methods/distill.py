"""Distilled attention: maps, queries, keys or values are pulled to the teacher's (arXiv:2411.09702)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from ...models.attention.base import Heads
from ...models.attention.fused import attention_with_lse
from ...models.copying.copying_operators import Part, Taught, softmax
from ...models.copying.links import Link
from ...models.copying.tokens import pick_dim
from ..config import TransferConfig
from .map_loss import MapLoss
from .method import AttentionMethod, Pairing, joined_projector
from .outputs import squared_error


class DistillMaps(AttentionMethod):
    """A loss between attention maps, of which none is formed."""

    name = "distill"
    words = "{loss} between the student's attention maps and the teacher's"
    joins_heads = False
    head_widths: Literal["any"] = "any"
    whole_maps = True
    temperature = True

    def averages_heads(self, config: TransferConfig) -> bool:
        return config.loss == "ce"

    def operator(self, pairing: Pairing, link: Link, projectors: nn.ModuleDict) -> Taught:
        config = pairing.config
        loss = MapLoss(config.loss == "kl", config.temperature, config.rows)
        return DistillMap(link, pairing.tape, loss=loss)


class DistillPart(AttentionMethod):
    """The mean squared error of queries, keys or values."""

    def __init__(self, part: Part, words: str) -> None:
        self.name, self.parts = f"distill_{part}", (part,)
        self.words = f"mean squared error between the student's {words} and the teacher's"

    def operator(self, pairing: Pairing, link: Link, projectors: nn.ModuleDict) -> Taught:
        (part,) = self.parts
        learned = joined_projector(pairing, link, projectors)
        return DistillProjection(link, pairing.tape, part=part, projector=learned)


@dataclass
class DistillMap(Taught):
    """The student's own attention, and the cross-entropy of its map to the teacher's."""

    loss: MapLoss = field(default_factory=MapLoss)

    def taught(self, heads: Heads) -> Tensor:
        link, teacher = self.link, self.link.teacher_heads(self.tape)
        lse = None
        if self.loss.needs_own_rows or not link.tokens.student.whole:
            out = softmax(heads)
        else:
            out, lse = attention_with_lse(*heads.qkv(), heads.scale, heads.bias)
            lse = pick_dim(lse, 1, None if link.all_heads else link.student_index)
        self.record(
            self.loss(
                link.matched_student(heads),
                teacher,
                sizes=link.sizes,
                num_prefix=link.num_prefix,
                lse_BHN=lse,
            )
        )
        return out


@dataclass
class DistillProjection(Taught):
    """The student's own attention, and the mean squared error of its queries, keys or values to the teacher's."""

    part: Part = "q"
    projector: nn.Module | None = None

    def taught(self, heads: Heads) -> Tensor:
        teacher = getattr(self.link.teacher_heads(self.tape), self.part)
        student = getattr(self.link.matched_student(heads), self.part)
        self.record(squared_error(student, teacher, self.projector))
        return softmax(heads)


METHODS = (DistillMaps(), DistillPart("q", "queries"), DistillPart("k", "keys"), DistillPart("v", "values"))
