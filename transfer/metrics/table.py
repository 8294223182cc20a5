"""What was measured of models, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping

from .intervals import Interval, intervals_of

Numbers = Mapping[str, float]
COLUMNS = {
    "top1": ("top-1 % [95 % interval]", "7.2f"),
    "top5": ("top-5 %", "7.2f"),
    "loss": ("  loss", "6.4f"),
    "knn_top1": ("kNN top-1 % [95 % interval]", "11.2f"),
    "probe_top1": ("probe top-1 % [95 % interval]", "13.2f"),
    "relative_error": ("relative error", "14.4f"),
    "cosine": ("cosine", "6.4f"),
    "cka": ("   CKA", "6.4f"),
    "samples": ("images", "6.0f"),
}
LAYER = "_layer"


def to_table(results: Mapping[str, Numbers]) -> str:
    """Return the results as a Markdown table, and another one by layer for each model that was measured so."""
    tables = [_table("model", results)]
    for name, numbers in results.items():
        layers = by_layer(numbers)
        if layers:
            tables.append(f"{name}, by layer:\n\n{_table('layer', layers)}")
    return "\n\n".join(tables)


def to_json(results: Mapping[str, Numbers]) -> str:
    """Return the results as a JSON object of objects."""
    return json.dumps({name: _with_intervals(numbers) for name, numbers in results.items()}, indent=2)


def _with_intervals(numbers: Numbers) -> dict[str, float | Interval]:
    return {**numbers, **{f"{name}_interval": found for name, found in intervals_of(numbers).items()}}


def by_layer(numbers: Numbers) -> dict[str, dict[str, float]]:
    """Group `cka_layer03` and the like by layer: {"03": {"cka": …}}."""
    layers: dict[str, dict[str, float]] = {}
    for key, value in numbers.items():
        metric, found, layer = key.partition(LAYER)
        if found:
            layers.setdefault(layer, {})[metric] = value
    return layers


def _cell(key: str, numbers: Numbers) -> str:
    if key not in numbers:
        return ""
    low, high = intervals_of(numbers).get(key, (None, None))
    return format(numbers[key], COLUMNS[key][1]) + ("" if low is None else f" [{low:.1f}, {high:.1f}]")


def _table(title: str, rows: Mapping[str, Numbers]) -> str:
    shown = [key for key in COLUMNS if any(key in numbers for numbers in rows.values())]
    width = max(len(title), *(len(name) for name in rows)) if rows else len(title)
    heads = [COLUMNS[key][0] for key in shown]
    lines = [
        f"| {title:<{width}} | {' | '.join(heads)} |",
        f"| {'-' * width} | {' | '.join('-' * (len(head) - 1) + ':' for head in heads)} |",
    ]
    for name, numbers in rows.items():
        cells = [f"{_cell(key, numbers):>{len(COLUMNS[key][0])}}" for key in shown]
        lines.append(f"| {name:<{width}} | {' | '.join(cells)} |")
    return "\n".join(lines)
