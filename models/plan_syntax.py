"""The text of a layer plan: the attention operator of each layer. No torch here, so that a mistake is refused at once.

`"*: linear; 9-11: softmax"` gives every layer linear attention, but the last three of twelve keep softmax.
Before the colon: `*`, layers and ranges (`0,2,9-11`); negative numbers count from the end (`-1`). In a pyramid layers
are numbered through all stages; `stage2` and `stage2-4` (from 1, as papers count) name all layers of stages, and
`stage3.0-1` layers of one. After the colon: the operator, with options in parentheses (`linear(feature=relu)`). If
several entries name a layer, the last one applies; a layer in no entry is kept.

`keep` is the layer as it is, `softmax` is softmax over all tokens, and `none` is no attention. A plain vision
transformer already has softmax over all tokens, so `keep` means `softmax` there.

In a pyramid the entry `merge: deformable` replaces the parts that merge tokens between stages (`token_merging.py`);
`merge: keep` leaves them as they are.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import ConfigError, Json, JsonDict, check_types, did_you_mean
from .plain_yaml import YamlError, parse_yaml, write_yaml

KEEP = "softmax"
"""The operator of a layer that a plain vision transformer keeps."""
AS_IT_IS, NONE = "keep", "none"
"""The words for layers of pyramids that are left as they are, and that lose their attention."""
MERGE = "merge"
"""The word before the colon for the merges between the stages of a pyramid."""
DEFORMABLE = "deformable"
LAYERS = re.compile(r"(-?\d+)(?:-(-?\d+))?")
STAGE = re.compile(r"stage(\d+)(?:\.(\d+)(?:-(\d+))?)?")
STAGES = re.compile(r"stage(\d+)-(\d+)")
NAME = re.compile(r"[a-z][a-z0-9_]*")
"""Of an operator and of a transfer method."""
CHOICE = re.compile(rf"({NAME.pattern})(?:\((.*)\))?")
MAX_VALUE = 400
"""Maximum length of an option's value, the longest being the text of a program."""
SYNTAX = "write e.g. '*: linear; 9-11: softmax'"


@dataclass(frozen=True)
class Choice:
    """The operator of one layer and its options."""

    operator: str
    options: Json = field(default_factory=dict)

    def __str__(self) -> str:
        options = ", ".join(f"{key}={_scalar(value)}" for key, value in self.options.items())
        return f"{self.operator}({options})" if options else self.operator


@check_types()
def parse_plan(plan: str | Mapping[Any, str], depth: int | Sequence[int]) -> tuple[Choice, ...]:
    """Return the choice of each layer, from text or from a mapping of layers to operators.

    Args:
        plan: text, `*: linear; 9-11: softmax`, or a mapping, `{0: "linear"}`.
        depth: number of layers of a plain vision transformer, or those of each stage of a pyramid.

    Raises:
        ConfigError: the layer does not exist, or the text is invalid.
    """
    merge_of_plan(plan, depth)
    entries = [entry for entry in _items(plan) if entry[0].strip() != MERGE]
    kept = KEEP if isinstance(depth, int) else AS_IT_IS
    choices = [Choice(kept)] * (depth if isinstance(depth, int) else sum(depth))
    for layers, text in entries:
        choice = parse_choice(text, kept)
        for layer in layer_numbers(layers, depth):
            choices[layer] = choice
    return tuple(choices)


def operators_in(plan: str) -> set[str]:
    """Return the names of the operators in the text of a plan. Raises ConfigError: the text is invalid."""
    return {parse_choice(text).operator for layers, text in _items(plan) if layers.strip() != MERGE}


def merge_of_plan(plan: str | Mapping[Any, str], depth: int | Sequence[int]) -> str:
    """Return what a plan does with merges, "keep" or "deformable".

    Raises ConfigError: another word, or a plain vision transformer, which has no merges.
    """
    word = AS_IT_IS
    for layers, text in _items(plan):
        if layers.strip() != MERGE:
            continue
        word = text.strip()
        if isinstance(depth, int):
            raise ConfigError(
                f"plan: 'merge: {word}' is for pyramids; a plain vision transformer merges no tokens"
            )
        if word not in (AS_IT_IS, DEFORMABLE):
            raise ConfigError(f"plan: 'merge: {word}'; {did_you_mean(word, (DEFORMABLE, AS_IT_IS))}")
    return word


def plan_text(choices: tuple[Choice, ...], merge: str = AS_IT_IS) -> str:
    """Return the shortest plan for these choices: one entry for each run of equal layers."""
    entries, start = [], 0
    for choice, run in itertools.groupby(choices):
        length = len(list(run))
        last = start + length - 1
        entries.append(f"{start if length == 1 else f'{start}-{last}'}: {choice}")
        start += length
    if len(entries) == 1:
        entries = [f"*: {choices[0]}"]
    return "; ".join(entries if merge == AS_IT_IS else [*entries, f"{MERGE}: {merge}"])


def _items(plan: str | Mapping[Any, str]) -> list[tuple[str, str]]:
    if isinstance(plan, Mapping):
        return [(str(layers), str(text)) for layers, text in plan.items()]
    return _entries(plan)


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


def layer_numbers(text: str, depth: int | Sequence[int], what: str = "plan") -> list[int]:
    """Return the layer numbers of `0,2,9-11`, `-1`, `*`, or of a pyramid `stage2` or `stage2-4`.

    `depth` is as in `parse_plan`. A ConfigError calls the setting `what`.
    """
    stages = [] if isinstance(depth, int) else list(depth)
    depth = depth if isinstance(depth, int) else sum(depth)
    if text.strip() == "*":
        return list(range(depth))
    layers: list[int] = []
    for part in text.split(","):
        several = STAGES.fullmatch(part.strip()) if stages else None
        if several is not None:
            layers += _layers_of_stages(several, stages, what)
            continue
        named = STAGE.fullmatch(part.strip()) if stages else None
        if named is not None:
            layers += _layers_of_stage(named, stages, what)
            continue
        found = LAYERS.fullmatch(part.strip())
        if found is None:
            also = ", stage2, stage2-4, stage3.0-1" if stages else ""
            also += f", {MERGE}" if stages and what == "plan" else ""
            raise ConfigError(
                f"{what}: {part.strip()!r} is not a layer; write *, 3, 9-11, -1{also} or several with commas"
            )
        first, last = (_layer(number, depth, what) for number in (found[1], found[2] or found[1]))
        if last < first:
            raise ConfigError(f"{what}: the range {part.strip()!r} is empty in a model of {depth} layers")
        layers += range(first, last + 1)
    return layers


def _layers_of_stages(found: re.Match[str], stages: Sequence[int], what: str) -> range:
    """Return the layers of `stage2-4`."""
    first, last = int(found[1]), int(found[2])
    if not 1 <= first <= last <= len(stages):
        raise ConfigError(
            f"{what}: {found[0]!r} is no range of stages; the model has stages 1 to {len(stages)}"
        )
    return range(sum(stages[: first - 1]), sum(stages[:last]))


def _layers_of_stage(found: re.Match[str], stages: Sequence[int], what: str) -> range:
    """Return the layers of `stage2` or `stage3.0-1`."""
    stage, first, last = int(found[1]), found[2], found[3] or found[2]
    if not 1 <= stage <= len(stages):
        raise ConfigError(f"{what}: there is no stage {stage}; the model has stages 1 to {len(stages)}")
    start, size = sum(stages[: stage - 1]), stages[stage - 1]
    if not size:
        raise ConfigError(f"{what}: stage {stage} of the model has no layer with attention to replace")
    begin, end = (0, size - 1) if first is None else (int(first), int(last))
    if not begin <= end < size:
        raise ConfigError(
            f"{what}: {found[0]!r} has no layers; stage {stage} of the model has layers 0 to {size - 1}"
        )
    return range(start + begin, start + end + 1)


def _layer(number: str, depth: int, what: str) -> int:
    layer = int(number)
    if not -depth <= layer < depth:
        raise ConfigError(f"{what}: there is no layer {layer}; the model has layers 0 to {depth - 1}")
    return layer % depth


def parse_choice(text: str, kept: str = KEEP) -> Choice:
    """Return the operator and the options of `linear(feature=relu)`. Raises ConfigError: the text is invalid."""
    found = CHOICE.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"plan: {text.strip()!r} is not an operator; {SYNTAX}, or linear(feature=relu)")
    options: JsonDict = {}
    for entry in filter(str.strip, (found[2] or "").split(",")):
        name, value = _option(entry)
        if name in options:
            raise ConfigError(f"plan: {text.strip()!r} gives {name} twice")
        options[name] = value
    return Choice(kept if found[1] == AS_IT_IS else found[1], options)


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip().isidentifier():
        hint = "; a comma ends an option: separate operands by a space" if re.search(r"[()]", text) else ""
        raise ConfigError(f"plan: {text.strip()!r} is not an option; write name=value{hint}")
    try:
        scalar = parse_yaml(value) if len(value) <= MAX_VALUE else None
    except YamlError:
        scalar = None
    if not isinstance(scalar, (str, int, float)) or (isinstance(scalar, float) and not math.isfinite(scalar)):
        raise ConfigError(f"plan: {text.strip()!r}: a value is a finite number, a name, true or false")
    if _has_comment(value, scalar):
        raise ConfigError(
            f"plan: {text.strip()!r}: what follows # would be lost; leave it out, or quote the value"
        )
    return name.strip(), scalar


def _has_comment(text: str, scalar: Any) -> bool:
    """Return whether YAML reads a part of `text` as a comment: without it, the value is the same."""
    for found in re.finditer(r"\s#", text):
        try:
            if parse_yaml(text[: found.start()]) == scalar:
                return True
        except YamlError:
            continue  # this # is within quotes
    return False


def _scalar(value: Any) -> str:
    return write_yaml(value).partition("\n")[0]
