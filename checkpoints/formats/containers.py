"""What wraps the tensors in a file, and which part of it is asked for.

Two tables, each read by one function: dictionaries by the entry that holds the weights, and models of several
parts by the prefix of their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from ...models.errors import CheckpointError
from ..files import Content
from ..sources import Part
from ..state_file import is_state
from ..weights import Weights
from .state import read_state_weights

WRAPPERS = ("module.", "_orig_mod.")
"""What DDP and torch.compile put before every name."""


@dataclass(frozen=True)
class Container:
    """Where each part is kept; the first part is the one that such files are used for."""

    name: str
    parts: Mapping[Part, str]
    described: Mapping[str, Any] = field(default_factory=dict)
    """What such files were trained with, unless their keys or their config say otherwise."""


IMAGENET = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
DICTIONARIES = (
    Container("{'model': weights, …}", {"student": "model", "ema": "model_ema"}, IMAGENET),
    Container("{'state_dict': weights, …}", {"student": "state_dict", "ema": "state_dict_ema"}),
    Container(
        "{'teacher': weights, 'student': weights}", {"teacher": "teacher", "student": "student"}, IMAGENET
    ),
)
PREFIXES = (
    Container("attention transfer's dual model", {"student": "student.", "teacher": "teacher."}),
    Container("MoCo's two encoders", {"student": "base_encoder.", "ema": "momentum_encoder."}),
)


def unwrap(content: Content, part: Part | None) -> Weights:
    """The tensors of `part` under the names that the file gives them; the default part for None.

    Raises CheckpointError: the file holds no weights in a known place, or no such part.
    """
    if is_state(content.metadata):
        return read_state_weights(content, part or "student")
    seen: dict[Part, None] = {}
    weights = _entry(content, part, seen)
    tensors, several = _prefixed(_unwrapped(weights.tensors), part, seen)
    if part not in (None, "student", *seen):
        what = {"ema": "moving average"}.get(str(part), part)
        raise CheckpointError(f"{content.path} holds no {what}, {_listed(seen)}; leave #{part} out")
    return replace(weights, tensors=tensors, format=weights.format + several)


def _listed(seen: Mapping[Part, None]) -> str:
    return f"only {' and '.join(f'#{name}' for name in seen)}" if seen else "only one model"


def _entry(content: Content, part: Part | None, seen: dict[Part, None]) -> Weights:
    """The dictionary of tensors in the file, and what the file says of it."""
    origin = str(content.path)
    for kind in DICTIONARIES:
        default = next(iter(kind.parts.values()))
        if not _is_weights(content.tree.get(default)):
            continue
        present = {name: key for name, key in kind.parts.items() if _is_weights(content.tree.get(key))}
        seen.update(dict.fromkeys(present))
        key = present.get(part, default) if part else default
        words = "a training file" if "optimizer" in content.tree else "a weights file"
        architecture = content.tree.get("arch")
        return Weights(
            dict(content.tree[key]),
            origin,
            f"{words} ({key!r})",
            architecture=architecture if isinstance(architecture, str) else None,
            pretrained_cfg=kind.described,
            notes=("normalisation: ImageNet's, as MAE and DeiT train",) if kind.described else (),
        )
    if _is_weights(content.tree):
        return Weights(dict(content.tree), origin, "a plain state dict")
    known = "; ".join([*(kind.name for kind in DICTIONARIES), "names to tensors"])
    keys = ", ".join(repr(str(key)) for key in list(content.tree)[:5]) or "nothing"
    raise CheckpointError(f"{origin} is of no known format: it holds {keys}; known are: {known}")


def _prefixed(
    tensors: dict[str, Tensor], part: Part | None, seen: dict[Part, None]
) -> tuple[dict[str, Tensor], str]:
    """The tensors of one part where the names say that there are several."""
    for kind in PREFIXES:
        present = {n: p for n, p in kind.parts.items() if any(key.startswith(p) for key in tensors)}
        default = next(iter(kind.parts))
        if default not in present:
            continue
        seen.update(dict.fromkeys(present))
        prefix = present.get(part, present[default]) if part else present[default]
        chosen = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        return chosen, f", {kind.name} ({prefix}*)"
    return tensors, ""


def _is_weights(tree: Any) -> bool:
    return (
        isinstance(tree, Mapping)
        and len(tree) > 0
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in tree.items())
    )


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {name: name for name in tensors}
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in names.values()):
            names = {name: inner.removeprefix(wrapper) for name, inner in names.items()}
    return {inner: tensors[name] for name, inner in names.items()}
