"""The losses of a run, each with its method and its teacher, and the teachers as a step runs them."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ...checkpoints.pretrained import HoldsPretrained, load_pretrained
from ...checkpoints.provenance import Pretrained
from ...checkpoints.sources import source_text
from ...models.conversion import converted_layers
from ...models.copied import copied_layers
from ...models.copying.tape import Link, Step, Tape
from ...models.copying.teacher_view import LARGEST, Normalization, ShownImages, TeacherInput, WholeInput
from ...models.errors import ConfigError, GraftError, TransferError, UnsupportedModelError, did_you_mean
from ...models.families import (
    check_supported,
    find_family,
    image_size,
    is_supported,
    refuse_hooks,
    refuse_replaced,
)
from ...models.given import Model, as_model, computes_with
from ...models.parts import OutsideTeacher as OutsideTeacher
from ...models.parts import check_takes, image_channels
from ..loss_config import CACHED, LossEntry, TransferConfig
from ..setting import check_section, explain, rule_of
from .method import Finish, TransferMethod, TransferPlan
from .pairs import resolve_plan
from .registry import find_method

Teacher = Model | Pretrained
HALF = (torch.bfloat16, torch.float16)
DEFAULT_TEACHER = "teacher"
"""Name of the teacher that is not one of `teachers`."""
OF_DUAL = [
    name
    for name, rule in ((name, rule_of(field)) for name, field in TransferConfig.model_fields.items())
    if not rule.outside and CACHED not in rule.needs
]
"""Settings of `transfer` that `DualViT` takes: those that its numbers depend on."""


@dataclass(frozen=True)
class TeacherSide:
    """A frozen teacher and how images are shown to it."""

    name: str
    model: nn.Module
    input: ShownImages
    normalization: Normalization
    """Normalization of its images."""
    loaded: Pretrained | None
    """The loaded teacher with what is known of it; None for a model that was made elsewhere."""

    @classmethod
    def of(
        cls,
        name: str,
        teacher: nn.Module | Pretrained,
        student: nn.Module,
        norm: Normalization,
        own: Normalization | None,
        *,
        layers: bool,
    ) -> TeacherSide:
        """Freeze a teacher. `norm` is of the student's images, `own` of the teacher's where it is given.

        `layers`: whether methods read its layers, so that its grids count.
        """
        size, loaded = None, teacher if isinstance(teacher, Pretrained) else None
        if isinstance(teacher, Pretrained):
            own, size = own or Normalization(teacher.mean, teacher.std), teacher.preprocessing.input_size[1:]
            teacher = teacher.model
        own = own or pretrained_normalization(teacher)
        if (is_supported(teacher) and is_supported(student)) or layers:
            shown: ShownImages = TeacherInput(teacher, student, own, norm)
        else:
            shown = WholeInput(teacher, student, own, norm, size)
            section = name if name == DEFAULT_TEACHER else f"teachers.{name}"
            images = shown.size or image_size(student)
            if images is not None:
                check_takes(teacher.eval(), images, section)
        dtypes = {parameter.dtype for parameter in teacher.parameters()}
        shown.dtype = next((dtype for dtype in HALF if dtypes == {dtype}), None)
        return cls(name, teacher.eval().requires_grad_(False), shown, own, loaded)

    def check_step(self, images: Tensor) -> None:
        """Raise TransferError where the teacher is elsewhere than the images, or computes in another type."""
        weight = next((each for each in self.model.parameters() if each.is_floating_point()), None)
        if weight is None:
            return
        if weight.device != images.device:
            raise TransferError(
                f"{self.name} is on {weight.device} and the images on {images.device}: move the DualViT by .to()"
            )
        if self.input.dtype is None and not computes_with(images, weight):
            raise TransferError(
                f"{self.name} is of {weight.dtype} and the images of {images.dtype}: give both models one type; a "
                "teacher alone may be of half precision"
            )


@dataclass(frozen=True)
class Term:
    """One loss, or one copy, of a run."""

    label: str
    """Name among several losses; empty for a single one."""
    settings: LossEntry
    method: TransferMethod
    plan: TransferPlan
    side: TeacherSide
    finish: Finish | None = None
    """Function for the losses of a method that compares the results of whole models."""
    labelled: Callable[[], Tensor] | None = None
    """Function for the logits that learn from labels; None for the student's prediction."""

    @property
    def prefix(self) -> str:
        """Begins the names of its losses."""
        return f"{self.label}." if self.label else ""

    def loss_name(self, link: Link) -> str:
        """Return the name of the loss of a pair of layers."""
        return f"{self.prefix}layer{link.pair.student:02d}"

    def losses(self, logits: Tensor, recorded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the unweighted losses of a step, layer by layer in the order of the plan.

        Raises TransferError: a layer recorded no loss.
        """
        if self.finish is not None:
            found = self.finish(logits)
            return (
                {self.label or name: loss for name, loss in found.items()}
                if len(found) == 1
                else {f"{self.prefix}{name}": loss for name, loss in found.items()}
            )
        if self.method.copies:
            return {}
        names = [self.loss_name(link) for link in self.plan.links]
        if any(name not in recorded for name in names):
            raise TransferError(
                "layers of the student gave no loss: it was compiled before it was taught, or its blocks were "
                "replaced; wrap the plain model, and compile the DualViT"
            )
        return {name: recorded[name] for name in names}

    def reduce(self, losses: Collection[Tensor]) -> Tensor:
        """Return the sum of the losses, or their mean, as `reduction` says."""
        total = torch.zeros((), device=next(iter(losses)).device, dtype=torch.float32)
        for loss in losses:
            total = total + loss
        return total / len(losses) if self.settings.reduction == "mean" else total


@dataclass
class Lesson:
    """A step of a student that is taught within another model, such as a detector: its losses, once the block is left.

    `loss` is weighted; `parts` and `terms` are as of `DualOutput`.
    """

    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    terms: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def placed(config: TransferConfig, index: int) -> Iterator[None]:
    """Let an error name the settings of an entry of `transfer.losses` and of its teacher, by their keys."""
    try:
        yield
    except GraftError as error:
        if not config.losses:
            raise
        entry, name = f"transfer.losses[{index}]", config.losses[index].teacher
        text = re.sub(r"(?<![.\w])transfer\.(?=[a-z])(?!losses|share|task)", f"{entry}.", str(error))
        if name not in (None, DEFAULT_TEACHER):
            text = re.sub(r"(?<![.\w])teacher\.(?=[a-z])", f"teachers.{name}.", text)
        raise type(error)(text if entry in text else f"{entry}: {text}") from error


def resolve_terms(
    config: TransferConfig,
    chosen: Sequence[str],
    sides: Mapping[str, TeacherSide],
    student: nn.Module,
    calibration: Tensor | None,
) -> list[Term]:
    """Return the losses of a run, each with what it means for its teacher and the student."""
    terms = []
    labels, kinds = label_terms(config), term_methods(config)
    for index, settings in enumerate(config.terms):
        side = sides[chosen[index]]
        with placed(config, index):
            plan = resolve_plan(settings, side.model, student)
            if plan.needs_calibration and not next(student.parameters()).is_meta:
                plan = plan.calibrated(side.model, student, side.input, calibration)
        terms.append(Term(labels[index], settings, kinds[index], plan, side))
    return terms


def opened(name: str, teacher: Teacher) -> nn.Module | Pretrained:
    """Return a teacher with what is known of it, loaded where it is a source by name.

    Raises UnsupportedModelError: it is no model.
    """
    if isinstance(teacher, str | PathLike):
        return load_pretrained(source_text(teacher))
    if isinstance(teacher, Pretrained):
        return teacher
    if isinstance(teacher, HoldsPretrained) and not isinstance(teacher, type):
        known = teacher.to_pretrained()
        return replace(
            known, model=copy.deepcopy(known.model)
        )  # what is taught on does not change its teacher
    return as_model(teacher, name)


def model_of(name: str, teacher: nn.Module | Pretrained) -> nn.Module:
    """Return the model of a teacher. Raises UnsupportedModelError: it is not one of timm, nor an OutsideTeacher."""
    model = teacher.model if isinstance(teacher, Pretrained) else teacher
    if find_family(model) is None and not hasattr(model, "forward_head"):
        raise UnsupportedModelError(
            f"{name} is a {type(model).__name__}, which is not a classifier of timm: give "
            "graftvit.transfer.OutsideTeacher(model, feature_width=..., num_classes=...)"
        )
    return model


def choose_teachers(config: TransferConfig, names: Sequence[str]) -> list[str]:
    """Return the name of the teacher of each loss. Raises ConfigError for a teacher that is not there."""
    if not names:
        raise ConfigError("teacher={} names no model: give one, or several by name")
    for name in [each.teacher for each in config.terms if each.teacher is not None]:
        if name not in names:
            raise ConfigError(
                f"transfer.losses names the teacher {name!r}, and `teachers` has none of that name; "
                f"{did_you_mean(name, names)}"
            )
    return [names[0] if each.teacher is None else each.teacher for each in config.terms]


def refuse_idle(chosen: Sequence[str], names: Sequence[str]) -> None:
    """Raise ConfigError for a teacher in Python that teaches nothing."""
    idle = next((name for name in names if name not in chosen), None)
    if idle is not None:
        raise ConfigError(
            f"the teacher {idle!r} teaches nothing: name it as the teacher of an entry of losses, or leave it out"
        )


def label_terms(config: TransferConfig) -> list[str]:
    """Return a name for each entry of `transfer.losses`: its method, its teacher where one is named, and a number
    where both are those of another entry."""
    if not config.losses:
        return [""]
    names = [each.method + (f"@{each.teacher}" if each.teacher else "") for each in config.losses]
    counts, seen = Counter(names), Counter[str]()
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(f"{name}#{seen[name]}" if counts[name] > 1 else name)
    return labels


def module_name(label: str) -> str:
    """Return a label as the name of a module, which has no dots."""
    return label.replace(".", "_")


def term_methods(config: TransferConfig) -> list[TransferMethod]:
    """Return the method of each loss."""
    return [find_method(each.method) for each in config.terms]


def pretrained_normalization(model: nn.Module) -> Normalization:
    """Return mean and standard deviation from a timm model's `pretrained_cfg`; ImageNet's where it has none."""
    config = getattr(model, "pretrained_cfg", None) or {}
    mean: Sequence[float] = config.get("mean", (0.485, 0.456, 0.406))
    std: Sequence[float] = config.get("std", (0.229, 0.224, 0.225))
    channels = image_channels(model)
    if len(mean) != channels:
        mean, std = mean[:1], std[:1]
    return Normalization(tuple(mean), tuple(std))


def check_normalization(norm: Sequence[Sequence[float]]) -> None:
    """Raise ConfigError: a mean or deviation with which images would not be finite."""
    mean, std = norm
    if not all(abs(each) <= LARGEST for each in mean) or not all(
        1 / LARGEST <= each <= LARGEST for each in std
    ):
        raise ConfigError(
            f"a normalization has mean={tuple(mean)} and std={tuple(std)}: give means up to {LARGEST:,.0f} and "
            f"deviations from {1 / LARGEST:g} to {LARGEST:,.0f}"
        )


def check_teacher(teacher: nn.Module, method: TransferMethod) -> None:
    """Raise UnsupportedModelError or TransferError: a method cannot take what it needs from this teacher."""
    if not method.uses_layers and not is_supported(teacher):
        return  # any classifier, and a pyramid as one
    if isinstance(teacher, OutsideTeacher):
        raise UnsupportedModelError(
            f"transfer.method={method.name} reads the layers of its teacher, and a teacher of another library than "
            "timm gives features and classes alone: use feature or logits"
        )
    try:
        check_supported(teacher, copied=True, attention=method.uses_heads)
        if method.uses_heads:
            refuse_hooks(teacher, "teacher")
        refuse_replaced(teacher)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"transfer.method={method.name} reads the layers of its teacher, and {error}; feature and logits take any "
            "classifier, block_output any model of timm"
        ) from error
    others = {index: str(layer.choice) for index, layer in converted_layers(teacher).items()}
    others |= dict.fromkeys(copied_layers(teacher), "the attention of a teacher of its own")
    if others and method.uses_heads:
        first, attention = next(iter(others.items()))
        raise TransferError(
            f"layer {first} of the teacher has {attention} in place of softmax attention, so "
            f"transfer.method={method.name} has nothing to take from it; use block_output, feature or logits"
        )


def read_settings(**options: Any) -> TransferConfig:
    """Return the settings. Raises ConfigError: one sentence about the first that is not valid or changes nothing."""
    unknown = [name for name in options if name not in OF_DUAL]
    if unknown:
        raise ConfigError(f"unknown setting {unknown[0]!r}; {did_you_mean(unknown[0], OF_DUAL)}")
    try:
        settings = TransferConfig.model_validate(options)
    except ValidationError as error:
        raise explain(error, TransferConfig, "transfer") from error
    check_section(settings, "transfer")
    return settings


# One pass of a frozen teacher in a step, or its results from an earlier one.


def fill_tape(
    side: TeacherSide,
    view: nn.Module,
    tape: Tape,
    images: Tensor,
    taught: Mapping[str, Tensor | Step] | None,
    *,
    convert: bool,
) -> None:
    """Put on the tape what a teacher gives for the student's images: it runs, unless it was `taught` before.

    `convert`: give results of half precision the type of the student's.
    """
    given = None if taught is None else taught.get(side.name)
    if isinstance(given, Step):
        tape.take(given)
        return
    if taught is None:
        _run(side, view, images)
    else:
        _recall(side, tape, taught)
    if convert:
        _convert(side, tape, images)


def _run(side: TeacherSide, view: nn.Module, images: Tensor) -> None:
    """Run a teacher on the student's images. A teacher of half precision computes in it, whatever autocast says."""
    if side.model.training:
        side.model.eval()
    with torch.no_grad():
        if side.input.dtype is None:
            view(side.input(images))
            return
        with torch.autocast(images.device.type, enabled=False):
            view(side.input(images))


def _recall(side: TeacherSide, tape: Tape, taught: Mapping[str, Tensor | Step]) -> None:
    """Put on the tape what the teacher said of these images before."""
    prefix = f"{side.name}."
    for name, result in taught.items():
        if isinstance(result, Tensor) and name.startswith(prefix):
            tape.whole[name.removeprefix(prefix)] = result


def collect(tapes: Mapping[str, Tape]) -> dict[str, Tensor]:
    """Return the results of whole teachers that are on their tapes, for `fill_tape`."""
    return {f"{name}.{result}": found for name, tape in tapes.items() for result, found in tape.whole.items()}


def _convert(side: TeacherSide, tape: Tape, images: Tensor) -> None:
    """Give the results of a teacher of half precision the type of the student's."""
    if side.input.dtype is not None:
        device = images.device.type
        tape.convert(torch.get_autocast_dtype(device) if _autocast(images) else images.dtype)


def _autocast(images: Tensor) -> bool:
    return torch.is_autocast_enabled(images.device.type)
