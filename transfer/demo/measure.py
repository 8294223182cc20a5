"""From the demo's finished runs to its results: accuracies, curves, the ensemble, maps and divergences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...checkpoints.preprocessing import Preprocessing
from ...checkpoints.teacher import load_teacher
from ...models.families import token_layout
from ...models.patches import unfold_patches
from ..analysis import attention_maps, divergence_by_layer
from ..data.loaders import EvalLoader, create_eval_loader, create_train_loader
from ..engine.runlog import read_log
from ..evaluate import evaluate
from .gaze_figures import Gaze
from .parts import STUDENTS, Part
from .results import DemoResults, MethodResult

SHOWN_CLASSES = (0, 3, 8)
SHOWN_LAYERS = (1, 3)
ENSEMBLE = ("finetune", "distill")


@dataclass(frozen=True)
class TestSet:
    """All test images as the models want them, (T, C, H, W), with their classes (T,)."""

    loader: EvalLoader
    images: Tensor
    targets: Tensor


def measure(parts: Sequence[Part], quick: bool) -> DemoResults:
    """Reads the finished runs of `demo_parts`; the ensemble and the attention maps are computed here."""
    teacher_part, first = parts[0], parts[1]
    seeds = list(dict.fromkeys(part.seed for part in parts[1:] if part.seed is not None))
    runs = {name: [part for part in parts if part.name == name] for name in STUDENTS}
    teacher, spec = load_student(teacher_part)
    test = load_test_set(first, spec)
    methods = [_method(name, runs[name], teacher, test.images) for name in STUDENTS]
    together = zip(*(runs[name] for name in ENSEMBLE), strict=True)
    methods.append(MethodResult("ensemble", [ensemble_top1(pair, test.loader) for pair in together]))
    shown = {name: load_student(runs[name][0])[0] for name in ("distill", "scratch")}
    return DemoResults(
        methods=methods,
        gazes=find_gazes({"teacher": teacher, "copy": teacher, **shown}, test),
        seeds=seeds,
        labels=first.config.data.train_samples or 0,
        unlabelled=create_train_loader(teacher_part.config.data, spec, seed=0).num_samples,
        test_images=len(test.images),
        teacher_steps=int(_records(teacher_part)[-1]["step"]),
        student_steps=int(_records(first)[-1]["step"]),
        minutes=sum(record["seconds"] for part in parts for record in _records(part)) / 60,
        quick=quick,
    )


def load_student(part: Part) -> tuple[nn.Module, Preprocessing]:
    """What a run left, frozen, and what its images look like."""
    loaded = load_teacher(f"local-dir:{part.folder / 'student'}")
    return loaded.model, loaded.preprocessing


def load_test_set(part: Part, spec: Preprocessing) -> TestSet:
    """The images that a run was evaluated on, padding left out."""
    loader = create_eval_loader(part.config.data, spec)
    batches = [(images[valid], targets[valid]) for images, targets, valid in loader]
    images, targets = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    return TestSet(loader, images, targets)


def ensemble_top1(parts: Sequence[Part], loader: EvalLoader) -> float:
    """Accuracy, in percent, of the mean of the models' probabilities."""
    models = {part.name: load_student(part)[0] for part in parts}
    return evaluate(models, loader)["ensemble"].top1


def find_gazes(models: Mapping[str, nn.Module], test: TestSet) -> list[Gaze]:
    """Where the brightest patch of the first test image of some classes looks, mean over heads."""
    teacher = models["teacher"]
    layout = token_layout(teacher)
    chosen = [int((test.targets == target).nonzero()[0]) for target in SHOWN_CLASSES]
    images = test.images[chosen]
    patch = (images.shape[2] // layout.grid[0], images.shape[3] // layout.grid[1])
    queries = unfold_patches(images, patch).mean(dim=-1).argmax(dim=1).tolist()
    maps = {name: attention_maps(model, images, SHOWN_LAYERS) for name, model in models.items()}
    gazes = []
    for place, query in enumerate(queries):
        for layer in SHOWN_LAYERS:
            rows = {
                name: by_layer[layer][place].mean(dim=0)[layout.num_prefix + query, layout.num_prefix :]
                for name, by_layer in maps.items()
            }
            gazes.append(
                Gaze(
                    image=images[place].mean(dim=0).numpy(),
                    query=divmod(query, layout.grid[1]),
                    layer=f"layer {layer + 1}",
                    maps={name: row.reshape(layout.grid).numpy() for name, row in rows.items()},
                )
            )
    return gazes


def _method(name: str, runs: Sequence[Part], teacher: nn.Module, images: Tensor) -> MethodResult:
    curves = [[(r["step"], r["test_top1"]) for r in _records(part) if "test_top1" in r] for part in runs]
    return MethodResult(
        name,
        top1=[curve[-1][1] for curve in curves],
        steps=[int(step) for step, _ in curves[0]],
        curve=[[top1 for _, top1 in curve] for curve in curves],
        divergence=[_divergence(part, teacher, images) for part in runs],
    )


def _divergence(part: Part, teacher: nn.Module, images: Tensor) -> list[float]:
    """By layer. A copying student attends by the teacher's maps: its own projections were never trained."""
    student = teacher if part.name == "copy" else load_student(part)[0]
    return divergence_by_layer(teacher, student, images)


def _records(part: Part) -> list[dict[str, float]]:
    """The epoch records of a run's log."""
    return [record for record in read_log(part.folder / "log.jsonl") if "n_parameters" in record]
