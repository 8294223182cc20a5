"""Decide which keys may be missing or unexpected when weights are loaded, and say in words what loading did."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ..models.errors import escaped

Role = Literal["teacher", "init"]
"""A teacher is used as it is; initial weights may leave a fresh head and a fresh final norm to training."""

NOT_NEEDED = (
    (r"mask_token|decoder_\w+(\..*)?|decoder\..*", "the decoder of masked autoencoding"),
    (r".*relative_position_index|.*rope.*\.(periods|bands|pos_embed.*)|.*attn_mask", "timm computes it"),
    (r"pre_logits\..*", "timm has no representation layer"),
)
BIAS_TABLE = "relative_position_bias_table"
FINAL_NORMS = ("norm", "fc_norm")
FRESH_NORM = "a fresh final norm: the weights were trained with another pooling"
OTHER_HEAD = "a head that does not fit"
OPERATOR = re.compile(r"(.*\battn\.operator\.).+")
"""A parameter that a conversion brought."""
MERGE = re.compile(r"(.+\.)(?:dconv|norm_layer)\..+")
"""A parameter of a merge: of a deformable one, where the model has `dconv`."""
ADDED_TOKENS = ("reg_token", "dist_token")
"""A student may have them, or lack them, where its source does not."""


@dataclass(frozen=True)
class KeyRules:
    """The reasons that hold for one model and one set of weights; `None` from either method means: refuse."""

    role: Role
    model_keys: frozenset[str]
    weight_keys: frozenset[str]
    classifiers: tuple[str, ...]
    num_classes: int
    head_fits: bool
    """Whether the weights' head, where there is one, has the model's number of classes."""

    def missing(self, key: str) -> str | None:
        """Return why the weights may lack `key` of the model."""
        module = key.rpartition(".")[0]
        if module in self.classifiers and self.role == "init":
            return "a fresh head"
        if self._other_pooling(module) and (self.role == "init" or self.num_classes == 0):
            return FRESH_NORM
        if key in ADDED_TOKENS and self.role == "init":
            return "fresh tokens: the weights have none"
        operator = OPERATOR.fullmatch(key)
        if operator is not None and self.role == "init" and not self._has(operator[1]):
            return "a fresh operator: the weights are of a layer with softmax attention"
        merge = MERGE.fullmatch(key)
        if merge is not None and self.role == "init" and self._fresh_merge(merge[1]):
            return "a fresh merge: the weights are of a model with other merges"
        return None

    def unexpected(self, key: str) -> str | None:
        """Return why the model may lack `key` of the weights."""
        module = key.rpartition(".")[0]
        if module in self.classifiers:
            if self.num_classes == 0:
                return "the model has no head"
            return None if self.head_fits or self.role == "teacher" else OTHER_HEAD
        if self._other_pooling(_other(module)) and (self.role == "init" or self.num_classes == 0):
            return "the final norm of another pooling"
        if key in ("cls_token", *ADDED_TOKENS) and key not in self.model_keys and self.role == "init":
            return "the model has no such token"
        return next((reason for pattern, reason in NOT_NEEDED if re.fullmatch(pattern, key)), None)

    def _fresh_merge(self, prefix: str) -> bool:
        convolution = f"{prefix}dconv."
        return f"{convolution}weight" in self.model_keys and not self._has(convolution)

    def _has(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self.weight_keys)

    def _other_pooling(self, module: str) -> bool:
        """Return whether the model has `module` as its final norm where the weights have the other one."""
        if module not in FINAL_NORMS:
            return False
        ours, theirs = f"{module}.weight", f"{_other(module)}.weight"
        in_model = ours in self.model_keys and theirs not in self.model_keys
        return in_model and theirs in self.weight_keys and ours not in self.weight_keys


def _other(module: str) -> str:
    return {"norm": "fc_norm", "fc_norm": "norm"}.get(module, module)


def sort_keys(keys: Iterable[str], reason: Callable[[str], str | None]) -> tuple[dict[str, str], list[str]]:
    """`keys` with a reason, and those without."""
    reasons = {key: reason(key) for key in keys}
    expected = {key: why for key, why in reasons.items() if why is not None}
    return expected, [key for key in reasons if key not in expected]


class Place(NamedTuple):
    """Where a tensor lies: a .safetensors file, and its name there."""

    path: str
    name: str


@dataclass(frozen=True)
class LoadReport:
    """The outcome of one load. Keys that have no reason never get here: they are refused."""

    origin: str
    format: str
    loaded: int
    """Tensors taken over."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Keys of the model that the weights lack, and why that is expected."""
    unexpected: Mapping[str, str] = field(default_factory=dict)
    """Keys of the weights that the model has no place for, and why that is expected."""
    resampled: Mapping[str, str] = field(default_factory=dict)
    """Position embeddings that were resampled, and how."""
    notes: tuple[str, ...] = ()
    license: str | None = None
    revision: str | None = None
    """Commit on the hub."""
    places: Mapping[str, Place] = field(default_factory=dict)
    """Where the tensors of a mapped model lie, by its own names; those that loading computed have no place."""

    def lines(self) -> list[str]:
        """Return one line for each fact; keys with the same reason share one."""
        lines = [f"loaded {self.loaded} tensors from {self.origin} ({self.format})"]
        lines += [f"resampled {name}: {how}" for name, how in self.resampled.items()]
        lines += [f"not in the weights: {line}" for line in grouped(self.missing)]
        lines += [f"not in the model: {line}" for line in grouped(self.unexpected)]
        return lines + list(self.notes)

    def warnings(self) -> list[str]:
        """Return a sentence for each part of the model that is fresh although the weights bring their own."""
        found = []
        if FRESH_NORM in self.missing.values():
            found.append(
                "its final norm is fresh, and that of the weights is left out, because they were trained with another "
                "pooling: student.global_pool=auto keeps theirs"
            )
        if OTHER_HEAD in self.unexpected.values():
            found.append(
                "its head is fresh, and that of the weights is left out, because it has other classes"
            )
        return found

    def summary(self) -> str:
        """Return the lines as text."""
        return "\n".join(self.lines())

    def __str__(self) -> str:
        return "; ".join(self.lines())


def grouped(keys: Mapping[str, str]) -> list[str]:
    """Return one line for each reason, with the keys that have it."""
    groups: dict[str, list[str]] = {}
    for key, reason in keys.items():
        groups.setdefault(reason, []).append(key)
    return [f"{some(names)} ({reason})" for reason, names in groups.items()]


def some(names: Iterable[str], limit: int = 4) -> str:
    """Return the first few names and how many more there are."""
    listed = list(names)
    more = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {more} more" if more > 0 else "")


def printable(text: str) -> str:
    """`text` in one line, with an escape in place of each character that could steer a terminal."""
    return escaped(text).replace("\t", "\\t").replace("\n", "\\n")


def shortened(value: Any) -> str:
    """Return a value of unknown size in a few words."""
    return " ".join(reprlib.repr(value).split())
