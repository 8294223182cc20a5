"""Accuracy of the student, of its average and of its teacher during a run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.loaders import EvalLoader
from ..evaluate import evaluate
from .build import Parts
from .ema import WeightAverage
from .randomness import preserved
from .tasks import Task, TransferTask

Predictor = Callable[[Tensor], Tensor]


def score(
    task: Task, average: WeightAverage | None, loader: EvalLoader, accelerator: Accelerator
) -> dict[str, float]:
    """`test_top1`, `test_top5`, `test_loss`, and `test_ema_…` where there is an average, in one pass.

    Leaves the random generators and the train mode as they were: evaluating more often does not change a run.
    """
    models: dict[str, Predictor] = {"test": _autocast(task.predict, accelerator)}
    if average is not None:
        models["test_ema"] = average.predictor(models["test"])
    training = task.training
    task.eval()
    with preserved(), torch.no_grad():
        results = evaluate(models, loader, accelerator=accelerator, ensemble=False)
    task.train(training)
    return {
        f"{name}_{key}": getattr(metrics, key)
        for name, metrics in results.items()
        for key in ("top1", "top5", "loss")
    }


def teacher_top1(parts: Parts, accelerator: Accelerator) -> float | None:
    """Top-1 of the teacher on the test set, where it has a head for these classes."""
    task, teacher, loader = parts.task, parts.teacher, parts.eval_loader
    if teacher is None or loader is None or not isinstance(task, TransferTask) or not teacher.has_head:
        return None
    if getattr(teacher.model, "num_classes", None) != loader.num_classes:
        return None
    dual = task.dual

    def predict(images: Tensor) -> Tensor:
        logits: Tensor = dual.teacher(dual.teacher_input(images))
        return logits

    with preserved(), torch.no_grad():
        results = evaluate(
            {"teacher": _autocast(predict, accelerator)}, loader, accelerator=accelerator, ensemble=False
        )
    return float(results["teacher"].top1)


def _autocast(predict: Predictor, accelerator: Accelerator) -> Predictor:
    def run(images: Tensor) -> Tensor:
        with accelerator.autocast():
            return predict(images)

    return run
