"""What an evaluation during a run measures: of the student, of its average and of its teacher."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from ...checkpoints.class_names import Head, places
from ...models.errors import DataError
from ..data.loaders import EvalLoader
from ..data.sampler import preserved, seed_batch
from ..metrics.distance import Reader, compared_layers, exact, summed
from ..metrics.measure import PROBES, Against, Family, measure, score_models
from . import deadline
from .build import Parts
from .modes import Criterion, classifies
from .optim import WeightAverage
from .tasks import Task, TransferTask

Predictor = Callable[[Tensor], Tensor]


def score(parts: Parts, average: WeightAverage | None, accelerator: Accelerator) -> dict[str, float]:
    """`test_top1` and the rest by name, and `test_ema_…` where there is an average; nothing without test images.

    Top-1, top-5 and loss where the head's classes are those of the labels; besides them what picks the best state.
    Leaves the random generators and the train mode as they were: evaluating more often does not change a run.
    """
    loader, task = parts.eval_loader, parts.task
    if loader is None:
        return {}
    training = task.training
    task.eval()
    with preserved(), torch.no_grad():
        numbers = _own(task, loader, average, accelerator) or _measured(parts, loader, average, accelerator)
        if parts.choice is not None and parts.choice.kind == "objective":
            numbers |= _objectives(task, loader, average, accelerator)
    task.train(training)
    return numbers


def _own(
    task: Task, loader: EvalLoader, average: WeightAverage | None, accelerator: Accelerator
) -> dict[str, float]:
    """Return the numbers of a task that evaluates itself; none of a classifier."""
    found = {f"test_{name}": value for name, value in (task.evaluate(loader, accelerator) or {}).items()}
    if found and average is not None:
        with average.applied():
            averaged = task.evaluate(loader, accelerator) or {}
        found |= {f"test_ema_{name}": value for name, value in averaged.items()}
    return found


def best_value(choice: Criterion, metrics: dict[str, float]) -> float:
    """Return the number that picks the best state: the average's where there is one."""
    return metrics.get(f"test_ema_{choice.key}", metrics[f"test_{choice.key}"])


def teacher_top1(parts: Parts, accelerator: Accelerator) -> float | None:
    """Top-1 of the teacher on the test set, where it has a head for these classes."""
    task, teacher, loader = parts.task, parts.teacher, parts.eval_loader
    if teacher is None or loader is None or not isinstance(task, TransferTask) or not teacher.has_head:
        return None
    if not classifies(Head(getattr(teacher.model, "num_classes", 0), teacher.label_names), loader):
        return None
    dual, columns = task.dual, places(teacher.label_names, loader.class_names)

    def predict(images: Tensor) -> Tensor:
        logits: Tensor = dual.teacher(dual.teacher_input(images))
        return logits if columns is None else logits[:, columns]

    with preserved(), torch.no_grad():
        results = score_models(
            {"teacher": _autocast(predict, accelerator)}, loader, accelerator=accelerator, ensemble=False
        )
    return float(results["teacher"].top1)


def _measured(
    parts: Parts, loader: EvalLoader, average: WeightAverage | None, accelerator: Accelerator
) -> dict[str, float]:
    families: list[Family] = ["top1"] if parts.classified else []
    if parts.choice is not None and parts.choice.kind in ("distance", *PROBES):
        families.append(parts.choice.kind)
    if not families:
        return {}
    task = parts.task
    against = _against(parts, accelerator) if "distance" in families else None
    layers = () if against is None else against.layers["test"].student
    predict = _autocast(_by_name(parts, loader), accelerator)
    readers = {"test": Reader(task.backbone, predict, layers)}
    if average is not None:
        readers["test_ema"] = Reader(task.backbone, average.predictor(predict), layers)
    results = measure(
        readers,
        dict.fromkeys(readers, families),
        loader,
        reference=parts.reference_loader,
        against=against,
        accelerator=accelerator,
        ensemble=False,
    )
    return {
        f"{name}_{key}": value
        for name, numbers in results.items()
        for key, value in numbers.items()
        if key != "samples" or name == "test"
    }


def _by_name(parts: Parts, loader: EvalLoader) -> Predictor:
    """Return the student's logits, in the order that the labels have where it has the same classes."""
    predict, names = parts.task.predict, parts.plan.label_names
    columns = places(names, loader.class_names) if parts.classified else None
    return predict if columns is None else lambda images: predict(images)[:, columns]


def _against(parts: Parts, accelerator: Accelerator) -> Against | None:
    teacher, task = parts.teacher, parts.task
    if teacher is None or task.teacher_input is None:
        return None
    model, shown = teacher.model.to(accelerator.device), task.teacher_input
    layers = compared_layers(model, task.backbone)

    def predict(images: Tensor) -> Tensor:
        return model(shown(images))

    reader = Reader(model, _autocast(predict, accelerator), layers.teacher)
    return Against(reader, dict.fromkeys(("test", "test_ema"), layers))


def _objectives(
    task: Task, loader: EvalLoader, average: WeightAverage | None, accelerator: Accelerator
) -> dict[str, float]:
    """Return the mean of the run's own loss over the test images, the same draws each time."""
    numbers = {"test_objective": _objective(task, loader, accelerator)}
    if average is not None:
        with average.applied():
            numbers["test_ema_objective"] = _objective(task, loader, accelerator)
    return numbers


def _objective(task: Task, loader: EvalLoader, accelerator: Accelerator) -> float:
    device = accelerator.device
    total = torch.zeros(2, dtype=exact(device), device=device)
    for number, (images, targets, valid) in enumerate(loader):
        count = int(valid.sum())
        if count:  # a batch of padding alone is run for the sake of the other processes
            images, targets = images[valid], targets[valid]
        seed_batch(0, 0, number * accelerator.num_processes + accelerator.process_index, device)
        with accelerator.autocast():
            loss = task(images.to(device), targets.to(device))["loss"]
        deadline.moved()
        total += torch.stack([loss.to(total) * count, total.new_tensor(count)])
    loss_sum, images_seen = summed(total).tolist()
    if not images_seen:
        raise DataError("no test image can be read, so that the run's own loss cannot be measured on them")
    return float(loss_sum / images_seen)


def _autocast(predict: Predictor, accelerator: Accelerator) -> Predictor:
    def run(images: Tensor) -> Tensor:
        deadline.moved()
        with accelerator.autocast():
            return predict(images)

    return run
