"""A cell from its first step to its record: the student's stages, then what it costs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....checkpoints.architecture import published_config
from ....checkpoints.json_lines import read_records
from ....checkpoints.preprocessing import Preprocessing
from ....checkpoints.pretrained import Pretrained, load_pretrained
from ....checkpoints.student import FittedLayers
from ....models.attention.base import AttentionOperator
from ....models.calibration import fit_at_random
from ....models.conversion import convert, converted_layers, new_parameters
from ....models.errors import ConfigError, JsonDict
from ....models.families import sites
from ...config import RunConfig
from ...data.loaders import create_eval_loader
from ...engine.build import build
from ...engine.fit_operators import fit_student
from ...engine.modes import mode_of
from ...engine.stages import Stage, chain, train_stages
from ...engine.students import input_size, plan_student
from ...evaluate import evaluate
from ...recovery.layer_losses import can_learn
from .cell_record import Score
from .comparison_cells import Cell
from .layer_errors import layer_errors

ZERO_SHOT = "zero-shot"


@dataclass(frozen=True)
class Trained:
    """What the stages gave, and the two models that speed is measured on."""

    scores: list[Score]
    errors: dict[str, dict[int, float]]
    loaded: Pretrained

    @property
    def student(self) -> nn.Module:
        return self.loaded.model


def cell_stages(stages: Sequence[Stage], cell: Cell, folder: Path) -> list[Stage]:
    """Return the stages with the cell's plan, image size and folder; it is scored before the first step.

    Stages that align are left out for a plan that converts no layer, or whose layers cannot learn from their loss.

    Raises ConfigError: no stage is left.
    """
    student = {"plan": cell.plan, "img_size": cell.size}
    layers = converted_layers(fresh_model(stages[0].config, cell.plan, cell.size)).values()
    operators = [layer.operator for layer in layers]
    kept = [stage for stage in stages if not mode_of(stage.config).aligns or _can_align(stage, operators)]
    if not kept:
        raise ConfigError(
            f"no layer of {cell.plan!r} learns in {', '.join(stage.name for stage in stages)}: "
            "add a stage with mode transfer or finetune"
        )
    made = []
    for number, stage in enumerate(kept):
        engine = {"evaluate_start": number == 0, "evaluate_teacher": False, "progress": False}
        update = {
            "output_dir": folder,
            "student": stage.config.student.model_copy(update=student),
            "engine": stage.config.engine.model_copy(update=engine),
        }
        made.append(Stage(stage.name, stage.config.model_copy(update=update)))
    return made


def _can_align(stage: Stage, operators: Sequence[AttentionOperator]) -> bool:
    return any(can_learn(stage.config.align.match, operator) for operator in operators)


def fresh_model(config: RunConfig, plan: str | None, size: int) -> nn.Module:
    """Build the student with random weights, at any image size. Raises GraftError: it cannot be built."""
    student = config.student.model_copy(update={"plan": plan, "img_size": size})
    images = Preprocessing.read(published_config(student.model), input_size(student))
    return plan_student(student, config.data.num_classes or 10, None, images).create()


def is_linear(model: nn.Module) -> bool:
    """Return whether every attention layer costs linearly in the number of tokens."""
    layers = converted_layers(model)
    linear = [layer.operator for layer in layers.values()]
    return all(site.index in layers for site in sites(model) if site.num_heads) and all(
        isinstance(operator, AttentionOperator) and operator.traits.linear_cost for operator in linear
    )


def train_cell(stages: Sequence[Stage], cell: Cell, folder: Path, error_batches: int) -> Trained | int:
    """Run the stages from where they stand, and read their scores off their logs.

    Returns the signal that stopped them, where one did. Raises GraftError as `train`.
    """
    own = cell_stages(stages, cell, folder)
    stopped, steps = train_stages(own).signal, chain(own)
    if stopped is not None:
        return stopped
    student = load_pretrained(f"local-dir:{folder / 'student'}")
    errors = {} if stages[0].config.teacher.source is None else _errors(own, steps, error_batches)
    return Trained(stage_scores(steps), errors, student)


def stage_scores(steps: Sequence[Stage]) -> list[Score]:
    """Read the scores before the first step and at the end of each stage from `log.jsonl`."""
    scores = []
    for number, stage in enumerate(steps):
        records = read_records(stage.config.output_dir / "log.jsonl")
        if number == 0:
            scores += [_score(ZERO_SHOT, record, 0.0) for record in records[:1] if "test_top1" in record]
        seconds = sum(record["seconds"] for record in records if "n_parameters" in record)
        scored = [record for record in records if "test_top1" in record and record["step"] > 0]
        scores += [_score(stage.name, record, seconds) for record in scored[-1:]]
    return scores


def _score(name: str, record: JsonDict, seconds: float) -> Score:
    """Return the score of the trained weights; their average has scores of its own in the log."""
    top1, top5, loss = (float(record[f"test_{key}"]) for key in ("top1", "top5", "loss"))
    samples = record.get("test_samples")
    return Score(
        name,
        top1,
        top5,
        loss,
        seconds,
        int(record["step"]),
        samples=None if samples is None else int(samples),
    )


def _errors(own: Sequence[Stage], steps: Sequence[Stage], count: int) -> dict[str, dict[int, float]]:
    """Measure the layers' errors before the first step and after each stage."""
    teacher = teacher_of(own[0].config)
    images = test_images(own[0].config, teacher, count)
    parts = build(own[0].config)
    fit_student(own[0].config, parts, torch.device("cpu"), FittedLayers(steps[0].config.output_dir))
    start = parts.task.trainable
    students = {ZERO_SHOT: start} | {
        stage.name: load_pretrained(f"local-dir:{stage.config.output_dir / 'student'}").model
        for stage in steps
    }
    return {name: layer_errors(teacher.model, student, images) for name, student in students.items()}


def teacher_of(config: RunConfig) -> Pretrained:
    """Load the teacher at the size of the student's images."""
    how = config.teacher
    return load_pretrained(
        str(how.source),
        model=how.model,
        model_args=how.model_args,
        img_size=how.img_size or config.student.img_size,
        position_embedding=how.position_embedding,
        revision=how.revision,
        identified=True,
    )


def test_images(config: RunConfig, teacher: Pretrained, count: int) -> list[Tensor]:
    """Return the first batches of the test set, as the teacher wants them."""
    return [images for images, _, _ in itertools.islice(_loader(config, teacher), count)]


def score_teacher(config: RunConfig, teacher: Pretrained) -> Score | None:
    """Measure the teacher's accuracy; None where it has no head for these classes."""
    if not teacher.has_head:
        return None
    found = evaluate({"teacher": teacher.model}, _loader(config, teacher))["teacher"]
    return Score(ZERO_SHOT, found.top1, found.top5, found.loss, samples=found.samples)


def _loader(config: RunConfig, teacher: Pretrained) -> Any:
    return create_eval_loader(config.data, teacher.preprocessing)


def speed_models(config: RunConfig, plan: str | None, size: int) -> tuple[nn.Module, nn.Module]:
    """Build the unconverted model and the student with random weights, which are as fast as trained ones."""
    torch.manual_seed(0)
    softmax = fresh_model(config, None, size)
    if plan is None:
        return softmax, softmax
    student = convert(softmax, plan, without=config.student.without)
    fit_at_random(converted_layers(student))
    return softmax, student


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of all parameters, and of those that the conversion added."""
    return (
        sum(parameter.numel() for parameter in model.parameters()),
        sum(parameter.numel() for parameter in new_parameters(model)),
    )
