"""Write a classifier as a file of another runtime, held to the accuracy of its model, and measure what it is worth."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..checkpoints.atomic import write_folder, write_text
from ..checkpoints.dense_models import dense_of
from ..checkpoints.export import in_float32
from ..checkpoints.files import place
from ..checkpoints.licenses import public_text
from ..checkpoints.pretrained import describe
from ..checkpoints.provenance import Pretrained
from ..checkpoints.report import some
from ..checkpoints.student import check_values
from ..checkpoints.targets import FILES, LOADER, Target, check_target, write_target
from ..models.errors import CheckpointError, ConfigError, RunFailedError, check_types
from ..models.families import evaluating
from ..models.given import Model
from .analysis.benchmark_cases import machine, time_steps
from .config import DataConfig
from .data.augment import with_settings
from .data.labels import check_num_classes
from .data.loaders import ViewsLoader, create_eval_loader
from .data.survey import sample_images
from .engine.fit_operators import stage_together
from .metrics.intervals import Interval, accuracy_interval
from .metrics.measure import Metrics, check_folders, score_models

REPORT = "deploy.json"
WRITTEN = {REPORT, LOADER, *FILES.values(), *(f"{name}.data" for name in FILES.values())}
"""What a folder may have that is replaced."""
ROUNDS = 15
"""Rounds of the timing; each takes the model and the file in turn."""
Classify = Callable[[Tensor], Tensor]


class WorseFileError(CheckpointError, RunFailedError):
    """A file that loses too much against its model; exit code 1."""


@dataclass(frozen=True)
class Worth:
    """What a file is worth beside its model; accuracies in percent, milliseconds of one thread for one image."""

    target: Target
    source: str
    file: str
    bytes: int
    samples: int
    top1: float
    interval: Interval
    """95 % of `top1`."""
    model_top1: float
    lost: float
    """Points below the model on the same images."""
    milliseconds: float
    """Processor time."""
    model_milliseconds: float
    machine: str

    def lines(self) -> list[str]:
        """Return the report as text."""
        low, high = self.interval
        ratio = self.milliseconds / self.model_milliseconds
        return [
            f"file     {self.file}, {self.bytes / 1e6:.2f} MB, and {LOADER}",
            f"top-1    {self.top1:.2f} % [{low:.1f}, {high:.1f}], {self.model_top1:.2f} % of the model, "
            f"{self.samples} images",
            f"latency  {self.milliseconds:.3g} ms of one thread for one image, {ratio:.2f} x torch's",
        ]


@check_types()
def deploy(
    model: Model | Pretrained,
    folder: str | PathLike[str],
    data: str | Path | DataConfig,
    *,
    target: Target = "onnx",
    drop: float = 0.5,
    calibrate: int = 128,
    overwrite: bool = False,
) -> Worth:
    """Write a classifier, in float32, as a file of another runtime, with a script that runs it and a report.

    The file, with the preprocessing that is written in it, is measured on the validation images beside the model; one
    that loses too much is not kept.

    Args:
        model: as of `graftvit.save`, with a head.
        folder: is made, and may hold an earlier file with `overwrite` alone.
        data: the folder of a data set, or its `DataConfig`, as of `graftvit.evaluate`.
        target: "onnx", "onnx-int8", "aoti" (compiled for this kind of processor) or "executorch".
        drop: points of top-1, from 0 to 100, that the file may lose against the model.
        calibrate: training images that int8 is calibrated on.
        overwrite: replace the folder of an earlier file.

    Returns:
        Size, accuracy beside the model's, and time of one thread for one image beside torch's.

    Raises:
        CheckpointError: the folder has something else, or the model cannot be written so; WorseFileError where the file
            loses more than `drop` points.
        ConfigError, DataError: the model has no head, or the images do not fit it.
        UnsupportedModelError: as `graftvit.export`.
    """
    if not 0 <= drop <= 100 or calibrate < 1:
        raise ConfigError(
            f"drop={drop}, calibrate={calibrate}: give points from 0 to 100, and at least 1 image"
        )
    folder = place(folder)
    check_deployment(folder, target, dense=dense_of(model) is not None, overwrite=overwrite)
    known = describe(model)
    check_values(known.model)
    if not known.has_head:
        raise ConfigError(
            f"{known.source!r} has no classification head, and so no accuracy to hold a file to: `graftvit export` "
            "writes its features"
        )
    settings = data if isinstance(data, DataConfig) else DataConfig(data_path=str(data))
    model = in_float32(known.model)
    known = replace(known, model=model, preprocessing=with_settings(known.preprocessing, settings))
    deployment = _Deployment(known, stage_together(settings, None), target, drop, calibrate)
    found: list[Worth] = []
    size = sum(each.numel() * each.element_size() for each in model.state_dict().values())
    with evaluating(model):
        write_folder(folder, lambda temporary: found.append(deployment.write(temporary)), size=size)
    return found[0]


def check_deployment(folder: Path, target: Target, *, dense: bool, overwrite: bool) -> None:
    """Raise what is wrong and needs no loaded model.

    CheckpointError: something would be lost in `folder`, where an earlier file may be with `overwrite`, or a package of
    `target` is missing. ConfigError: the model is a detector or segmenter.
    """
    if dense:
        raise ConfigError(
            "a detector or segmenter makes its boxes and labels in Python: `graftvit export` writes the maps of its "
            "backbone"
        )
    check_target(target)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CheckpointError(f"{folder} is a link or a file: give a new folder")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names and REPORT not in names:
        raise CheckpointError(f"{folder} has other files: give a new folder")
    if names and not overwrite:
        raise CheckpointError(
            f"{folder} has a deployed model: give another folder, or --force (in Python overwrite=True) to replace it"
        )
    if other := sorted(names - WRITTEN):
        raise CheckpointError(f"{folder} also has {some(other)}, which would be lost: move that elsewhere")


@dataclass(frozen=True)
class _Deployment:
    """A model to be written as a file of `target` that loses at most `drop` points of top-1."""

    known: Pretrained
    """Its model in eval mode, in float32 on the CPU."""
    data: DataConfig
    target: Target
    drop: float
    calibrate: int

    def write(self, folder: Path) -> Worth:
        """Write everything to the new `folder`, if the file passes."""
        images = partial(sample_images, self.data, self.known.preprocessing, self.calibrate)
        path = write_target(self.known, folder, self.target, images)
        standalone = runpy.run_path(str(folder / LOADER))["Model"]
        file, alone = standalone(path), standalone(path, threads=1)
        scores = self._score(_of_tensors(file), Prepared(folder / LOADER, dict(file.said)))
        top1, samples = scores["file"].top1, scores["file"].samples
        lost = scores["model"].top1 - top1
        if not lost <= self.drop:
            raise WorseFileError(
                f"{path.name} is not kept: its top-1 on {samples} images is {top1:.2f} %, {lost:.2f} points below the "
                f"model's, and drop allows {self.drop:g}; one image is {100 / samples:.2g} points"
            )
        times = self._time(_of_tensors(alone))
        size = sum(each.stat().st_size for each in folder.glob("model.*"))
        interval = accuracy_interval(top1, samples)
        worth = Worth(
            self.target, public_text(self.known.source, "source"), path.name, size, samples, top1, interval,
            scores["model"].top1, lost, times["file"], times["model"], machine(),
        )  # fmt: skip
        write_text(folder / REPORT, json.dumps(asdict(worth), indent=2) + "\n")
        return worth

    def _score(self, file: Classify, prepared: Prepared) -> dict[str, Metrics]:
        """Return the metrics of model and file, each with images of its own preprocessing."""
        spec, names = self.known.preprocessing, self.known.label_names
        loader = ViewsLoader([
            create_eval_loader(self.data, spec, names=names, transform=make) for make in (None, prepared)
        ])  # fmt: skip
        check_num_classes(self.data, loader.class_names)
        check_folders(self.known.source, getattr(self.known.model, "num_classes", 0), loader)
        loader.shown = "evaluation"
        both: dict[str, Callable[[Any], Tensor]] = {
            "model": lambda views: self.known.model(views.images[0]),
            "file": lambda views: file(views.images[1]),
        }
        return score_models(both, loader, ensemble=False)

    def _time(self, file: Classify) -> dict[str, float]:
        """Return the milliseconds of processor time that one thread takes for one image."""
        size = self.known.preprocessing.input_size
        image = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
        steps = {"model": partial(self.known.model, image), "file": partial(file, image)}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.no_grad():
                timings = time_steps(steps, ROUNDS, torch.device("cpu"))
        finally:
            torch.set_num_threads(threads)
        return {name: 1e3 * float(timing.cpu or timing.median) for name, timing in timings.items()}


class Prepared:
    """The preprocessing of a file by its own script, as a transform that loader processes can be given."""

    def __init__(self, script: Path, said: dict[str, str]) -> None:
        self._script, self._said = script, said

    def __call__(self, image: Image.Image) -> Tensor:
        """Return an image as the file takes it, (C, H, W)."""
        return torch.from_numpy(self._prepare(image, self._said))

    @cached_property
    def _prepare(self) -> Callable[..., Any]:
        return runpy.run_path(str(self._script))["prepare"]


def _of_tensors(file: Callable[[Any], Any]) -> Classify:
    return lambda images: torch.from_numpy(file(images.numpy()))
