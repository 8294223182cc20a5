"""Read files that hold several models in one dictionary, distinguished by the prefix of their names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...models.errors import CheckpointError
from ..report import some
from ..sources import Part
from ..weights import Weights

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
