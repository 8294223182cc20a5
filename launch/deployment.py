"""Hold a file of another runtime to the accuracy of its model, and measure what it is worth."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..checkpoints.atomic import write_folder, write_text
from ..checkpoints.licenses import public_text
from ..checkpoints.targets import FILES, LOADER, Target, check_target, write_target
from ..models.errors import CheckpointError, ConfigError, RunFailedError
from ..transfer.analysis.benchmark_cases import machine, time_steps
from ..transfer.config import DataConfig
from ..transfer.data.augment import with_settings
from ..transfer.data.loaders import ViewsLoader, create_eval_loader
from ..transfer.data.survey import sample_images
from ..transfer.engine.fit_operators import stage_together
from ..transfer.metrics.intervals import Interval, accuracy_interval
from ..transfer.metrics.measure import Family, Metrics, score_models
from .evaluation import Candidate, Evaluation, check_labels, common_names, load_candidate
from .load_config import load_config

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


@dataclass(frozen=True)
class Deployment:
    """A model to be written as a file of `target` that loses at most `drop` points of top-1."""

    asked: Evaluation
    """The model and the data, as `graftvit evaluate` takes them."""
    target: Target
    drop: float
    calibrate: int
    """Training images that int8 is calibrated on."""

    def check(self, *, here: bool = True) -> int:
        """Raise what is wrong and needs no loaded model; return the number of loader processes."""
        check_target(self.target)
        if self.asked.dense:
            raise ConfigError(
                f"{self.asked.sources[0]!r} is a detector or segmenter, whose boxes and labels are made in Python: "
                "`graftvit export` writes the maps of its backbone"
            )
        return self.asked.check(here=here).workers

    def write(self, folder: Path) -> Worth:
        """Write file, script and report to `folder`, which is replaced.

        Raises:
            GraftError: the model has no head, cannot be written so, or the data do not fit it.
            WorseFileError: the file loses more than `drop` points.
        """
        found: list[Worth] = []

        def fill(temporary: Path) -> None:
            found.append(self._fill(temporary))

        tensors = self.candidate.module.state_dict().values()
        write_folder(folder, fill, size=sum(each.numel() * each.element_size() for each in tensors))
        return found[0]

    @cached_property
    def data(self) -> DataConfig:
        """The settings of the images."""
        return stage_together(self.asked.config().data, None)

    @cached_property
    def candidate(self) -> Candidate:
        """The model, with the preprocessing that the settings ask for. Raises ConfigError: it has no head."""
        self.asked.config()  # first, because it imports what the run did
        how, shown = (load_config(None, self.asked.section(name)) for name in ("teacher", "data"))
        found = load_candidate(self.asked.sources[0], how.teacher)
        if not found.num_classes:
            raise ConfigError(
                f"{found.name!r} has no classification head, and so no accuracy to hold a file to: `graftvit export` "
                "writes its features"
            )
        spec = with_settings(found.spec, shown.data)
        return replace(found, spec=spec, loaded=replace(found.loaded, preprocessing=spec))

    def _fill(self, folder: Path) -> Worth:
        """Write everything to the new `folder`, if the file passes."""
        images = partial(sample_images, self.data, self.candidate.spec, self.calibrate)
        path = write_target(self.candidate.loaded, folder, self.target, images)
        standalone = runpy.run_path(str(folder / LOADER))["Model"]
        file, alone = standalone(path), standalone(path, threads=1)
        scores = self._score(_of_tensors(file), Prepared(folder / LOADER, dict(file.said)))
        top1, samples = scores["file"].top1, scores["file"].samples
        lost = scores["model"].top1 - top1
        if not lost <= self.drop:
            raise WorseFileError(
                f"{path.name} is not kept: its top-1 on {samples} images is {top1:.2f} %, {lost:.2f} points below the "
                f"model's, and --drop allows {self.drop:g}; one image is {100 / samples:.2g} points"
            )
        times = self._time(_of_tensors(alone))
        size = sum(each.stat().st_size for each in folder.glob("model.*"))
        interval = accuracy_interval(top1, samples)
        worth = Worth(
            self.target, public_text(self.asked.sources[0], "source"), path.name, size, samples, top1, interval,
            scores["model"].top1, lost, times["file"], times["model"], machine(),
        )  # fmt: skip
        write_text(folder / REPORT, json.dumps(asdict(worth), indent=2) + "\n")
        return worth

    def _score(self, file: Classify, prepared: Prepared) -> dict[str, Metrics]:
        """Return the metrics of model and file, each with images of its own preprocessing."""
        model, names = self.candidate, common_names([self.candidate])
        makers = (None, prepared)
        loader = ViewsLoader([
            create_eval_loader(self.data, model.spec, labels=False, names=names, transform=make) for make in makers
        ])  # fmt: skip
        families: dict[str, Collection[Family]] = {model.name: ["top1"]}
        check_labels([model], families, loader, self.asked.config().data, self.asked)
        loader.shown = "evaluation"
        both: dict[str, Callable[[Any], Tensor]] = {
            "model": lambda views: model.predict(views.images[0]),
            "file": lambda views: file(views.images[1]),
        }
        return score_models(both, loader, ensemble=False)

    def _time(self, file: Classify) -> dict[str, float]:
        """Return the milliseconds of processor time that one thread takes for one image."""
        image = torch.randn(1, *self.candidate.spec.input_size, generator=torch.Generator().manual_seed(0))
        steps = {"model": partial(self.candidate.predict, image), "file": partial(file, image)}
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
