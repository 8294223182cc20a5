"""What the attention of a layer computes, and how that of two layers differs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ...models.copying.copying_operators import Part
from ...models.families import Site
from ...models.grid_hosts import has_cosine_logits, map_structure
from ...models.map_structure import MapStructure

WHOLE = str(MapStructure())


@dataclass(frozen=True)
class LayerMaps:
    """What the attention of a layer computes, for methods that read more than its output."""

    structure: MapStructure
    has_cosine_logits: bool

    @classmethod
    def of(cls, model: nn.Module, site: Site) -> LayerMaps:
        """Read a layer that has attention."""
        return cls(map_structure(model, site), has_cosine_logits(model, site))


def differ(teacher: LayerMaps, student: LayerMaps) -> str:
    """Say how the maps of two layers lie."""
    return f"the teacher's maps are {teacher.structure} and the student's {student.structure}"


def differ_in(part: Part, teacher: LayerMaps, student: LayerMaps) -> str | None:
    """Say why the queries, keys or values of two layers do not mean the same; None where they do."""
    if part != "v" and teacher.has_cosine_logits != student.has_cosine_logits:
        owners = ("teacher", "student") if teacher.has_cosine_logits else ("student", "teacher")
        return f"the {owners[0]} takes its softmax over cosines of queries and keys, and the {owners[1]} does not"
    if part != "q" and teacher.structure.reduction != student.structure.reduction:
        return f"{differ(teacher, student)}, so their keys and values are not of the same tokens"
    return None
