"""What is known of each transfer method before its module is imported. No torch here, so that conditions can ask it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

LAYERS = frozenset({"layers", "weight", "reduction"})
HEADS = LAYERS | {"heads"}


@dataclass(frozen=True)
class MethodFacts:
    """The properties of a method that the conditions of settings depend on."""

    module: str = ""
    """Module of this package that holds the method in `METHODS`."""
    reads: frozenset[str] | None = None
    """Settings of a loss that it reads, beside its name and teacher; None for all. Others are refused."""
    copies: bool = False
    """A student that computes with parts of its teacher: it has no loss of its own, needs its teacher for ever, and
    leaves some of its own parameters unused."""


_COPY = MethodFacts("copy_attention", frozenset({"layers", "heads"}), copies=True)
_PART = MethodFacts("distill", HEADS | {"interpolate_grid"})
METHODS: dict[str, MethodFacts] = {
    "copy": _COPY,
    "copy_q": _COPY,
    "copy_k": _COPY,
    "copy_v": _COPY,
    "distill": MethodFacts("distill", HEADS | {"loss", "temperature", "rows", "interpolate_grid"}),
    "distill_q": _PART,
    "distill_k": _PART,
    "distill_v": _PART,
    "attention_output": MethodFacts("attention_output", HEADS),
    "block_output": MethodFacts("block_output", LAYERS),
    "feature": MethodFacts(
        "feature", frozenset({"feature_loss", "tokens", "standardize", "standardize_images", "weight"})
    ),
    "logits": MethodFacts("logits", frozenset({"weight", "temperature", "logits_loss", "logits_head"})),
}
"""By the value of `transfer.method`. `register_method` adds those of other packages."""


def method_names() -> tuple[str, ...]:
    """Return the values that `transfer.method` takes."""
    return tuple(METHODS)


def facts_of(name: str) -> MethodFacts:
    """Return what is known of a method; that it reads every setting, of one that nobody has registered."""
    return METHODS.get(name, MethodFacts())


def reads_setting(name: str, setting: str) -> bool:
    """Return whether a method reads a setting of a loss."""
    reads: Collection[str] | None = facts_of(name).reads
    return reads is None or setting in {*reads, "method"}
