"""Replace the merges of a pyramid by deformable token merging, as the plan word `merge: deformable` asks."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from .attention.base import Geometry
from .errors import UnsupportedModelError
from .families import family_of, find_family, sites
from .families.site import submodule
from .token_merging import TokenMerging


def merge_deformably(model: nn.Module) -> None:
    """Replace each merge of a pyramid by a new deformable one, in place; those that are deformable stay."""
    family = family_of(model)
    size = family.image_size(model)
    if not family.merges(model):
        raise UnsupportedModelError(
            f"plan: the merges of {type(model).__name__} cannot be deformable: leave merge out"
        )
    widths = list({site.stage: site.width for site in sites(model)}.values())
    for path, before, after in zip(family.merges(model), widths[:-1], widths[1:], strict=True):
        if not isinstance(submodule(model, path), TokenMerging):
            parent, _, name = path.rpartition(".")
            merging = family.merging(before, after).to(next(model.parameters()))
            submodule(model, parent)._modules[name] = merging.train(model.training)
    if size is not None:
        family.resize(model, size)


def merges_deformably(model: nn.Module) -> bool:
    """Return whether the merges of a model are deformable."""
    return bool(merge_layers(model))


def new_merges(before: nn.Module, after: nn.Module) -> dict[int, TokenMerging]:
    """Return the merges that a conversion made deformable, by the stage before which they are (from 0)."""
    paths = family_of(after).merges(after)
    pairs = [(submodule(before, path), submodule(after, path)) for path in paths]
    return {
        stage: new
        for stage, (old, new) in enumerate(pairs, 1)
        if isinstance(new, TokenMerging) and not isinstance(old, TokenMerging)
    }


def unequal_stages(before: nn.Module, after: nn.Module) -> list[tuple[int, Geometry, Geometry]]:
    """Return the stages (from 1) whose tokens deformable merging changed, with their tokens before and after."""
    size = family_of(after).image_size(after)
    if size is None or not merges_deformably(after):
        return []
    found = (family_of(model).geometries(model, size) for model in (before, after))
    return [(stage, old, new) for stage, (old, new) in enumerate(zip(*found, strict=True), 1) if old != new]


def describe_unequal(before: nn.Module, after: nn.Module) -> str:
    """Describe the first stage whose tokens deformable merging changed; empty without one."""
    changed = unequal_stages(before, after)
    if not changed:
        return ""
    stage, *tokens = changed[0]
    old, new = ("{}x{}".format(*each.grid) for each in tokens)
    return (
        f"stage {stage} has {new} tokens instead of {old}, because a deformable merge leaves out the last row or "
        "column of an odd grid"
    )


def check_equal_stages(before: nn.Module, after: nn.Module, stages: Collection[int]) -> None:
    """Raise UnsupportedModelError if deformable merging changed the tokens of one of these stages (from 0)."""
    why = describe_unequal(before, after)
    if any(stage - 1 in stages for stage, *_ in unequal_stages(before, after)):
        raise UnsupportedModelError(
            f"{why}, so layers cannot be calibrated on the inputs of the original ones: leave --calibrate out, or give "
            "an --img_size whose grids are even up to the last stage"
        )


def merge_layers(model: nn.Module) -> list[TokenMerging]:
    """Return the deformable merges of a model in order."""
    return list(deformable_merges(model).values())


def deformable_merges(model: nn.Module) -> dict[str, TokenMerging]:
    """Return the deformable merges of a model by the names of the modules, in order."""
    family = find_family(model)
    found = {path: submodule(model, path) for path in (family.merges(model) if family else ())}
    return {path: each for path, each in found.items() if isinstance(each, TokenMerging)}
