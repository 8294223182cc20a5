"""Teacher and student side by side: one call a step, on the same images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ...checkpoints.pretrained import Pretrained
from ...models.conversion import converted_layers
from ...models.copied import CopiedTeacher, Copying, copied_layers
from ...models.copying.input import Normalization as Normalization
from ...models.copying.input import TeacherInput
from ...models.copying.tape import Tape
from ...models.errors import ConfigError, TransferError, did_you_mean
from ...models.families import check_supported, image_channels
from ...models.json_types import JsonDict
from ...models.replay import replay_blocks, restore_blocks
from ..config import TransferConfig
from .drop_path import share_drop_paths
from .lessons import Changes, begin_lesson, check_free, end_lesson
from .method import Pairing, TransferMethod
from .registry import find_method
from .transfer_plan import TransferPlan, resolve_plan


@dataclass
class DualOutput:
    """The student's logits, the weighted transfer loss (a float32 scalar), and its unweighted parts by layer."""

    logits: Tensor
    transfer_loss: Tensor
    parts: dict[str, Tensor]


class DualViT(nn.Module):
    """A student that is taught by a frozen teacher, by copying or distilling its attention.

    `method` and the keywords are those of `TransferConfig`. Teacher and student are timm models of the plain
    ViT families (`graftvit.models.families.SUPPORTED`). The teacher is never registered: it is not trained, not
    in the state dict, and stays in eval mode. The student stays an ordinary timm model, with its own state
    dict; while it is taught, its attention layers are hosted (`release` puts timm's own back).

    Without normalizations, each model's `pretrained_cfg` says how its images are normalised; `forward` takes
    images as the student wants them. A student on the meta device has no heads to match: `heads=match` stays open.
    """

    _in_use = False

    def __init__(
        self,
        teacher: nn.Module | Pretrained,
        student: nn.Module,
        method: str = "distill",
        *,
        teacher_normalization: Normalization | None = None,
        student_normalization: Normalization | None = None,
        calibration: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.config = _settings(method=method, **options)
        self.method = find_method(self.config.method)
        if isinstance(teacher, Pretrained):
            teacher_normalization = teacher_normalization or Normalization(teacher.mean, teacher.std)
            teacher = teacher.model
        check_free(teacher, student)
        for model in (teacher, student):
            end_lesson(model)
        _check_teacher(teacher, self.method)
        check_supported(student)
        self.student = student
        self._teacher = (teacher.eval().requires_grad_(False),)
        self._normalizations = (
            teacher_normalization or pretrained_normalization(teacher),
            student_normalization or pretrained_normalization(student),
        )
        self.teacher_input = TeacherInput(teacher, student, *self._normalizations)
        plan = resolve_plan(self.config, teacher, student)
        if plan.needs_calibration and not next(student.parameters()).is_meta:
            plan = plan.calibrated(teacher, student, self.teacher_input, calibration)
        self._install(plan)

    @property
    def teacher(self) -> nn.Module:
        """The whole frozen teacher."""
        return self._teacher[0]

    @property
    def teacher_part(self) -> nn.Module:
        """What of the teacher a step runs."""
        return self._view[0]

    @property
    def needs_teacher(self) -> bool:
        """Whether the student is nothing without its teacher: true for the copy methods."""
        return self.method.copies

    def forward(self, images: Tensor) -> DualOutput:
        """One step on images (B, C, H, W) as the student wants them."""
        self._check_in_use()
        self._tape.begin(self.teacher_input.grids(images, self.plan.grids))
        try:
            self._run_teacher(images)
            logits = self._run_student(images)
            parts = self._losses(logits)
        finally:
            self._tape.end()
        total = torch.zeros((), device=images.device)
        for loss in parts.values():
            total = total + loss
        if self.config.reduction == "mean" and parts:
            total = total / len(parts)
        return DualOutput(logits, self.config.weight * total, parts)

    def predict(self, images: Tensor) -> Tensor:
        """The student's logits; the teacher runs only for the copy methods."""
        if self.needs_teacher:
            return self.forward(images).logits
        logits: Tensor = self.student(images)
        return logits

    def train(self, mode: bool = True) -> DualViT:
        """Set the student's mode; the teacher stays in eval mode."""
        super().train(mode)
        return self

    def with_student(self, student: nn.Module) -> DualViT:
        """The same teacher, settings and resolved heads around another student, such as a moving average."""
        check_free(self.teacher, student)
        end_lesson(student)
        twin = DualViT.__new__(DualViT)
        nn.Module.__init__(twin)
        twin.config, twin._teacher, twin._normalizations = self.config, self._teacher, self._normalizations
        twin.method = self.method
        twin.student, twin.teacher_input = student, self.teacher_input
        twin._install(self.plan)
        twin.train(student.training)
        return twin

    def release(self) -> nn.Module:
        """The student as plain timm made it: its own attention layers, every parameter trainable again.

        It is then no longer taught: `forward` is refused.
        """
        if self._in_use:
            end_lesson(self.student)
            self._in_use = False
        return self.student

    def copying(self, teacher: CopiedTeacher) -> Copying:
        """What the student of a copy method copies, of a teacher that is built as described."""
        links = self.plan.links
        pairs, heads = tuple(link.pair for link in links), tuple(link.heads.groups for link in links)
        return Copying(self.config.method, pairs, heads, self._normalizations[1], teacher)

    def describe(self) -> str:
        """What goes from where to where, in words."""
        return "\n".join([*self.plan.describe(), *self.teacher_input.describe()])

    def __setstate__(self, state: JsonDict) -> None:
        super().__setstate__(state)
        if self._in_use:  # of a copy, the lesson is its own
            begin_lesson(self.teacher, self.student, self, self._changes)

    def _install(self, plan: TransferPlan) -> None:
        self.plan, self._tape, self._changes = plan, Tape(), Changes()
        begin_lesson(self.teacher, self.student, self, self._changes)
        try:
            pairing = Pairing(self.config, plan, self.teacher, self.student, self._tape, self._changes)
            installed = self.method.install(pairing)
            share = self.config.share_drop_path
            shared = share_drop_paths(self.student, installed.view, self._tape) if share else []
        except BaseException:
            end_lesson(self.student)
            raise
        if len(installed.projectors) and not any(each.requires_grad for each in self.student.parameters()):
            end_lesson(self.student)
            raise TransferError(
                "every weight of the student is frozen, so the projectors alone would learn: call requires_grad_(True) "
                "of it, or of the part that shall learn"
            )
        self._view, self._finish = (installed.view,), installed.finish
        self.projectors = installed.projectors.to(next(self.student.parameters()))
        self._drop_paths = tuple(shared)
        self._in_use = True

    def _check_in_use(self) -> None:
        if not self._in_use:
            raise TransferError(
                "this DualViT was released and teaches nobody: call its student, or make another DualViT"
            )

    def _run_teacher(self, images: Tensor) -> None:
        if self.training:
            for drop_path in self._drop_paths:
                drop_path.draw(images.shape[0], images)
        if self.teacher.training:
            self.teacher.eval()
        with torch.no_grad():
            self._view[0](self.teacher_input(images))

    def _run_student(self, images: Tensor) -> Tensor:
        replay_blocks(self.student, self._tape.moment)
        try:
            logits: Tensor = self.student(images)
        finally:
            restore_blocks(self.student)
        return logits

    def _losses(self, logits: Tensor) -> dict[str, Tensor]:
        """The unweighted losses of a step, layer by layer in the order of the plan."""
        if self._finish is not None:
            return self._finish(logits)
        losses = self._tape.losses
        layers = [] if self.needs_teacher else [link.pair.student for link in self.plan.links]
        if any(layer not in losses for layer in layers):
            raise TransferError(
                "layers of the student gave no loss: it was compiled before it was taught, or its blocks were "
                "replaced; wrap the plain model, and compile the DualViT"
            )
        return {f"layer{layer:02d}": losses[layer] for layer in layers}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DualViT:
        # The teacher follows the student to a device although it is not registered.
        self.teacher._apply(fn)
        super()._apply(fn, recurse)
        return self


def _check_teacher(teacher: nn.Module, method: TransferMethod) -> None:
    check_supported(teacher, copied=True)
    others = {index: str(layer.choice) for index, layer in converted_layers(teacher).items()}
    others |= dict.fromkeys(copied_layers(teacher), "the attention of a teacher of its own")
    if others and method.uses_heads:
        first, attention = next(iter(others.items()))
        raise TransferError(
            f"layer {first} of the teacher has {attention} in place of softmax attention, so "
            f"transfer.method={method.name} has nothing to take from it; use block_output, feature or logits"
        )


def _settings(**options: Any) -> TransferConfig:
    """The settings, with pydantic's findings as one sentence."""
    unknown = [name for name in options if name not in TransferConfig.model_fields]
    if unknown:
        raise ConfigError(
            f"unknown setting {unknown[0]!r}; {did_you_mean(unknown[0], TransferConfig.model_fields)}"
        )
    try:
        return TransferConfig(**options)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise ConfigError(f"transfer.{name} is {options[name]!r}, but: {first['msg']}") from error


def pretrained_normalization(model: nn.Module) -> Normalization:
    """Mean and standard deviation from a timm model's `pretrained_cfg`; ImageNet's where it has none."""
    config = getattr(model, "pretrained_cfg", None) or {}
    mean: Sequence[float] = config.get("mean", (0.485, 0.456, 0.406))
    std: Sequence[float] = config.get("std", (0.229, 0.224, 0.225))
    channels = image_channels(model)
    if len(mean) != channels:
        mean, std = mean[:1], std[:1]
    return Normalization(tuple(mean), tuple(std))


def build_dual(
    config: TransferConfig,
    teacher: Pretrained,
    student: nn.Module,
    student_normalization: Normalization,
    calibration: Tensor | None = None,
) -> DualViT:
    """The wrapper that a configuration describes."""
    return DualViT(
        teacher,
        student,
        student_normalization=student_normalization,
        calibration=calibration,
        **{name: getattr(config, name) for name in type(config).model_fields},
    )
