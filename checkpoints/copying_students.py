"""Read students that copy their teacher's attention: complete with the teacher's part, or bare on request."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from timm.models import split_model_name_tag
from torch import Tensor

from ..models.copied import ARCHITECTURE, CopiedTeacher
from ..models.copying.teacher_view import Normalization
from ..models.errors import CheckpointError, GraftError, Json
from .architecture import build
from .fit import own_norm_eps
from .model_folders import open_model, read_folder
from .provenance import BARE, COST, Pretrained
from .weight_files import Weights

TEACHER = "teacher."
"""Before the names of the weights that are the teacher's."""
BARE_WORDS = (
    "the bare student: the attention of its copied layers is its teacher's, and its own was never trained"
)


def copied_teacher(teacher: Pretrained) -> CopiedTeacher:
    """Return the arguments with which timm builds this teacher again."""
    fresh = build(teacher.architecture, teacher.model_args, on_meta=True)
    return CopiedTeacher(
        teacher.architecture,
        teacher.model_args,
        Normalization(teacher.mean, teacher.std),
        own_norm_eps(teacher.model, fresh, teacher.architecture),
    )


def make_whole(weights: Weights, load_pretrained: Callable[..., Pretrained], *, bare: bool) -> Weights:
    """`weights` with the teacher's part where the student copies attention, or with `bare` without it.

    A training state holds the student alone: its teacher is taken from what the run has exported, or loaded from where
    the run had it.

    Raises CheckpointError: that teacher cannot be loaded; `bare` is said of a model that copies nothing.
    """
    if weights.architecture == ARCHITECTURE:
        if bare:
            return _bare(weights)
        if _of_teacher(weights):
            return weights
        part = _part_beside(weights) or _load_part(weights, load_pretrained)
        return replace(weights, tensors={**weights.tensors, **part})
    if bare:
        raise CheckpointError(f"bare: {weights.origin} copies no teacher's attention; leave it out")
    return weights


def refuse_as_start(weights: Weights) -> None:
    """CheckpointError for weights of a student that copies attention: another model cannot start from them."""
    if weights.architecture == ARCHITECTURE:
        method = weights.model_args["copied"]["method"]
        raise CheckpointError(
            f"{weights.origin} runs with its teacher's attention, and another model cannot start from that: write its "
            "own weights alone with `graftvit checkpoint save SOURCE DIR --bare`, and start from DIR by "
            f"transfer.method={method}"
        )


def refuse_without_teacher(weights: Weights) -> None:
    """CheckpointError for weights of a student that copies attention and that are without the teacher's part."""
    if weights.architecture == ARCHITECTURE and not _of_teacher(weights):
        raise CheckpointError(
            f"{weights.origin} copies the attention of a teacher that it does not hold, and does not load without it: "
            "write a folder with both by `graftvit checkpoint save SOURCE DIR`, or without the teacher by --bare"
        )


def described_architecture(weights: Weights) -> str:
    """Return the timm name that describes the model; for a copying student, the student's."""
    return str(
        weights.model_args["student"] if weights.architecture == ARCHITECTURE else weights.architecture
    )


def _bare(weights: Weights) -> Weights:
    arguments = dict(weights.model_args)
    arguments.pop("copied")
    own = {name: tensor for name, tensor in weights.tensors.items() if not name.startswith(TEACHER)}
    name = split_model_name_tag(arguments.pop("student"))[0]
    return _marked(replace(weights, architecture=name, model_args=arguments, tensors=own))


def _marked(weights: Weights) -> Weights:
    """Return the weights with a note that they are bare, and without the accuracy of the whole student."""
    made = {key: value for key, value in weights.provenance.items() if key not in ("results", COST)}
    return replace(weights, provenance=made | {BARE: True}, notes=(*weights.notes, BARE_WORDS))


def _of_teacher(weights: Weights) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.tensors.items() if name.startswith(TEACHER)}


def _part_beside(weights: Weights) -> dict[str, Tensor]:
    """Return the teacher's part from the student that this state's run has exported; empty without one."""
    with suppress(CheckpointError):
        exported = read_folder(open_model(Path(weights.origin).parent.parent / "student"))
        alike = exported.model_args.get("copied") == weights.model_args["copied"]
        if alike and _known(exported).get("digest") == _known(weights).get("digest"):
            return _of_teacher(exported)
    return {}


def _known(weights: Weights) -> Json:
    """Return the recorded description of the teacher that a student was trained with."""
    return weights.provenance.get("teacher") or {}


def _load_part(weights: Weights, load_pretrained: Callable[..., Pretrained]) -> dict[str, Tensor]:
    """Load the part of the teacher that the student needs, as the run loaded it."""
    known = _known(weights)
    try:
        recipe: Json = weights.provenance["recipe"]["teacher"]
        how = {key: recipe[key] for key in ("model", "model_args", "position_embedding")}
        source, revision = str(recipe["source"]), known.get("revision") or recipe["revision"]
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{weights.origin} copies the attention of a teacher that it does not hold, and does not say where it is: "
            "take the bare student (`graftvit checkpoint save SOURCE DIR --bare`)"
        ) from error
    try:
        size = weights.model_args["copied"]["teacher"]["model_args"].get("img_size")
        teacher = load_pretrained(
            source, img_size=size, revision=revision, identified=known.get("digest") is not None, **how
        )
    except GraftError as error:
        raise CheckpointError(
            f"{weights.origin} copies the attention of {source!r}, which it does not hold and which does not "
            f"load ({error}): put it back, or take the bare student (`graftvit checkpoint save SOURCE DIR --bare`)"
        ) from error
    if teacher.digest != known.get("digest"):
        raise CheckpointError(
            f"{weights.origin} copies the attention of {source!r}, which holds other weights than those that "
            "it was trained with: put those back, or take the bare student "
            "(`graftvit checkpoint save SOURCE DIR --bare`)"
        )
    found = teacher.model.state_dict()
    within = {**weights.tensors, **{f"{TEACHER}{name}": tensor for name, tensor in found.items()}}
    model = build(ARCHITECTURE, weights.model_args, on_meta=True, within=within)
    prefix = f"{TEACHER}model."
    wanted = [name.removeprefix(prefix) for name in model.state_dict() if name.startswith(prefix)]
    return {f"{prefix}{name}": found[name] for name in wanted if name in found}
