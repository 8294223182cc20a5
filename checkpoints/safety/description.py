"""Check the description of a model in its weights as soon as it is read: a file may contain anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models import is_model, split_model_name_tag

from ...models.conversion import ARCHITECTURE as CONVERTED
from ...models.copied import ARCHITECTURE as COPIED
from ...models.copied import Copying
from ...models.errors import CheckpointError
from ..preprocessing import Preprocessing
from ..weights import Weights
from .model_settings import check_settings, shortened

INNER = {CONVERTED: "architecture", COPIED: "student"}
"""The argument of each architecture of ours that names the one of timm which it changes."""


def check_description(weights: Weights) -> Weights:
    """Return the weights themselves, once their description of the model has been checked.

    Raises CheckpointError: the architecture, its arguments, the description of the images or the provenance have the
    wrong type; a number is out of bounds; the base of a converted model is not one of timm's architectures; or the
    description of what a student copies cannot be read.
    """
    _check_kinds(weights)
    for name in ("model_args", "pretrained_cfg"):
        check_settings(f"{weights.origin}: {name}", getattr(weights, name), len(weights.tensors))
    Preprocessing.read(weights.pretrained_cfg)
    if weights.architecture in INNER:
        _check_inner(weights, weights.architecture)
    return weights


def _check_kinds(weights: Weights) -> None:
    said = {"architecture": weights.architecture, "license": None, "classifier": None}
    tables = {"model_args": weights.model_args, "pretrained_cfg": weights.pretrained_cfg}
    wrong = [name for name, table in tables.items() if not isinstance(table, Mapping)]
    if not wrong:
        said |= {name: weights.pretrained_cfg.get(name) for name in ("license", "classifier")}
        wrong = [name for name, value in said.items() if not _is_name(value, several=name == "classifier")]
    if wrong:
        raise CheckpointError(
            f"{weights.origin} says {wrong[0]}={shortened((tables | said)[wrong[0]])}, which is "
            f"{'no table of settings' if wrong[0] in tables else 'no name'}"
        )


def _is_name(value: Any, *, several: bool) -> bool:
    """Whether a value is text or nothing; or a list of texts."""
    if several and isinstance(value, (list, tuple)):
        return len(value) > 0 and all(isinstance(one, str) for one in value)
    return value is None or isinstance(value, str)


def _check_inner(weights: Weights, outer: str) -> None:
    """Of a model that one of our architectures makes out of a model of timm."""
    name = INNER[outer]
    named = weights.model_args.get(name)
    if not isinstance(named, str) or not is_model(split_model_name_tag(named)[0]) or named == outer:
        raise CheckpointError(
            f"{weights.origin} says {name}={shortened(named)}, which is no architecture of timm"
        )
    if outer == CONVERTED and not isinstance(weights.model_args.get("plan"), str):
        plan = shortened(weights.model_args.get("plan"))
        raise CheckpointError(f"{weights.origin} says plan={plan}, which is no text")
    if outer == COPIED:
        try:
            Copying.from_json(weights.model_args["copied"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{weights.origin} says of what it copies: {error}") from error
    if named in INNER:
        _check_inner(weights, named)
