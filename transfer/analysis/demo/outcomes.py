"""From the demo's finished cells to its results: accuracies, curves, the ensemble, maps and divergences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....checkpoints.preprocessing import Preprocessing
from ....checkpoints.pretrained import load_pretrained
from ....models.families import token_layout
from ....models.parts import unfold_patches
from ...data.loaders import EvalLoader, create_eval_loader, create_train_loader
from ...evaluate import evaluate
from ..maps import attention_maps, divergence_by_layer
from .demo_cells import STUDENTS, TEACHERS, Cell
from .gaze_figures import Gaze
from .results import DemoResults, MethodResult

SHOWN_CLASSES = (0, 3, 8)
SHOWN_LAYERS = (1, 3)
ENSEMBLE = ("finetune", "distill")
"""The methods of the masked autoencoder's students whose probabilities are averaged."""


@dataclass(frozen=True)
class TestSet:
    """All test images as the models want them, (T, C, H, W), with their classes (T,)."""

    loader: EvalLoader
    images: Tensor
    targets: Tensor


def measure(cells: Sequence[Cell], quick: bool) -> DemoResults:
    """Read the finished `demo_cells`, and compute the ensemble and the attention maps."""
    made = {cell.teacher: cell for cell in cells if cell.method == "teacher" and cell.teacher is not None}
    runs = {
        (method, teacher): [cell for cell in cells if (cell.method, cell.teacher) == (method, teacher)]
        for method, teacher in STUDENTS
    }
    loaded = {name: load_student(made[name]) for name in TEACHERS}
    teachers = {name: model for name, (model, _) in loaded.items()}
    spec = loaded["supervised"][1]
    scratch = runs["scratch", None]
    test = load_test_set(scratch[0], spec)
    methods = [_method(found) for found in runs.values()]
    divergences = {}
    for name, teacher in teachers.items():
        shown = {method: found for (method, of), found in runs.items() if of in (name, None)}
        divergences[name] = _divergences(teacher, shown, test.images)
    together = zip(*(runs[method, "mae"] for method in ENSEMBLE), strict=True)
    top1 = [ensemble_top1(pair, test.loader) for pair in together]
    methods.append(MethodResult("ensemble", "mae", top1))
    distilled = {name: load_student(runs["distill", name][0])[0] for name in TEACHERS}
    return DemoResults(
        methods=methods,
        divergences=divergences,
        gazes=find_gazes(
            {
                "supervised": teachers["supervised"],
                "distill_supervised": distilled["supervised"],
                "mae": teachers["mae"],
                "distill_mae": distilled["mae"],
                "scratch": load_student(scratch[0])[0],
            },
            test,
        ),
        seeds=[cell.seed for cell in scratch if cell.seed is not None],
        labels=scratch[0].config.data.train_samples or 0,
        all_labels=create_train_loader(made["supervised"].config.data, spec, seed=0).num_samples,
        test_images=len(test.images),
        teacher_top1=made["supervised"].curve()[-1][1],
        teacher_steps={name: int(made[name].records()[-1]["step"]) for name in TEACHERS},
        student_steps=int(scratch[0].records()[-1]["step"]),
        minutes=sum(record["seconds"] for cell in cells for record in cell.records()) / 60,
        quick=quick,
    )


def load_student(cell: Cell) -> tuple[nn.Module, Preprocessing]:
    """Load the student of a run, frozen, and the preprocessing of its images."""
    loaded = load_pretrained(f"local-dir:{cell.folder / 'student'}")
    return loaded.model, loaded.preprocessing


def load_test_set(cell: Cell, spec: Preprocessing) -> TestSet:
    """Load the images that a run was evaluated on, without padding."""
    loader = create_eval_loader(cell.config.data, spec)
    batches = [(images[valid], targets[valid]) for images, targets, valid in loader]
    images, targets = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    return TestSet(loader, images, targets)


def ensemble_top1(cells: Sequence[Cell], loader: EvalLoader) -> float:
    """Return the accuracy, in percent, of the mean of the models' probabilities."""
    models = {cell.method: load_student(cell)[0] for cell in cells}
    return evaluate(models, loader)["ensemble"].top1


def find_gazes(models: Mapping[str, nn.Module], test: TestSet) -> list[Gaze]:
    """Find where the brightest patch of the first test image of three classes looks, mean over heads."""
    layout = token_layout(next(iter(models.values())))
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


def _method(cells: Sequence[Cell]) -> MethodResult:
    curves = [cell.curve() for cell in cells]
    return MethodResult(
        cells[0].method,
        cells[0].teacher,
        top1=[curve[-1][1] for curve in curves],
        steps=[step for step, _ in curves[0]],
        curve=[[top1 for _, top1 in curve] for curve in curves],
    )


def _divergences(
    teacher: nn.Module, runs: Mapping[str, Sequence[Cell]], images: Tensor
) -> dict[str, list[list[float]]]:
    """Return divergences by method, seed and layer. A copying student attends by the teacher's maps."""
    return {
        method: [
            divergence_by_layer(teacher, teacher if method == "copy" else load_student(cell)[0], images)
            for cell in cells
        ]
        for method, cells in runs.items()
    }
