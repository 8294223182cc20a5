"""Unwrap the tensors of a file: find the entry that holds the weights, and the requested part."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from timm.models import is_model, split_model_name_tag
from torch import Tensor

from ...models.errors import CheckpointError, Json
from ...models.lora import merged
from ..architecture import check_description
from ..class_names import KEY as LABEL_NAMES
from ..preprocessing import Preprocessing
from ..provenance import PICKED, carried_license, of_state
from ..report import shortened, some
from ..sources import Part
from ..state import BEST
from ..weight_files import STATE_KEY, Weights, is_state
from .keymap import BEIT2_NOTE, IMAGENET, NOTE
from .onnx_names import named_weights, with_own_marks

# Read the model's description from the metadata of a file of bare tensors that `graftvit checkpoint` wrote.

KEY = "graftvit.described"


def as_metadata(weights: Weights) -> dict[str, str]:
    """Architecture, arguments and normalization, which stood around the tensors; nothing where nothing did."""
    described = {
        "architecture": weights.architecture,
        "model_args": dict(weights.model_args),
        "pretrained_cfg": dict(weights.pretrained_cfg),
    }
    said = {name: value for name, value in described.items() if value}
    return {KEY: json.dumps(said)} if said else {}


def with_metadata(weights: Weights, metadata: Mapping[str, str]) -> Weights:
    """`weights` with what `as_metadata` wrote. Raises CheckpointError: it is damaged."""
    if KEY not in metadata:
        return weights
    try:
        said = json.loads(metadata[KEY])
        architecture, arguments = said.get("architecture"), said.get("model_args") or {}
        config = {name: _value(name, value) for name, value in (said.get("pretrained_cfg") or {}).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{weights.origin} is damaged: its {KEY} is no description") from error
    if not isinstance(architecture, str | None) or not isinstance(arguments, dict):
        raise CheckpointError(f"{weights.origin} is damaged: its {KEY} names no architecture")
    return replace(weights, architecture=architecture, model_args=arguments, pretrained_cfg=config)


def _value(name: str, value: Any) -> Any:
    """Read a value of the description.

    Raises ValueError: a mean or a standard deviation that is no list of numbers, one a channel.
    """
    if name not in ("mean", "std"):
        return value
    if not isinstance(value, list) or not all(isinstance(one, float | int) for one in value):
        raise ValueError(name)
    return tuple(map(float, value))


# Read files that hold several models in one dictionary, distinguished by the prefix of their names.

BACKBONE = "backbone."
BESIDE_BACKBONE = re.compile(r"(?:(?:dino_|ibot_)?head|(?:dino|ibot_patch)_loss)\..+")
"""What self-distillation keeps beside a backbone; detectors and segmenters keep other things there."""
ALONE = (
    "the student was trained with the teacher's attention copied into it: without the teacher it is not the "
    "model that was trained"
)

UNTRAINED = "attention transfer never trains its teacher's head"


@dataclass(frozen=True)
class Prefixes:
    """The prefix of each part; the first part is the one that such files are used for."""

    name: str
    parts: Mapping[Part, str]


PREFIXES = (
    Prefixes("DINOv2's two networks", {"teacher": "teacher.backbone.", "student": "student.backbone."}),
    Prefixes("attention transfer's dual model", {"student": "student.", "teacher": "teacher."}),
    Prefixes("MoCo's two encoders", {"student": "base_encoder.", "ema": "momentum_encoder."}),
)


def one_model(weights: Weights, part: Part | None, seen: dict[Part, None], settings: Any) -> Weights:
    """Return the weights of one part where the names say that there are several; `seen` gets what there is.

    `settings` is the file's `args`: an attention transfer's say what the parts are good for.

    Raises CheckpointError: a backbone among parts of a detector, a segmenter or the like.
    """
    for kind in PREFIXES:
        present = {n: p for n, p in kind.parts.items() if any(key.startswith(p) for key in weights.tensors)}
        default = next(iter(kind.parts))
        if default not in present:
            continue
        seen.pop("student", None)  # the dictionary around them was counted as one
        seen.update(dict.fromkeys(present))
        name = part if part in present else default
        weights = _chosen(weights, present[name], f"{kind.name} ({present[name]}*)")
        weights = _of_transfer(weights, name, settings)
        break
    return _backbone(weights)


def _chosen(weights: Weights, prefix: str, words: str) -> Weights:
    """Return what lies under `prefix`, without it; the rest is left out."""
    chosen = {key.removeprefix(prefix): t for key, t in weights.tensors.items() if key.startswith(prefix)}
    rest = {key: f"outside of {prefix}*" for key in weights.tensors if not key.startswith(prefix)}
    return replace(
        weights,
        tensors=chosen,
        format=f"{weights.format}, {words}",
        left_out={**weights.left_out, **rest},
    )


def _backbone(weights: Weights) -> Weights:
    """Return the backbone alone where a projection head lies beside it."""
    if not any(key.startswith(BACKBONE) for key in weights.tensors):
        return weights
    beside = [
        key for key in weights.tensors if not key.startswith(BACKBONE) and not BESIDE_BACKBONE.fullmatch(key)
    ]
    if beside:
        raise CheckpointError(
            f"{weights.origin} is of no supported family: beside a backbone it holds {some(beside, 2)}, as "
            "detectors and segmenters do; save the weights of a plain ViT alone"
        )
    heads = {
        key: "the projection head of self-distillation" for key in weights.tensors if BACKBONE not in key
    }
    chosen = _chosen(weights, BACKBONE, f"a backbone ({BACKBONE}*)")
    return replace(chosen, left_out={**chosen.left_out, **heads})


def _of_transfer(weights: Weights, part: str, settings: Any) -> Weights:
    """Return what the official attention transfer leaves untrained: its teacher's head; a copying student's own
    maps."""
    if not hasattr(settings, "atd_weight"):
        return weights
    if part == "teacher":
        heads = {key: UNTRAINED for key in weights.tensors if key.startswith("head.")}
        tensors = {key: tensor for key, tensor in weights.tensors.items() if key not in heads}
        return replace(weights, tensors=tensors, left_out={**weights.left_out, **heads})
    if str(getattr(settings, "mode", "")).startswith("copy"):
        return replace(weights, notes=(*weights.notes, ALONE))
    return weights


# Read the weights in a training state of this package.

BODY = "backbone.body."
"""Before the names of the model inside a detector or segmenter."""
LAST_NORMS = ("norm", "fc_norm", "head.norm")
"""What it does not have there."""
TABLES = (
    "", "student", "student.model_args", "student.dense", "config", "config.student", "config.student.model_args",
    "config.data",
    "config.transfer", "position", "position.metrics", "origins", "origins.teacher", "origins.teachers",
    "origins.init",
)  # fmt: skip
"""Places of a state's meta that hold a table, where they hold anything."""
NAMES = (
    "student.architecture", "config.student.model", "config.data.dataset", "config.data.data_path",
    "config.transfer.method", "origins.teacher.license", "origins.init.license",
)  # fmt: skip
DESCRIBED = (*(field.name for field in fields(Preprocessing)), LABEL_NAMES)


def read_state_weights(content: Weights, part: Part) -> Weights:
    """Return a run's state: `student.…` as trained, `ema.…` its average; of an autoencoder, the encoder alone, and of a
    detector or segmenter the model inside.

    Raises CheckpointError: the state has no such part, or is damaged.
    """
    tensors = tensors_in_state(content, part)
    fresh = LAST_NORMS if any(name.startswith(BODY) for name in tensors) else ()
    for inner in ("encoder.", BODY):
        if any(name.startswith(inner) for name in tensors):
            tensors = {name.removeprefix(inner): t for name, t in tensors.items() if name.startswith(inner)}
    try:
        tensors = merged(tensors)
        meta = json.loads(content.metadata[STATE_KEY])
    except (ValueError, KeyError, RuntimeError) as error:  # RecursionError is a RuntimeError
        raise CheckpointError(
            f"{content.origin} is damaged: {type(error).__name__} {str(error)[:200]}"
        ) from error
    _check_meta(content.origin, meta)
    provenance = of_state(meta, part)
    if Path(content.origin).stem == BEST:
        provenance[PICKED] = (meta.get("position") or {}).get("best_metric", "top1")
    entry = meta.get("student") or {}
    config = {key: entry[key] for key in DESCRIBED if entry.get(key) is not None}
    config["license"] = carried_license(provenance)
    return Weights(
        tensors,
        content.origin,
        f"the {'average' if part == 'ema' else 'student'} in a run's training state",
        entry.get("architecture"),
        dict(entry.get("model_args") or {}),
        config,
        provenance=provenance,
        fresh=fresh,
    )


def tensors_in_state(content: Weights, part: Part) -> dict[str, Any]:
    """Return the tensors of all that was trained, or of its average. Raises CheckpointError: it was not trained."""
    tensors = _part(content.tree, part)
    if not tensors:
        what = "moving average" if part == "ema" else part
        raise CheckpointError(f"{content.origin} holds no {what}; leave #{part} out")
    if part == "ema":  # whole numbers have no average: they are the student's own
        own = _part(content.tree, "student")
        tensors = {name: t for name, t in own.items() if not t.is_floating_point()} | tensors
    return tensors


def _part(tree: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Return the tensors of one model in a state, under their own names."""
    prefix = f"{part}."
    return {name.removeprefix(prefix): t for name, t in tree.items() if name.startswith(prefix)}


def _check_meta(path: str, meta: Any) -> None:
    """Raise CheckpointError unless each of `TABLES` is a mapping and each of `NAMES` a text, where they are there."""
    for place in TABLES:
        found = _at(meta, place)
        if found is not None and not isinstance(found, Mapping):
            raise CheckpointError(f"{path} is damaged: {place or 'it'}={shortened(found)} is no table")
    for place in NAMES:
        found = _at(meta, place)
        if found is not None and not isinstance(found, str):
            raise CheckpointError(f"{path} is damaged: {place}={shortened(found)} is no text")


def _at(meta: Any, place: str) -> Any:
    """Return what lies at a place such as `config.data`, None where nothing does."""
    for name in filter(None, place.split(".")):
        meta = meta.get(name) if isinstance(meta, Mapping) else None
    return meta


WRAPPERS = ("module.", "_orig_mod.")
"""The prefix that DDP and torch.compile put before every name."""
INNER_WRAPPERS = re.compile(r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
"""Parts that FSDP, activation checkpointing and torch.compile put anywhere into a name."""


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


def unwrap(content: Weights, part: Part | None) -> Weights:
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
        raise CheckpointError(f"{content.origin} holds no {what}, {_listed(seen)}; leave #{part} out")
    return weights


def _listed(seen: Mapping[Part, None]) -> str:
    return f"only {' and '.join(f'#{name}' for name in seen)}" if seen else "only one model"


def _entry(content: Weights, part: Part | None, seen: dict[Part, None]) -> Weights:
    """Return the dictionary of tensors in the file, and the file's metadata about it."""
    origin, tree = content.origin, content.tree
    if content.graph is not None:
        weights = with_metadata(named_weights(content.graph, origin), content.metadata)
        return with_own_marks(check_description(weights), content.metadata)
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
