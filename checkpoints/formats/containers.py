"""Unwrap the tensors of a file: find the entry that holds the weights, and the requested part."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from timm.models import is_model, split_model_name_tag
from torch import Tensor

from ...models.errors import CheckpointError, Json
from ..sources import Part
from ..state_file import is_state
from ..weight_files import Content
from ..weights import Weights
from .described import with_metadata
from .normalization import IMAGENET, NOTE
from .onnx_names import named_weights
from .prefixes import one_model
from .training_state import read_state_weights

WRAPPERS = ("module.", "_orig_mod.")
"""The prefix that DDP and torch.compile put before every name."""
INNER_WRAPPERS = re.compile(r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
"""Parts that FSDP, activation checkpointing and torch.compile put anywhere into a name."""
BEIT2_NOTE = NOTE + "ImageNet's, as BEiTv2 trains"


@dataclass(frozen=True)
class Container:
    """The entry of each part; the first part is the default."""

    name: str
    parts: Mapping[Part, str]
    described: Json = field(default_factory=dict)
    """The images that such files were trained with, unless their keys or their config differ."""
    note: str = ""
    """Says so in the report."""


DICTIONARIES = (
    Container(
        "{'model': weights, …}",
        {"student": "model", "ema": "model_ema"},
        IMAGENET,
        NOTE + "ImageNet's, as MAE and DeiT train",
    ),
    Container("{'module': weights, …}", {"student": "module"}, IMAGENET, BEIT2_NOTE),
    Container("{'state_dict': weights, …}", {"student": "state_dict", "ema": "state_dict_ema"}),
    Container(
        "{'teacher': weights, 'student': weights}",
        {"teacher": "teacher", "student": "student"},
        IMAGENET,
        NOTE + "ImageNet's, as DINO and iBOT train",
    ),
)


def unwrap(content: Content, part: Part | None) -> Weights:
    """Return the tensors of `part` under the file's own names; the default part for None.

    Raises CheckpointError: the file holds no weights in a known place, or no such part.
    """
    if is_state(content.metadata):
        return read_state_weights(content, part or "student")
    seen: dict[Part, None] = {}
    weights = _entry(content, part, seen)
    weights = one_model(replace(weights, tensors=_unwrapped(weights)), part, seen, content.tree.get("args"))
    if part is not None and part not in (seen or {"student": None}):
        what = {"ema": "moving average"}.get(str(part), part)
        raise CheckpointError(f"{content.path} holds no {what}, {_listed(seen)}; leave #{part} out")
    return weights


def _listed(seen: Mapping[Part, None]) -> str:
    return f"only {' and '.join(f'#{name}' for name in seen)}" if seen else "only one model"


def _entry(content: Content, part: Part | None, seen: dict[Part, None]) -> Weights:
    """Return the dictionary of tensors in the file, and the file's metadata about it."""
    origin, tree = str(content.path), content.tree
    if content.graph is not None:
        return with_metadata(named_weights(content.graph, origin), content.metadata)
    for kind in DICTIONARIES:
        present = {name: key for name, key in kind.parts.items() if _is_weights(tree.get(key))}
        if not present:
            continue
        seen.update(dict.fromkeys(present))
        default, entry = next(iter(kind.parts.items()))
        if default not in present and part not in present:
            named = " or ".join(f"#{name}" for name in present)
            raise CheckpointError(f"{origin}: its {entry!r} holds no weights; write {named} behind the path")
        key = present[part] if part in present else present[default]
        words = "a training file" if "optimizer" in tree else "a weights file"
        return Weights(
            dict(tree[key]),
            origin,
            f"{words} ({key!r})",
            architecture=_timm_name(tree.get("arch")),
            pretrained_cfg=kind.described,
            notes=(kind.note,) if kind.note else (),
        )
    if _is_weights(tree):
        return with_metadata(Weights(dict(tree), origin, "a plain state dict"), content.metadata)
    known = "; ".join([*(kind.name for kind in DICTIONARIES), "names to tensors"])
    keys = ", ".join(repr(str(key)) for key in list(tree)[:5]) or "nothing"
    raise CheckpointError(f"{origin} is of no known format: it holds {keys}; known are: {known}")


def _timm_name(arch: Any) -> str | None:
    """Return a training file's architecture, if its name is timm's too (MoCo-v3's `vit_base` is not)."""
    return arch if isinstance(arch, str) and is_model(split_model_name_tag(arch)[0]) else None


def _is_weights(tree: Any) -> bool:
    return (
        isinstance(tree, Mapping)
        and len(tree) > 0
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in tree.items())
    )


def _unwrapped(weights: Weights) -> dict[str, Tensor]:
    names = {name: INNER_WRAPPERS.sub("", name) for name in weights.tensors}
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in names.values()):
            names = {name: inner.removeprefix(wrapper) for name, inner in names.items()}
    if len(set(names.values())) < len(names):
        raise CheckpointError(f"{weights.origin} is damaged: two of its names differ in their wrappers only")
    return {inner: weights.tensors[name] for name, inner in names.items()}
