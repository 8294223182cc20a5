"""The table of a conversion: for each layer its operator, its cost and its initial weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..transfer.analysis.report.tables import aligned

if TYPE_CHECKING:
    from torch import nn


STARTS = {"all": "copied", "mlp": "attention fresh, rest copied", "none": "fresh"}
KEPT = {"all": "copied", "mlp": "copied", "none": "fresh"}


def conversion_table(student: nn.Module, weights: str, calibration: str | None = None) -> str:
    """Return a table of each layer's operator, new parameters, multiply-adds before and after, and initial weights.

    If `calibration` describes calibration images, add the error of each layer before and after calibration.
    """
    from ..models.conversion import converted_layers, layer_macs
    from ..models.families import attention_blocks

    softmax, own = layer_macs(student)
    layers = converted_layers(student)
    measured = calibration is not None
    rows = [["layer", "operator", "new parameters", "map MACs", "", *(["error"] * measured), "weights"]]
    for index in range(len(attention_blocks(student))):
        layer = layers.get(index)
        if layer is None:
            costs, error = [_number(softmax), ""], "-"
            rows.append([str(index), "softmax", "-", *costs, *([error] * measured), KEPT[weights]])
            continue
        error = "{:.3f} -> {:.3f}".format(*layer.calibration) if layer.calibration else "-"
        costs = [f"{_number(softmax)} -> {_number(own[index])}", f"{_percent(own[index], softmax)}"]
        new = sum(parameter.numel() for parameter in layer.operator.parameters())
        rows.append(
            [str(index), str(layer.choice), f"{new:,}", *costs, *([error] * measured), STARTS[weights]]
        )
    note = f"\nerror: of the layer's output against softmax, before and after calibration on {calibration}\n"
    return aligned(rows, right=(0, 2, 4)) + note * measured + _totals(student, softmax, own)


def _totals(student: nn.Module, softmax: int, own: dict[int, int]) -> str:
    from ..models.conversion import new_parameters
    from ..models.cost import dense_macs
    from ..models.families import attention_blocks

    count, rest = len(attention_blocks(student)), dense_macs(student)
    before, after = count * softmax, (count - len(own)) * softmax + sum(own.values())
    new = sum(parameter.numel() for parameter in new_parameters(student))
    whole = sum(parameter.numel() for parameter in student.parameters())
    return "\n".join(
        [
            "",
            f"attention maps: {_number(before)} -> {_number(after)} MACs an image ({_percent(after, before)})",
            f"whole model:    {_number(rest + before)} -> {_number(rest + after)} MACs "
            f"({_percent(rest + after, rest + before)}), {whole:,} parameters, {new:,} of them new",
            "",
        ]
    )


def _number(value: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(value)


def _percent(value: int, whole: int) -> str:
    return f"{100 * value / whole:.0f} %"
