"""The formats of weights files, recognised from their keys and never from their names.

A new format is one row of `FORMATS`: how its keys look, and how they become timm's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from ..models.errors import CheckpointError
from .files import Content
from .sources import Part
from .state_file import META_KEY, is_state
from .weights import Weights

IMAGENET = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
WRAPPERS = ("module.", "_orig_mod.")
"""What DDP and torch.compile put before every name."""


@dataclass(frozen=True)
class Format:
    """One kind of file. `recognises` looks at the keys; `read` gives the weights of one part of it."""

    name: str
    recognises: Callable[[Content], bool]
    read: Callable[[Content, Part], Weights]


def read_weights(content: Content, part: Part) -> Weights:
    """The weights in a file, by the first format that knows its keys.

    Raises CheckpointError: no format does, or the file has no such part; names what the file holds.
    """
    for kind in FORMATS:
        if kind.recognises(content):
            return kind.read(content, part)
    known = "; ".join(kind.name for kind in FORMATS)
    keys = ", ".join(repr(str(key)) for key in list(content.tree)[:5]) or "nothing"
    raise CheckpointError(f"{content.path} is of no known format: it holds {keys}; known are: {known}")


def _is_weights(tree: Any) -> bool:
    return (
        isinstance(tree, Mapping)
        and len(tree) > 0
        and all(isinstance(value, Tensor) for value in tree.values())
    )


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {name: name for name in tensors}
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in names.values()):
            names = {name: inner.removeprefix(wrapper) for name, inner in names.items()}
    return {inner: tensors[name] for name, inner in names.items()}


def _part(content: Content, part: Part, names: dict[Part, str]) -> dict[str, Tensor]:
    tensors = content.tree.get(names[part])
    if tensors is None or not _is_weights(tensors):
        if part == "ema":
            raise CheckpointError(
                f"{content.path} holds no moving average ({names['ema']!r}); leave #ema out"
            )
        raise CheckpointError(f"{content.path}: its {names[part]!r} is not a dictionary of tensors")
    return _unwrapped(tensors)


def _read_research(content: Content, part: Part) -> Weights:
    """MAE and DeiT: ImageNet's mean and deviation; the training files hold more than the model."""
    tensors = _part(content, part, {"student": "model", "ema": "model_ema"})
    kind = "training file" if "optimizer" in content.tree else "weights file"
    return Weights(
        tensors,
        str(content.path),
        f"MAE's {kind}, {_stage(tensors)}",
        pretrained_cfg=IMAGENET,
        notes=("normalisation: ImageNet's, as MAE and DeiT train",),
    )


def _stage(tensors: Mapping[str, Tensor]) -> str:
    if any(name.startswith("decoder_") for name in tensors):
        return "pre-trained, with its decoder"
    return "fine-tuned" if "head.weight" in tensors else "pre-trained"


def _read_timm_training(content: Content, part: Part) -> Weights:
    tensors = _part(content, part, {"student": "state_dict", "ema": "state_dict_ema"})
    architecture = content.tree.get("arch")
    return Weights(
        tensors,
        str(content.path),
        "a training file of timm's",
        architecture=architecture if isinstance(architecture, str) else None,
    )


def _read_state(content: Content, part: Part) -> Weights:
    """A run's state: `student.…` as trained, `ema.…` its average; of an autoencoder, the encoder alone."""
    prefix = f"{part}."
    tensors = {name.removeprefix(prefix): t for name, t in content.tree.items() if name.startswith(prefix)}
    if not tensors:
        raise CheckpointError(f"{content.path} holds no moving average; leave #ema out")
    if any(name.startswith("encoder.") for name in tensors):
        encoder = "encoder."
        tensors = {name.removeprefix(encoder): t for name, t in tensors.items() if name.startswith(encoder)}
    architecture, arguments, config = _student_of(json.loads(content.metadata[META_KEY]))
    notes = () if config else ("normalisation: the architecture's own, for the state does not say it",)
    return Weights(
        tensors,
        str(content.path),
        f"the {'average' if part == 'ema' else 'student'} in a run's training state",
        architecture,
        arguments,
        config,
        notes=notes,
    )


def _student_of(meta: Mapping[str, Any]) -> tuple[str | None, dict[str, Any], dict[str, Any]]:
    """Architecture, arguments, normalisation from a state's meta: its `student` entry, else its settings."""
    entry = meta.get("student")
    if isinstance(entry, Mapping):
        config = {key: tuple(entry[key]) for key in ("mean", "std") if entry.get(key)}
        return entry.get("architecture"), dict(entry.get("model_args") or {}), config
    settings = meta.get("config") or {}
    student = settings.get("student") or {}
    if student.get("mirror_teacher") or not student.get("model"):
        return None, {}, {}
    arguments = dict(student.get("model_args") or {})
    arguments |= {key: student[key] for key in ("img_size", "global_pool") if student.get(key) is not None}
    if settings.get("mode") == "pretrain":  # the encoder of an autoencoder ends in `norm`
        arguments["global_pool"] = "token" if arguments.get("class_token", True) else ""
    return student["model"], arguments, {}


def _read_plain(content: Content, part: Part) -> Weights:
    if part == "ema":
        raise CheckpointError(
            f"{content.path} is a plain state dict and holds no moving average; leave #ema out"
        )
    return Weights(_unwrapped(content.tree), str(content.path), "a plain state dict")


FORMATS = (
    Format("a training state of this package (student.*)", lambda c: is_state(c.metadata), _read_state),
    Format(
        "MAE and DeiT files ({'model': weights, ...})",
        lambda c: _is_weights(c.tree.get("model")),
        _read_research,
    ),
    Format(
        "timm training files ({'state_dict': weights, ...})",
        lambda c: _is_weights(c.tree.get("state_dict")),
        _read_timm_training,
    ),
    Format("a plain state dict (names to tensors)", lambda c: _is_weights(c.tree), _read_plain),
)
