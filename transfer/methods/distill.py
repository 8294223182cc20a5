"""Distilled attention: maps, queries, keys or values are pulled to the teacher's (arXiv:2411.09702)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from ...models.attention.base import Heads
from ...models.copying.copying_operators import Part
from ...models.copying.grids import pick_dim
from ...models.copying.tape import Link
from ..loss_config import LossConfig
from .map_loss import WHOLE, LayerMaps, MapLoss, differ, differ_in, mixing, padding
from .method import AttentionMethod, Pairing, joined_projector, squared_error
from .taught_layer import Observer


class DistillMaps(AttentionMethod):
    """A loss between attention maps, of which none is formed."""

    name = "distill"
    words = "{loss} between the student's attention maps and the teacher's"
    joins_heads = False
    head_widths: Literal["any"] = "any"
    whole_maps = True

    def averages_heads(self, config: LossConfig) -> bool:
        return config.loss == "ce"

    def refuses(self, config: LossConfig, teacher: LayerMaps, student: LayerMaps) -> str | None:
        t, s = teacher.structure, student.structure
        if t.mixed or s.mixed:
            return mixing(teacher, student)
        if t != s and (t.is_whole or t.reduction is not None or not s.is_whole):
            return f"{differ(teacher, student)}, and only maps within windows are distilled into others: maps {WHOLE}"
        if t.padded or s.padded:
            return padding(teacher, student)
        if t.window is not None and config.rows < 1:
            return f"transfer.rows={config.rows:g} is for maps {WHOLE}, and the teacher has maps {t}"
        return None

    def operator(self, pairing: Pairing, link: Link, projectors: nn.ModuleDict) -> Observer:
        config = pairing.config
        loss = MapLoss(config.loss == "kl", config.temperature, config.rows)
        return DistillMap(link, pairing.tape, pairing.loss_name(link), loss=loss)


class DistillPart(AttentionMethod):
    """The mean squared error of queries, keys or values."""

    def __init__(self, part: Part, words: str) -> None:
        self.name, self.parts = f"distill_{part}", (part,)
        self.words = f"mean squared error between the student's {words} and the teacher's"

    def refuses(self, config: LossConfig, teacher: LayerMaps, student: LayerMaps) -> str | None:
        (part,) = self.parts
        return differ_in(part, teacher, student)

    def operator(self, pairing: Pairing, link: Link, projectors: nn.ModuleDict) -> Observer:
        (part,) = self.parts
        learned = joined_projector(pairing, link, projectors)
        return DistillProjection(link, pairing.tape, pairing.loss_name(link), part=part, projector=learned)


@dataclass
class DistillMap(Observer):
    """The cross-entropy of the student's map to the teacher's."""

    loss: MapLoss = field(default_factory=MapLoss)

    @property
    def needs_lse(self) -> bool:
        return not self.loss.needs_own_rows and self.link.tokens.student.whole

    def look(self, heads: Heads | None, out_BHND: Tensor, lse_BHN: Tensor | None) -> None:
        assert heads is not None
        link = self.link
        if self.needs_lse and lse_BHN is not None:
            lse_BHN = pick_dim(lse_BHN, 1, None if link.all_heads else link.student_index)
        else:  # of other rows, or of other tokens
            lse_BHN = None
        self.record(
            self.loss(
                link.matched_student(heads),
                link.teacher_heads(self.tape),
                sizes=link.sizes,
                num_prefix=link.num_prefix,
                lse_BHN=lse_BHN,
            )
        )


@dataclass
class DistillProjection(Observer):
    """The mean squared error of the student's queries, keys or values to the teacher's."""

    part: Part = "q"
    projector: nn.Module | None = None

    def look(self, heads: Heads | None, out_BHND: Tensor, lse_BHN: Tensor | None) -> None:
        assert heads is not None
        teacher, student = (
            each.joined(getattr(each, self.part))
            for each in (self.link.teacher_heads(self.tape), self.link.matched_student(heads))
        )
        self.record(squared_error(student, teacher, self.projector))


METHODS = (DistillMaps(), DistillPart("q", "queries"), DistillPart("k", "keys"), DistillPart("v", "values"))
