"""The table of a pyramid's conversion: for each layer its stage, operator, cost and initial weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..models.layer_plan import DEFORMABLE
from ..transfer.analysis.report.pages import aligned
from .conversion_table import KEPT, STARTS, as_number, as_percent, calibration_note, fit_notes, format_error

if TYPE_CHECKING:
    from torch import nn


def pyramid_table(
    teacher: nn.Module, student: nn.Module, weights: str, calibration: str | None = None
) -> str:
    """Return a table of each layer's operator, new parameters, multiply-adds before and after, and initial weights.

    A merge that the plan made deformable has a row between its stages.
    If `calibration` describes calibration images, add the error of each layer before and after calibration.
    """
    from ..models.converted import choices_of, converted_layers
    from ..models.cost import attention_macs
    from ..models.families import sites
    from ..models.merges import new_merges

    before, after = attention_macs(teacher), attention_macs(student)
    layers, choices, earlier = converted_layers(student), choices_of(student), choices_of(teacher)
    merges, measured = new_merges(teacher, student), calibration is not None
    rows = [
        ["layer", "stage", "operator", "new parameters", "map MACs", "", *(["error"] * measured), "weights"]
    ]
    for site in sites(student):
        merge = merges.pop(site.stage, None)
        if merge is not None:
            place = ["merge", f"{site.stage} > {site.stage + 1}", DEFORMABLE]
            rows.append([*place, f"{_count(merge):,}", "-", "", *(["-"] * measured), "fresh"])
        index, layer = site.index, layers.get(site.index)
        changed = choices[index] != earlier[index]
        new = _count(layer.operator) if layer is not None else 0
        costs = [as_number(before[index]), ""]
        if changed:
            costs = [f"{costs[0]} -> {as_number(after[index])}", as_percent(after[index], before[index])]
        error = format_error(layer)
        start = "-" if layer is None and changed else (STARTS if changed else KEPT)[weights]
        place = [str(index), str(site.stage + 1), str(choices[index])]
        rows.append([*place, f"{new:,}" if new else "-", *costs, *([error] * measured), start])
    note = calibration_note("timm's layer", calibration) if calibration is not None else ""
    note += fit_notes(layers)
    return aligned(rows, right=(0, 1, 3, 5)) + note + _totals(teacher, student, sum(before), sum(after))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _totals(teacher: nn.Module, student: nn.Module, before: int, after: int) -> str:
    from ..models.converted import new_parameters
    from ..models.cost import other_macs

    whole = before + other_macs(teacher), after + other_macs(student)
    counts = [_count(teacher), _count(student)]
    new = sum(parameter.numel() for parameter in new_parameters(student))
    return "\n".join(
        [
            "",
            f"attention maps: {as_number(before)} -> {as_number(after)} MACs an image ({as_percent(after, before)})",
            f"whole model:    {as_number(whole[0])} -> {as_number(whole[1])} MACs ({as_percent(whole[1], whole[0])}), "
            f"{counts[0]:,} -> {counts[1]:,} parameters, {new:,} of them new",
            "",
        ]
    )
