"""Which layers and heads of a teacher stand beside those of its student, and how far apart the two are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ....checkpoints.provenance import Pretrained
from ....models.copying.tape import HeadMap, Link
from ....models.errors import GraftError, Json
from ....models.families import depths
from ...loss_config import LossConfig, TransferConfig
from ...methods.pairs import resolve_layers, resolve_plan
from ...methods.registry import find_method
from ...mode_config import MODE_FACTS
from ..layer_maps import KeyPlaces, layer_maps, map_divergence
from . import map_figures as measures
from .map_figures import LayerLook, Look

TRANSFERS = [name for name, facts in MODE_FACTS.items() if facts.transfers]


@dataclass(frozen=True)
class Partner:
    """A layer of the teacher that stands beside a layer of the student."""

    layer: int
    heads: HeadMap | None = None
    """The teacher's heads of each head of the student; None where nothing says which."""


@dataclass(frozen=True)
class Partners:
    """The teacher's layer beside each layer of the student, by the student's number; a layer may have none."""

    of: Mapping[int, Partner]
    words: str
    """Why these, in a sentence."""

    def beside(self, teacher: Look, student: Look) -> Look:
        """Return the teacher's layers in the order of the student's; one without maps in place of a missing one."""
        layers = []
        for index, own in enumerate(student.layers):
            partner = self.of.get(index)
            if partner is None:
                layers.append(LayerLook(own.stage, own.layout, None, KeyPlaces(own.layout.geometry)))
                continue
            groups = None if partner.heads is None else partner.heads.groups
            layers.append(replace(teacher.layers[partner.layer], number=partner.layer, groups=groups))
        return Look(layers, teacher.merges)

    def numbers(self, depth: int) -> list[int | None]:
        """Return the teacher's layer of each of the student's `depth` layers."""
        return [self.of[index].layer if index in self.of else None for index in range(depth)]


def pair_layers(teacher: nn.Module, student: Pretrained) -> Partners:
    """Return the pairs of the run that trained the student, else those at the same relative depth.

    The pairs of a run are those of its first loss that reads layers. They are at the same relative depth, too, where
    they do not fit this teacher, and the words say why.
    """
    why, settings = "", _read_loss(student.provenance)
    if settings is not None:
        try:
            plan = resolve_plan(settings, teacher, student.model)
            return partners_of(plan.links, settings, matched=not plan.needs_calibration)
        except GraftError as error:
            why = f" The pairs of the run do not fit this teacher: {error}."
    own = depths(teacher), depths(student.model)
    found = {pair.student: Partner(pair.teacher) for pair in resolve_layers("all", *own)}
    where = "with equal numbers" if own[0] == own[1] else "at the same relative depth"
    return Partners(found, f"Layers {where} are beside each other.{why}")


def partners_of(links: Sequence[Link], settings: LossConfig, *, matched: bool = True) -> Partners:
    """Return the pairs of a loss; without their heads where they are not `matched`, or where it reads no heads."""
    reads = matched and find_method(settings.method).uses_heads
    found = {
        link.pair.student: Partner(link.pair.teacher, link.heads if reads and _of_all(link) else None)
        for link in links
    }
    words = f"Each layer is beside that which it learned from (transfer.method={settings.method})."
    return Partners(found, words)


def _of_all(link: Link) -> bool:
    """Whether a link's heads are those of its two layers: methods that join heads have another count."""
    return (link.heads.teacher_heads, len(link.heads.groups)) == (
        link.teacher.num_heads,
        link.student.num_heads,
    )


def _read_loss(provenance: Json) -> LossConfig | None:
    """Return the first loss of a student's recipe that reads layers; None where none is known."""
    recipe = provenance.get("recipe")
    if not isinstance(recipe, Mapping) or recipe.get("mode") not in TRANSFERS:
        return None
    settings: Json = recipe.get("transfer") or {}
    try:
        terms = TransferConfig(**settings).terms
        return next((each for each in terms if find_method(each.method).uses_layers), None)
    except (ValidationError, TypeError, GraftError):  # of another version, or a method of another package
        return None


# How far apart: on one grid, because a map is compared token by token.


def on_grids(model: nn.Module, image: Tensor, teacher: Look, student: Look) -> list[LayerLook | None]:
    """Return the teacher's layers, which are in the student's order, on the student's grids.

    Where grids differ, the map is that of queries and keys that are interpolated as in a transfer with
    `transfer.interpolate_grid`. None where a layer has no partner, or a map that cannot be interpolated.
    """
    pairs = list(zip(teacher.layers, student.layers, strict=True))
    wanted: dict[tuple[int, int], set[int]] = {}
    for theirs, own in pairs:
        if theirs.number is not None and theirs.layout.grid != own.layout.grid:
            wanted.setdefault(own.layout.grid, set()).add(theirs.number)
    maps = {grid: layer_maps(model, image, sorted(layers), grid=grid) for grid, layers in wanted.items()}
    found: list[LayerLook | None] = []
    for theirs, own in pairs:
        if theirs.number is None or theirs.layout.grid == own.layout.grid:
            found.append(None if theirs.number is None else theirs)
            continue
        seen, layout = maps[own.layout.grid].get(theirs.number), replace(theirs.layout, grid=own.layout.grid)
        places = KeyPlaces(layout.geometry)
        found.append(
            None
            if seen is None
            else replace(theirs, layout=layout, maps=seen.weights[0].cpu(), places=places)
        )
    return found


def divergence(teacher: Sequence[LayerLook | None], student: Look) -> list[float | None]:
    """Return the Jensen-Shannon divergence of the shares by layer, in nats, from the teacher's layer on the same grid.

    A head is compared with the mean of its teacher's heads; where nothing says which, unequal heads are matched. Where
    prefix tokens differ, of what patches take from patches. None where a layer has no attention or no partner.
    """
    pairs = zip(teacher, student.layers, strict=True)
    return [None if theirs is None else _divergence(theirs, ours) for theirs, ours in pairs]


def _divergence(teacher: LayerLook, student: LayerLook) -> float | None:
    alike = teacher.layout == student.layout
    theirs, ours = (
        each.shares_of_tokens(0 if alike else each.layout.num_prefix) for each in (teacher, student)
    )
    if theirs is None or ours is None:
        return None
    if teacher.groups is None:
        return map_divergence(theirs[None], ours[None], match_heads=teacher.heads != student.heads)
    learned = [(head, group) for head, group in enumerate(teacher.groups) if group is not None]
    targets = torch.stack([theirs[list(group)].mean(0) for _, group in learned])
    return map_divergence(targets[None], ours[[head for head, _ in learned]][None])


def cka(teacher: Sequence[Sequence[Tensor]], student: Sequence[Sequence[Tensor]]) -> list[float | None]:
    """Return the linear CKA of the patch tokens (P, C) of each image and layer; a sample is a patch.

    None where a layer has no tokens of as many patches.
    """
    by_layer = zip(zip(*teacher, strict=True), zip(*student, strict=True), strict=True)
    both = [(torch.cat(theirs), torch.cat(ours)) for theirs, ours in by_layer]
    return [measures.linear_cka(*each) if len(each[0]) == len(each[1]) else None for each in both]


def compared(teacher: Look, student: Look, on_grid: Sequence[LayerLook | None]) -> list[str]:
    """Say in sentences what of the layers could not be compared as it is."""
    alone = [str(index) for index, each in enumerate(teacher.layers) if each.number is None]
    said = [f"Layers without a partner are shown alone: {', '.join(alone)}."] if alone else []
    other = [
        (theirs.layout.grid, own.layout.grid, seen)
        for theirs, own, seen in zip(teacher.layers, student.layers, on_grid, strict=True)
        if theirs.number is not None and theirs.layout.grid != own.layout.grid
    ]
    if not other:
        return said
    theirs, ours = ("x".join(map(str, grid)) for grid in other[0][:2])
    lost = "" if all(seen for *_, seen in other) else (
        " It is left out of layers whose maps are not of queries and keys of all tokens, or have a bias."
    )  # fmt: skip
    return [
        *said,
        f"The teacher has {theirs} patches and the student {ours}. The JS divergence is from the teacher's map with "
        f"queries and keys interpolated to the student's grid, as transfer.interpolate_grid does it.{lost} CKA is left "
        "out: it compares patch by patch.",
    ]
