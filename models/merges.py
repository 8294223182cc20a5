"""Replace the merges of a pyramid by deformable token merging, as the plan word `merge: deformable` asks."""

from __future__ import annotations

from torch import nn

from .families import family_of, is_pyramid, sites
from .families.site import submodule
from .token_merging import TokenMerging


def merge_deformably(model: nn.Module) -> None:
    """Replace each merge of a pyramid by a new deformable one, in place; those that are deformable stay."""
    family = family_of(model)
    size = family.image_size(model)
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
    return is_pyramid(model) and any(merge_layers(model))


def merge_layers(model: nn.Module) -> list[TokenMerging]:
    """Return the deformable merges of a model in order."""
    return list(deformable_merges(model).values())


def deformable_merges(model: nn.Module) -> dict[str, TokenMerging]:
    """Return the deformable merges of a model by the names of the modules, in order."""
    found = {path: submodule(model, path) for path in family_of(model).merges(model)}
    return {path: each for path, each in found.items() if isinstance(each, TokenMerging)}
