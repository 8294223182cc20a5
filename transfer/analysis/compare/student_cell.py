"""A cell from its first step to its record: the student's stages, then what it costs."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ....checkpoints.architecture import published_config
from ....checkpoints.files import open_regular, read_records
from ....checkpoints.preprocessing import Preprocessing
from ....checkpoints.pretrained import describe_model, load_pretrained
from ....checkpoints.provenance import Pretrained
from ....checkpoints.safety import open_archive, read_arrays
from ....checkpoints.student import FittedLayers
from ....models.attention.base import AttentionOperator
from ....models.calibration import fit_at_random
from ....models.conversion import convert, converted_layers, new_parameters
from ....models.cost import attention_macs, count_operations, counted_macs
from ....models.errors import ConfigError, GraftError, JsonDict
from ....models.families import image_channels, sites
from ....models.small import without_memory
from ...align import can_learn
from ...cells import save_record
from ...config import DataConfig, RunConfig
from ...data.loaders import create_eval_loader
from ...engine.build import build, load_teachers, settled
from ...engine.fit_operators import fit_student
from ...engine.goals import Models
from ...engine.modes import mode_of
from ...engine.stages import Stage, chain, check_stages, train_stages
from ...engine.students import input_size, plan_student
from ...metrics.measure import score_models
from ..benchmark import macs_beside
from ..benchmark_cases import load_average, machine, peak_bytes, step_of, time_steps
from ..layer_maps import layer_maps, preprocessed, spread_images
from ..report.ink import Array, Panel, write_arrays
from ..visualize.map_figures import Query, default_query
from ..visualize.map_page import to_pixels
from ..visualize.visualize import token_layouts
from .comparison_cells import Cell, Comparison, Record, Score, Speed, layer_errors

# Where a cell's model looks: the mean of the heads for one query on a few test images, kept in the cell's folder.

logger = logging.getLogger(__name__)

FILE = "attention.npz"
IMAGES, LAYERS = 2, 3
"""The most images and layers of a cell."""


@dataclass(frozen=True)
class CellMaps:
    """What is kept of a cell: the images (H, W, 3) in bytes, and by image and layer the mean of the heads' weights."""

    query: str
    pictures: list[Array]
    maps: dict[tuple[int, int], Panel]

    @property
    def layers(self) -> list[int]:
        return sorted({layer for _, layer in self.maps})


def keep_maps(loaded: Pretrained, data: DataConfig, folder: Path) -> None:
    """Write the maps of a model to its cell. A model or data set that has none is named in the log, and leaves no file.

    Raises WriteFailedError as `write_file`.
    """
    try:
        found = read_maps(loaded, data)
    except GraftError as error:
        logger.warning("%s: no attention maps: %s", folder.name, error)
        return
    arrays: dict[str, Array] = {"query": np.array(found.query), "pictures": np.stack(found.pictures)}
    for (image, layer), each in found.maps.items():
        name = f"{image}.{layer}"
        arrays[f"{name}.heat"], arrays[f"{name}.extent"] = each.heat, np.array(each.extent)
        arrays[f"{name}.grid"], arrays[f"{name}.asking"] = np.array(each.grid), np.array(each.asking or ())
    write_arrays(folder / FILE, arrays)


def load_maps(folder: Path) -> CellMaps | None:
    """Return the maps of a cell; None where it has kept none, such as those of a stream.

    Raises ConfigError: the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with open_regular(path, refusal=ConfigError) as file:
            size = file.seek(0, os.SEEK_END)
            with open_archive(file) as archive:
                return _to_maps(read_arrays(archive, size))
    except ConfigError:
        raise
    except Exception as error:  # a damaged file fails in as many ways as there are readers
        raise ConfigError(
            f"{path} is damaged ({error}): remove it, and the report has no maps of it"
        ) from error


def _to_maps(arrays: Mapping[str, Array]) -> CellMaps:
    """Return the maps that `keep_maps` wrote. Raises ValueError, TypeError or KeyError: it did not write these."""
    maps = {}
    for name in (name.removesuffix(".heat") for name in arrays if name.endswith(".heat")):
        image, layer = map(int, name.split("."))
        heat = arrays[f"{name}.heat"]
        height, width = map(float, arrays[f"{name}.extent"])
        rows, columns = map(int, arrays[f"{name}.grid"])
        asking = tuple(map(int, arrays[f"{name}.asking"]))
        if heat.dtype.kind != "f" or heat.ndim != 2 or not np.isfinite(heat).all():
            raise ValueError(f"its {name}.heat is no map")
        if not (0 < height <= 1 and 0 < width <= 1 and rows > 0 and columns > 0 and len(asking) in (0, 2)):
            raise ValueError(f"its map {name} has no place in an image")
        asks = (rows, columns), (asking[0], asking[1]) if asking else None
        maps[image, layer] = Panel(heat, (height, width), *asks, signed=bool((heat < 0).any()))
    found = CellMaps(str(arrays["query"]), list(arrays["pictures"]), maps)
    if arrays["pictures"].dtype != np.uint8 or arrays["pictures"].shape[3:] != (3,):
        raise ValueError("its pictures are no images")
    if not maps or sorted(maps) != sorted(product(range(len(found.pictures)), found.layers)):
        raise ValueError("it lacks maps of some images")
    return found


def read_maps(loaded: Pretrained, data: DataConfig) -> CellMaps:
    """Compute the maps of a model for its default query, on test images that are spread over the data set.

    Raises GraftError: a model without maps, or images that cannot be read.
    """
    model, spec = loaded.model, loaded.preprocessing
    channels, *sides = spec.input_size
    query = default_query(token_layouts(model), (sides[0], sides[1]))
    data = data.model_copy(update={"workers": 0})
    source = spread_images(data, channels, IMAGES)
    images = torch.cat(list(preprocessed(source, data, spec, IMAGES)))
    pictures = [to_pixels(image[None], spec) for image in images]
    return CellMaps(query.title(token_layouts(model)), pictures, _maps(loaded, images, query))


def _maps(loaded: Pretrained, images: torch.Tensor, query: Query) -> dict[tuple[int, int], Panel]:
    model, layouts = loaded.model, token_layouts(loaded.model)
    depth = len(sites(model))
    tokens = {layer: layouts[layer] for layer in sorted({0, depth // 2, depth - 1})[-LAYERS:]}
    asked = ((layer, query.token(layout)) for layer, layout in tokens.items())
    wanted = {layer: token for layer, token in asked if token is not None}
    seen = layer_maps(model, images, list(wanted), asking=wanted)
    maps: dict[tuple[int, int], Panel] = {}
    for layer, layout in tokens.items():
        for image in range(len(images)):
            heat, extent = np.zeros((0, 0), np.float32), (1.0, 1.0)
            if layer in seen:
                places, row = seen[layer].places, seen[layer].weights[image, :, 0].mean(0)
                heat, extent = places.picture(row.cpu(), wanted[layer]).numpy(), places.extent
            maps[image, layer] = Panel(heat, extent, layout.grid, query.patch(layout))
    return maps


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
    kept = [
        stage
        for stage in stages
        if not stage.config.facts.aligns
        or any(can_learn(stage.config.align.match, each) for each in operators)
    ]
    if not kept:
        raise ConfigError(
            f"no layer of {cell.plan!r} learns in {', '.join(stage.name for stage in stages)}: "
            "add a stage with mode transfer or finetune"
        )
    made = []
    for number, stage in enumerate(kept):
        engine = {
            "evaluate_start": number == 0,
            "evaluate_teacher": False,
            "progress": False,
            "report": False,
        }
        update = {
            "output_dir": folder,
            "student": stage.config.student.model_copy(update=student),
            "engine": stage.config.engine.model_copy(update=engine),
        }
        made.append(Stage(stage.name, stage.config.model_copy(update=update)))
    return made


def check_cell(
    comparison: Comparison, cell: Cell, teachers: Callable[[str, int], Mapping[str, Pretrained]]
) -> None:
    """Build what each stage of a student trains, without weights or data; `teachers` are those of a stage at a size.

    Raises GraftError: a stage refuses its settings or the student.
    """
    own = cell_stages(comparison.stages_of(cell), cell, comparison.cell_folder(cell))
    check_stages(own)
    student = own[0].config.student
    images = Preprocessing.read(published_config(student.model), input_size(student))
    for stage in own:
        mode, found = mode_of(stage.config), teachers(stage.name, cell.size)
        classes = next(
            (int(getattr(each.model, "num_classes", 0)) for each in found.values() if each.has_head), None
        )
        with without_memory():
            model = fresh_model(stage.config, cell.plan, cell.size, classes)
        try:
            mode.freeze(mode.task(Models(model, found, images, lambda: None)).trainable)
        except GraftError as error:
            raise ConfigError(f"stage {stage.name}: {error}") from error


def describe_teachers(comparison: Comparison, stage: str, size: int) -> dict[str, Pretrained]:
    """Return the teachers of a stage by name, without published weights; one that a recipe makes has none.

    Raises GraftError: one cannot be loaded.
    """
    config = next(each.config for each in comparison.stages if each.name == stage)
    made = None
    if comparison.teacher is not None:
        recipe = settled(comparison.teacher)
        with without_memory():
            made = describe_model(fresh_model(recipe, recipe.student.plan, config.teacher.image_size(size)))
    return load_teachers(mode_of(config), (size, size), loaded=made, weights=False)


def fresh_model(
    config: RunConfig, plan: str | None, size: int | tuple[int, int] | None, classes: int | None = None
) -> nn.Module:
    """Build the student with random weights, at any image size. Raises GraftError: it cannot be built.

    `classes` is the number of classes where the settings have none.
    """
    student = config.student.model_copy(update={"plan": plan, "img_size": size})
    images = Preprocessing.read(published_config(student.model), input_size(student))
    return plan_student(student, config.data.num_classes or classes or 10, None, images).create()


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
    """Measure the layers' errors before the first step and after each stage; none of a student of other sizes, whose
    layers cannot see what the teacher's do."""
    config = own[0].config
    teacher = teacher_of(config, config.teacher.img_size or config.student.img_size)
    unconverted = fresh_model(config, None, config.student.img_size)
    if sites(teacher.model) != sites(unconverted):
        return {}
    images = test_images(config, teacher, count)
    parts = build(config)
    fit_student(config, parts, torch.device("cpu"), FittedLayers(steps[0].config.output_dir))
    start = parts.task.trainable
    students = {ZERO_SHOT: start} | {
        stage.name: load_pretrained(f"local-dir:{stage.config.output_dir / 'student'}").model
        for stage in steps
    }
    return {name: layer_errors(teacher.model, student, images) for name, student in students.items()}


def teacher_of(config: RunConfig, size: int | tuple[int, int] | None) -> Pretrained:
    """Load the teacher for images of a size."""
    how = config.teacher
    return load_pretrained(
        str(how.source),
        model=how.model,
        model_args=how.model_args,
        img_size=size,
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
    found = score_models({"teacher": teacher.model}, _loader(config, teacher))["teacher"]
    return Score(ZERO_SHOT, found.top1, found.top5, found.loss, samples=found.samples)


def _loader(config: RunConfig, teacher: Pretrained) -> Any:
    return create_eval_loader(config.data, teacher.preprocessing)


def speed_models(config: RunConfig, plan: str | None, size: int) -> tuple[nn.Module, nn.Module]:
    """Build the unconverted model and the student with random weights, which are as fast as trained ones.

    Without a plan both are the teacher.
    """
    if plan is None:
        teacher = teacher_of(config, size).model
        return teacher, teacher
    torch.manual_seed(0)
    softmax = fresh_model(config, None, size)
    student = convert(softmax, plan, without=config.student.without)
    fit_at_random(converted_layers(student))
    return softmax, student


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of all parameters, and of those that the conversion added."""
    return (
        sum(parameter.numel() for parameter in model.parameters()),
        sum(parameter.numel() for parameter in new_parameters(model)),
    )


# How fast a student is, timed in turn with softmax attention, and what it costs.
#
# Cells that ran at other times, or side by side, are timed again together, in the same rounds.

TWIN = "unconverted model"
"""The model that all are timed beside; no plan has a space in its name."""


def measure_speed(
    softmax: nn.Module, student: nn.Module, size: int, batch: int, repeats: int, device: torch.device
) -> Speed:
    """Return the speed of `student` at images of side `size`, timed in turn with its unconverted twin."""
    models = {TWIN: softmax, "own": student}
    images = _images(models, size, batch, device)
    times = _times(models, images, repeats, device)["own"]
    operations = count_operations(student).total
    counted, whole = (counted_macs(step_of(partial(model, images[:1]))) for model in (student, softmax))
    return Speed(
        size=size,
        batch=batch,
        tokens=sites(student)[0].shape.geometry.num_tokens,
        peak_bytes=peak_bytes(step_of(partial(student, images)), device),
        macs=macs_beside(student, softmax, whole) + sum(attention_macs(student)),
        counted_macs=counted,
        multiplications=operations.multiplications,
        additions=operations.additions,
        **times,
    )


def measure_again(comparison: Comparison, repeats: int, tell: Callable[[str], None]) -> None:
    """Time every cell that is done, at each of its sizes, in turn with all others and with softmax; rewrite them.

    Raises WriteFailedError as `write_file`.
    """
    records = [record for record in comparison.records() if record.error is None and record.speeds]
    for train_size in sorted({record.size for record in records}):
        group = [record for record in records if record.size == train_size]
        speeds: dict[str, list[Speed]] = {record.name: [] for record in group}
        for size in sorted({speed.size for record in group for speed in record.speeds}):
            tell(f"{len(group)} cells at {size} px")
            for name, speed in _together(comparison, group, size, repeats).items():
                speeds[name].append(speed)
        for record in group:
            again = replace(record, speeds=speeds[record.name], machine=machine(), load=load_average())
            save_record(again, comparison.folder / "cells" / record.folder)


def _together(comparison: Comparison, records: Sequence[Record], size: int, repeats: int) -> dict[str, Speed]:
    """Return the speeds, by name, of cells of one training size at images of side `size`."""
    before = {record.name: speed for record in records for speed in record.speeds if speed.size == size}
    plans = {record.name: record.plan for record in records}
    everyone = {name: speed_models(comparison.config, plans[name], size)[1] for name in before}
    everyone[TWIN] = fresh_model(comparison.config, None, size)
    batch = next(iter(before.values())).batch
    images = _images(everyone, size, batch, comparison.device)
    times = _times(everyone, images, repeats, comparison.device)
    return {name: replace(speed, **times[name]) for name, speed in before.items()}


def _images(models: Mapping[str, nn.Module], size: int, batch: int, device: torch.device) -> Tensor:
    """Put the models on the device, and return a batch of random images for them."""
    for model in models.values():
        model.to(device).eval().requires_grad_(False)
    channels = image_channels(next(iter(models.values())))
    return torch.randn(batch, channels, size, size, device=device)


def _times(
    models: Mapping[str, nn.Module], images: Tensor, repeats: int, device: torch.device
) -> dict[str, JsonDict]:
    """Return the times of each model, named as in `Speed`, beside those of the twin."""
    one, many = (
        time_steps({name: step_of(partial(model, some)) for name, model in models.items()}, repeats, device)
        for some in (images[:1], images)
    )
    return {
        name: {
            "latency": one[name].median,
            "latency_low": one[name].low,
            "latency_high": one[name].high,
            "softmax_latency": one[TWIN].median,
            "throughput": len(images) / many[name].median,
            "softmax_throughput": len(images) / many[TWIN].median,
        }
        for name in models
    }
