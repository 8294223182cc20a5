"""The table of a conversion: for each layer its operator, its cost and its initial weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..models.plan_syntax import DEFORMABLE
from ..transfer.analysis.report.tables import aligned

if TYPE_CHECKING:
    from torch import nn

    from ..models.conversion import ConvertedAttention


STARTS = {"all": "copied", "mlp": "attention fresh, rest copied", "none": "fresh"}
KEPT = {"all": "copied", "mlp": "copied", "none": "fresh"}


def conversion_table(
    teacher: nn.Module, student: nn.Module, weights: str, calibration: str | None = None
) -> str:
    """Return a table of each layer's operator, new parameters, multiply-adds before and after, and initial weights.

    A merge that the plan made deformable has a row between its stages.
    If `calibration` describes calibration images, add the error of each layer before and after calibration.
    """
    from ..models.converted import choices_of, converted_layers
    from ..models.cost import attention_macs
    from ..models.families import is_pyramid, sites
    from ..models.merges import new_merges

    before, after = attention_macs(teacher), attention_macs(student)
    layers, choices, earlier = converted_layers(student), choices_of(student), choices_of(teacher)
    staged = is_pyramid(student)
    merges, measured = new_merges(teacher, student) if staged else {}, calibration is not None
    stage, error = ["stage"] * staged, ["error"] * measured
    rows = [["layer", *stage, "operator", "new parameters", "map MACs", "", *error, "weights"]]
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
        start = "-" if layer is None and changed else (STARTS if changed else KEPT)[weights]
        place = [str(index), *([str(site.stage + 1)] * staged), str(choices[index])]
        errors = [format_error(layer)] * measured
        rows.append([*place, f"{new:,}" if new else "-", *costs, *errors, start])
    note = calibration_note("timm's layer" if staged else "softmax", str(calibration)) * measured
    right = (0, *([1] * staged), 2 + staged, 4 + staged)
    return (
        aligned(rows, right)
        + note
        + fit_notes(layers)
        + _format_totals(teacher, student, sum(before), sum(after))
    )


def _format_totals(teacher: nn.Module, student: nn.Module, before: int, after: int) -> str:
    from ..models.converted import new_parameters
    from ..models.cost import dense_macs, other_macs
    from ..models.families import is_pyramid

    rest = other_macs if is_pyramid(student) else dense_macs
    whole = before + rest(teacher), after + rest(student)
    new = sum(parameter.numel() for parameter in new_parameters(student))
    return "\n".join(
        [
            "",
            f"attention maps: {as_number(before)} -> {as_number(after)} MACs an image ({as_percent(after, before)})",
            f"whole model:    {as_number(whole[0])} -> {as_number(whole[1])} MACs ({as_percent(whole[1], whole[0])}), "
            f"{_count(teacher):,} -> {_count(student):,} parameters, {new:,} of them new",
            "",
        ]
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def calibration_note(reference: str, calibration: str) -> str:
    """Return the lines below a table that explain its errors."""
    return (
        f"\nerror: of the layer's output against {reference} on {calibration}, before -> after calibration;\n"
        "one number where calibration changed nothing (the error of a fitted operator is that after its fit)\n"
    )


def format_error(layer: ConvertedAttention | None) -> str:
    """Return the error before and after calibration; one number where it is the same."""
    if layer is None or layer.calibration is None:
        return "-"
    before, after = (f"{error:.3f}" for error in layer.calibration)
    return after if before == after else f"{before} -> {after}"


def fit_notes(layers: Mapping[int, ConvertedAttention]) -> str:
    """Return a line for each layer that was fitted, with its measures before and after; none without such layers."""
    found = [f"fit of layer {index}: {layer.fit}\n" for index, layer in layers.items() if layer.fit]
    return "".join(["\n", *found] if found else [])


def as_number(value: int) -> str:
    """Return a number of multiply-adds in three digits and a unit."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(value)


def as_percent(value: int, whole: int) -> str:
    """Return a part of a whole in percent."""
    return f"{100 * value / whole:.0f} %"
