"""Layer plans: the attention operator of each layer.

`"*: linear; 9-11: softmax"` gives every layer linear attention, but the last three of twelve keep softmax.
Before the colon: `*`, layers and ranges (`0,2,9-11`); negative numbers count from the end (`-1`). After the colon: the
operator, with options in parentheses (`linear(feature=relu)`). `keep` means `softmax`. If several entries name a
layer, the last one applies; a layer in no entry keeps softmax.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import ConfigError
from .json_types import Json
from .plain_yaml import YamlError, parse_yaml, write_yaml

KEEP = "softmax"
LAYERS = re.compile(r"(-?\d+)(?:-(-?\d+))?")
CHOICE = re.compile(r"([a-z][a-z0-9_]*)(?:\((.*)\))?")
MAX_VALUE = 200
"""Maximum length of an option's value."""
SYNTAX = "write e.g. '*: linear; 9-11: softmax'"


@dataclass(frozen=True)
class Choice:
    """The operator of one layer and its options."""

    operator: str
    options: Json = field(default_factory=dict)

    def __str__(self) -> str:
        options = ", ".join(f"{key}={_scalar(value)}" for key, value in self.options.items())
        return f"{self.operator}({options})" if options else self.operator


def parse_plan(plan: str | Mapping[Any, str], depth: int) -> tuple[Choice, ...]:
    """Return the choice of each of `depth` layers, from text or from a mapping of layers to operators.

    Raises ConfigError that names the entry: the layer does not exist, or the text is invalid.
    """
    entries = plan.items() if isinstance(plan, Mapping) else _entries(plan)
    choices = [Choice(KEEP)] * depth
    for layers, text in entries:
        choice = _choice(str(text))
        for layer in layer_numbers(str(layers), depth):
            choices[layer] = choice
    return tuple(choices)


def plan_text(choices: tuple[Choice, ...]) -> str:
    """Return the shortest plan for these choices: one entry for each run of equal layers."""
    entries, start = [], 0
    for choice, run in itertools.groupby(choices):
        length = len(list(run))
        last = start + length - 1
        entries.append(f"{start if length == 1 else f'{start}-{last}'}: {choice}")
        start += length
    return f"*: {choices[0]}" if len(entries) == 1 else "; ".join(entries)


def _entries(text: str) -> list[tuple[str, str]]:
    entries = []
    for entry in filter(None, map(str.strip, text.split(";"))):
        layers, colon, choice = entry.partition(":")
        if not colon:
            raise ConfigError(f"plan entry {entry!r} has no colon between layers and operator: {SYNTAX}")
        entries.append((layers, choice))
    if not entries:
        raise ConfigError(f"the plan {text!r} is empty: {SYNTAX}")
    return entries


def layer_numbers(text: str, depth: int, what: str = "plan") -> list[int]:
    """Return the layer numbers of `0,2,9-11`, `-1` or `*`. A ConfigError calls the setting `what`."""
    if text.strip() == "*":
        return list(range(depth))
    layers: list[int] = []
    for part in text.split(","):
        found = LAYERS.fullmatch(part.strip())
        if found is None:
            raise ConfigError(
                f"{what}: {part.strip()!r} is not a layer; write *, 3, 9-11, -1 or several with commas"
            )
        first, last = (_layer(number, depth, what) for number in (found[1], found[2] or found[1]))
        if last < first:
            raise ConfigError(f"{what}: the range {part.strip()!r} is empty in a model of {depth} layers")
        layers += range(first, last + 1)
    return layers


def _layer(number: str, depth: int, what: str) -> int:
    layer = int(number)
    if not -depth <= layer < depth:
        raise ConfigError(f"{what}: there is no layer {layer}; the model has layers 0 to {depth - 1}")
    return layer % depth


def _choice(text: str) -> Choice:
    found = CHOICE.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"plan: {text.strip()!r} is not an operator; {SYNTAX}, or linear(feature=relu)")
    options = dict(_option(entry) for entry in (found[2] or "").split(",") if entry.strip())
    return Choice(KEEP if found[1] == "keep" else found[1], options)


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip().isidentifier():
        raise ConfigError(f"plan: {text.strip()!r} is not an option; write name=value")
    try:
        scalar = parse_yaml(value) if len(value) <= MAX_VALUE else None
    except YamlError:
        scalar = None
    if not isinstance(scalar, (str, int, float)) or (isinstance(scalar, float) and not math.isfinite(scalar)):
        raise ConfigError(f"plan: {text.strip()!r}: a value is a finite number, a name, true or false")
    return name.strip(), scalar


def _scalar(value: Any) -> str:
    return write_yaml(value).partition("\n")[0]
