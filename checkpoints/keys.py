"""Decide which keys may be missing or unexpected when weights are loaded, and why."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Role = Literal["teacher", "init"]
"""A teacher is used as it is; initial weights may leave a fresh head and a fresh final norm to training."""

NOT_NEEDED = (
    (r"mask_token|decoder_\w+(\..*)?|decoder\..*", "the decoder of masked autoencoding"),
    (r".*relative_position_index|.*rope.*\.(periods|bands|pos_embed.*)|.*attn_mask", "timm computes it"),
    (r"pre_logits\..*", "timm has no representation layer"),
)
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
