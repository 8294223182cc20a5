"""Export the student of a finished run, and its average, in timm's layout."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from ...checkpoints import provenance
from ...checkpoints.student import write_student
from ...models.copied import copy_attention
from ...models.errors import GraftError, Json
from ...models.lora import merged
from ..data.randomness import preserved
from .build import Parts
from .ema import WeightAverage
from .fence import Fence
from .parallel import gathered, raise_together
from .tasks import PretrainTask


def export_students(
    parts: Parts,
    average: WeightAverage | None,
    folder: Path,
    meta: Json,
    *,
    fence: Fence,
    writes: bool,
    group: dist.ProcessGroup | None,
) -> None:
    """Write `student/` and `student_ema/`; for a masked autoencoder, only the encoder.

    The weights are loaded into a new timm model of the same arguments, so it contains nothing of the training; a
    student that copies attention gets the part of the teacher that it needs. `meta` is the meta part of a state.
    All processes must call it; only the first one writes.
    """
    named = {"student": gathered(parts.task.trainable.state_dict(), keep=writes)}
    if average is not None:
        # Integer buffers have no average: use the student's own.
        named["student_ema"] = named["student"] | gathered(average.average, keep=writes)
    error: GraftError | None = None
    if writes:
        try:
            for name, tensors in named.items():
                made = provenance.of_state(meta, "ema" if name == "student_ema" else "student")
                with fence.guard():
                    _export(parts, tensors, folder / name, made)
        except GraftError as failure:
            failure.exit_code = 1
            error = failure
    raise_together(error, group)


def _export(parts: Parts, tensors: dict[str, Tensor], folder: Path, made: Json) -> None:
    if isinstance(parts.task, PretrainTask):
        prefix = "encoder."
        tensors = {
            name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
        }
    with preserved():
        model = parts.plan.create()
    model.load_state_dict(merged(tensors))
    plan = parts.plan
    if plan.copying is not None and parts.teacher is not None:
        copy_attention(model, parts.teacher.model, plan.copying)
    write_student(
        model,
        folder,
        architecture=plan.architecture,
        model_args=plan.arguments,
        preprocessing=plan.preprocessing,
        license=provenance.carried_license(made),
        provenance=made,
        label_names=plan.label_names,
    )
