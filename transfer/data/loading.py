"""What a loader process does: read images, replace the unreadable ones, augment, mix. It keeps no state."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from PIL import Image
from timm.data.mixup import Mixup
from torch import Tensor
from torch.utils.data import Dataset

from ...models.errors import DataError
from ..engine.randomness import preserved
from .augment import Transform, mix, seed_generators
from .images import ImageSource
from .sampler import MIXING, SAMPLE, BatchRequest, Indices, derive_seed
from .steps import StepError, reason_of


class BadImage(NamedTuple):
    """An image that could not be read."""

    path: str
    reason: str


class Labelled(NamedTuple):
    """An image with its label and its place in the set."""

    image: Image.Image
    target: int
    place: int


class Batch(NamedTuple):
    """What a loader process sends. `images` is None where too many images in a row were unreadable.

    An error travels as `failure`, its sentence: torch would send a traceback in its place.
    """

    images: Tensor | None
    targets: Tensor
    valid: Tensor
    bad: list[BadImage]
    failure: str | None = None


def failed(failure: str) -> Batch:
    """What is sent in place of a batch that cannot be made."""
    return Batch(None, torch.empty(0), torch.empty(0), [], failure)


def transformed(transform: Transform, image: Image.Image, name: Callable[[], str]) -> Tensor:
    """The image as a tensor. Raises DataError, with the image's name."""
    try:
        return transform(image)
    except StepError as error:
        raise DataError(f"{name()}: {error}") from error


class TrainBatches(Dataset[Batch]):
    """BatchRequest -> Batch. An unreadable image is replaced by the next one of the set that can be read."""

    def __init__(
        self,
        source: ImageSource,
        subset: Indices,
        transform: Transform,
        *,
        seed: int,
        mixing: Mixup | None,
        tries: int,
    ) -> None:
        self._source = source
        self._subset = subset
        self._transform = transform
        self._seed = seed
        self._mixing = mixing
        self._tries = min(tries, len(subset))

    def __getitem__(self, request: BatchRequest) -> Batch:
        try:
            with preserved():
                return self._make(request)
        except DataError as error:
            return failed(str(error))

    def _make(self, request: BatchRequest) -> Batch:
        bad: list[BadImage] = []
        images: list[Tensor] = []
        targets: list[int] = []
        for index in request.indices:
            found = self._first_readable(index, bad)
            if found is None:
                return Batch(None, torch.empty(0), torch.empty(0), bad)
            seed_generators(derive_seed(SAMPLE, self._seed, request.epoch, index))
            images.append(transformed(self._transform, found.image, partial(self._source.path, found.place)))
            targets.append(found.target)
        images_BCHW, targets_B = torch.stack(images), torch.tensor(targets)
        if self._mixing is not None:
            seed = derive_seed(MIXING, self._seed, request.epoch, request.position)
            images_BCHW, targets_B = mix(self._mixing, images_BCHW, targets_B, seed)
        return Batch(images_BCHW, targets_B, torch.ones(len(images), dtype=torch.bool), bad)

    def _first_readable(self, index: int, bad: list[BadImage]) -> Labelled | None:
        for place in range(index, index + self._tries):
            result = read(self._source, int(self._subset[place % len(self._subset)]))
            if not isinstance(result, BadImage):
                return result
            bad.append(result)
        return None


class EvalBatches(Dataset[Batch]):
    """BatchRequest -> Batch. An unreadable image is marked invalid: in its place another would count twice."""

    def __init__(
        self, source: ImageSource, transform: Transform, size: tuple[int, int, int], labels: Tensor | None
    ) -> None:
        self._source = source
        self._transform = transform
        self._size = size
        self._labels = labels

    def __getitem__(self, request: BatchRequest) -> Batch:
        try:
            return self._make(request)
        except DataError as error:
            return failed(str(error))

    def _make(self, request: BatchRequest) -> Batch:
        images = torch.zeros(len(request.indices), *self._size)
        targets = torch.zeros(len(request.indices), dtype=torch.long)
        valid = torch.zeros(len(request.indices), dtype=torch.bool)
        bad: list[BadImage] = []
        for row, index in enumerate(request.indices[: request.valid]):
            result = read(self._source, index)
            if isinstance(result, BadImage):
                bad.append(result)
                continue
            images[row] = transformed(self._transform, result.image, partial(self._source.path, index))
            targets[row], valid[row] = result.target, True
        if self._labels is not None:
            targets = self._labels[torch.tensor(request.indices)].float()
            valid &= targets.any(dim=1)
        return Batch(images, targets, valid, bad)


def read(source: ImageSource, index: int) -> Labelled | BadImage:
    """An image and its label, or why it cannot be read."""
    try:
        return Labelled(*source.read(index), index)
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        return BadImage(source.path(index), reason_of(error))


def as_it_is(batch: Batch) -> Batch:
    """The collate function: the data set makes whole batches."""
    return batch


def start_worker(_: int) -> None:
    """Keeps a loader process alive when a signal reaches the whole job, so that the run can save.

    A forked process inherits the run's handlers, and Ctrl-C or a scheduler signals every process of the job.
    Only a SIGTERM from the run itself, which ends its loaders so, is obeyed.
    """
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS: a loader ends with the job
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return
    signal.signal(signal.SIGTERM, _go_on)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, daemon=True).start()


def _go_on(*_: object) -> None:
    """For a SIGTERM that reaches a thread which did not block it."""


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class Requests:
    """What the next pass of a DataLoader asks for; set before each pass, so that its processes can stay."""

    def __init__(self) -> None:
        self.pending: Iterator[BatchRequest] = iter(())

    def __iter__(self) -> Iterator[BatchRequest]:
        return self.pending
