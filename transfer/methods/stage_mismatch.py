"""A model stage by stage, for the report of how teacher and student differ where one of them is a pyramid."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ...models.families import Site, depths, image_size, sites
from ...models.grid_hosts import map_structure


def describe_stages(model: nn.Module) -> dict[str, str]:
    """Return the sizes and the structure of the maps of each stage, in words."""
    found = sites(model)
    return {
        "architecture": type(model).__name__,
        "depth": ", ".join(map(str, depths(model))),
        "width": _by_stage(found, lambda site: str(site.width)),
        "heads": _by_stage(found, lambda site: str(site.num_heads) if site.num_heads else "none"),
        "head width": _by_stage(found, lambda site: str(site.head_dim) if site.num_heads else "none"),
        "grid": _by_stage(found, _grid),
        "attends to": _by_stage(found, lambda site: _maps(model, site)),
    }


def _by_stage(found: list[Site], describe: Callable[[Site], str]) -> str:
    """Join the words for each stage; a stage whose layers differ has several."""
    stages: dict[int, dict[str, None]] = {}
    for site in found:
        stages.setdefault(site.stage, {})[describe(site)] = None
    return ", ".join(" or ".join(words) for words in stages.values())


def _grid(site: Site) -> str:
    return "any" if site.geometry is None else "x".join(map(str, site.geometry.grid))


def _maps(model: nn.Module, site: Site) -> str:
    if not site.num_heads:
        return "none"
    if image_size(model) is None:
        return "unknown"
    return map_structure(model, site).brief
