"""What a loader process does: read images, augment, replace the bad ones, mix. It keeps no state."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from timm.data.mixup import Mixup
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ...models.errors import LOST_PROCESS, DataError, counted, loader_deaths, lost
from ..config import DataConfig
from .augment import Steps, Transform, mix, reason_of, seed_generators
from .image_folder import UNLABELED, ImageSource
from .kept_views import KeptViews
from .sampler import MIXING, SAMPLE, BatchRequest, Indices, derive_seed, preserved

logger = logging.getLogger(__name__)
T = TypeVar("T")


class SourceLostError(DataError):
    """What holds many images is missing, has changed, or cannot be reached: no fault of one image."""


class BadImage(NamedTuple):
    """An image that could not be read or made ready."""

    path: str
    reason: str
    identity: str | None = None
    """Name of the image if `path` differs from one pass to the next."""
    target: int | None = None
    """Its label, where that is known without reading it."""

    def describe(self) -> str:
        """Return which image, and why."""
        return f"{self.path}: {self.reason}"


class Ready(NamedTuple):
    """An image as a tensor, with its label."""

    pixels: Tensor
    target: int


class Batch(NamedTuple):
    """What a loader process sends. `images` is a tensor, or a `DenseBatch` with its own targets; None where too many
    images in a row were unreadable.

    An error travels as `failure`, its sentence: torch would send a traceback in its place.
    """

    images: Any
    targets: Tensor
    valid: Tensor
    bad: list[BadImage]
    failure: str | None = None
    beside: dict[str, Tensor] | None = None
    """Tensors that `TrainBatches.beside` adds to the images."""


class Beside(Protocol):
    """Adds tensors to the images (B, C, H, W) of a batch: those of the samples `indices` in a view.

    It runs in the loader processes. `name` gives the name of a sample for an error, a DataError.
    """

    def __call__(
        self, view: int, indices: Sequence[int], images: Tensor, name: Callable[[int], str]
    ) -> dict[str, Tensor]: ...


class Samples(NamedTuple):
    """A range of samples that are kept together: what tells them from others, and their number."""

    name: str
    size: int


Loaded = tuple[Tensor, Tensor, Tensor]
"""Images, targets, and which of the images count."""


def failed(failure: str) -> Batch:
    """Return what is sent in place of a batch that cannot be made."""
    return Batch(None, torch.empty(0), torch.empty(0), [], failure)


class Named(Protocol):
    """What has images with names, and labels where these are known without reading."""

    @property
    def targets(self) -> Sequence[int] | None: ...
    def path(self, index: int) -> str: ...


@runtime_checkable
class Sized(Protocol):
    """What knows the bytes of its images."""

    def size(self, index: int) -> int: ...


@runtime_checkable
class Distant(Protocol):
    """What reads its images faster if it knows which come next."""

    def read_ahead(self, indices: Sequence[int]) -> None: ...


def read_ahead(source: object, indices: Sequence[int]) -> None:
    """Tell a source which images are read next."""
    if isinstance(source, Distant):
        source.read_ahead(indices)


def prepared(source: ImageSource, index: int, transform: Transform) -> Ready | BadImage:
    """Return an image that is ready for a batch, or why it cannot be. Raises as `attempted`."""

    def make() -> Ready:
        image, target = source.read(index)
        return Ready(transform(image), target)

    return attempted(source, index, make)


def attempted(source: Named, index: int, make: Callable[[], T]) -> T | BadImage:
    """Return what `make` makes of an image, or why it cannot be made.

    Raises DataError where the memory does not suffice or the source is lost, which is no fault of the image.
    """
    try:
        return make()
    except SourceLostError:
        raise
    except MemoryError as error:
        raise out_of_memory(name_of(source, index)) from error
    except (
        Exception
    ) as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        name = name_of(source, index)
        label = None if source.targets is None else source.targets[index]
        return BadImage(name, cause(error).removeprefix(f"{name} "), target=label)


def name_of(source: Named, index: int) -> str:
    """Return the path of an image, or its number where the source cannot say that either."""
    try:
        return source.path(index)
    except Exception:  # of a damaged table
        return f"image {index}"


def identity_of(source: Named, index: int) -> str:
    """Return the name of an image, with its bytes where the source counts them without reading it."""
    name = name_of(source, index)
    try:
        return f"{name} ({source.size(index)} bytes)" if isinstance(source, Sized) else name
    except (DataError, OSError):  # it is gone
        return name


def cause(error: Exception) -> str:
    """Return why an image is bad, in one line."""
    return str(error) if isinstance(error, DataError) else reason_of(error)


def out_of_memory(name: str) -> DataError:
    return DataError(
        f"the memory is full at {name}: give fewer data.workers or a smaller batch, or take the image away if it is "
        "huge"
    )


def made(make: Callable[[BatchRequest], Batch], request: BatchRequest, name: Callable[[int], str]) -> Batch:
    """Return a batch, or the sentence that says why it cannot be made; no error leaves the process that makes it."""
    try:
        return make(request)
    except DataError as error:
        return failed(str(error))
    except Exception as error:
        first = name(request.indices[0])
        return failed(f"a batch of images, of which {first} is the first, cannot be made: {reason_of(error)}")


class TrainBatches(Dataset[Batch]):
    """BatchRequest -> Batch. A bad image is replaced by the next readable one of the set.

    Epoch e augments by view e, or by view e modulo `views` where there are so many. A sample that `epoch_order`
    repeats has another augmentation at each of its `repeats` positions.
    """

    beside: Beside | None = None
    kept: KeptViews | None = None
    """Where images are kept as bytes; None where each epoch makes them."""
    _finish: Steps
    """The steps after those bytes."""

    def __init__(
        self,
        source: ImageSource,
        subset: Sequence[int] | Indices,
        transform: Transform,
        *,
        seed: int,
        mixing: Mixup | None,
        tries: int,
        views: int | None = None,
        repeats: int = 1,
    ) -> None:
        self._source = source
        self._subset = subset
        self._transform = transform
        self._seed = seed
        self._mixing = mixing
        self._tries = min(tries, len(subset))
        self._views = views
        self._repeats = repeats

    def keep(self, kept: KeptViews, transform: Steps) -> None:
        """Keep what the first steps of the transform make of an image, and read it where it is there."""
        self.kept = kept
        self._transform, self._finish = transform.split()

    def __getitem__(self, request: BatchRequest) -> Batch:
        with preserved():
            return made(self._make, request, self.name)

    def name(self, index: int) -> str:
        """Return the path of a sample, or its number."""
        return name_of(self._source, self._place(index))

    def _make(self, request: BatchRequest) -> Batch:
        bad: list[BadImage] = []
        ready: list[Any] = []
        view = request.epoch if self._views is None else request.epoch % max(1, self._views)
        kept = [self._find(view, index) for index in request.indices]
        unknown = [index for index, found in zip(request.indices, kept, strict=True) if found is None]
        read_ahead(self._source, [self._place(index) for index in unknown])
        for position, (index, found) in enumerate(zip(request.indices, kept, strict=True), request.position):
            if found is None:
                found = self._first_ready(index, view, position % self._repeats, bad)
            if found is None:
                return Batch(None, torch.empty(0), torch.empty(0), bad)
            ready.append(found)
        return self._joined(ready, request, view, bad)

    def _joined(self, ready: Sequence[Any], request: BatchRequest, view: int, bad: list[BadImage]) -> Batch:
        """Return the batch of what `_prepared` gave for each sample."""
        pixels = [each.pixels for each in ready]
        images_BCHW = default_collate(
            pixels if self.kept is None else [self._finish(each) for each in pixels]
        )
        targets_B = torch.tensor([each.target for each in ready])
        beside = None
        if self.beside is not None:
            beside = self.beside(view, request.indices, images_BCHW, self.name)
        if self._mixing is not None:
            seed = derive_seed(MIXING, self._seed, request.epoch, request.position)
            images_BCHW, targets_B = mix(self._mixing, images_BCHW, targets_B, seed)
        return Batch(images_BCHW, targets_B, torch.ones(len(ready), dtype=torch.bool), bad, beside=beside)

    def _first_ready(self, index: int, view: int, copy: int, bad: list[BadImage]) -> Any:
        seed = derive_seed(SAMPLE, self._seed, view, index, *([copy] if copy else []))
        for place in range(index, index + self._tries):
            seed_generators(seed)
            result = self._prepared(self._place(place))
            if not isinstance(result, BadImage):
                if self.kept is not None and place == index:
                    self.kept.keep(view, index, identity_of(self._source, self._place(index)), *result)
                return result
            bad.append(result)
        return None

    def _find(self, view: int, index: int) -> Ready | None:
        """Return what is kept of a sample. One that cannot be read has no row: each epoch tries it again."""
        if self.kept is None:
            return None
        labels, place = self._source.targets, self._place(index)
        label = None if labels is None else labels[place]
        found = self.kept.find(view, index, identity_of(self._source, place), label)
        return None if found is None else Ready(*found)

    def _prepared(self, place: int) -> Any:
        """Return image `place` of the source, ready for a batch, or a BadImage."""
        return prepared(self._source, place, self._transform)

    def _place(self, index: int) -> int:
        return int(self._subset[index % len(self._subset)])


class EvalBatches(Dataset[Batch]):
    """BatchRequest -> Batch. A bad image is marked invalid: in its place another would count twice."""

    def __init__(
        self, source: ImageSource, transform: Transform, size: tuple[int, int, int], labels: Tensor | None
    ) -> None:
        self._source = source
        self._transform = transform
        self._size = size
        self._labels = labels

    def __getitem__(self, request: BatchRequest) -> Batch:
        return made(self._make, request, self.name)

    def name(self, index: int) -> str:
        """Return the path of an image, or its number."""
        return name_of(self._source, index)

    def _make(self, request: BatchRequest) -> Batch:
        images = torch.zeros(len(request.indices), *self._size)
        targets = torch.zeros(len(request.indices), dtype=torch.long)
        valid = torch.zeros(len(request.indices), dtype=torch.bool)
        bad: list[BadImage] = []
        read_ahead(self._source, request.indices[: request.valid])
        for row, index in enumerate(request.indices[: request.valid]):
            result = prepared(self._source, index, self._transform)
            if isinstance(result, BadImage):
                bad.append(result)
                continue
            images[row], targets[row], valid[row] = result.pixels, result.target, True
        if self._labels is not None:
            targets = self._labels[torch.tensor(request.indices)].float()
            valid &= targets.any(dim=1)
        return Batch(images, targets, valid, bad)


def as_it_is(batch: Any) -> Any:
    """Return the collate function: the data set makes whole batches."""
    return batch


def start_worker(_: int) -> None:
    """Keep a loader process alive when a signal reaches the whole job, so that the run can save.

    A forked process inherits the run's handlers, and Ctrl-C or a scheduler signals every process of the job.
    Only a SIGTERM from the run itself, which ends its loaders so, is obeyed.
    """
    for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
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


# Runs a DataLoader: its processes, what is lost when one dies, and the account of unreadable images.


SIGNALS_OF_A_DEATH = 8
"""Bound on how often torch's handler may interrupt the end of a loader: once a process that ends meanwhile."""


class BadImages:
    """The bad images of a loader with `images` images: each is logged once, and too many of them stop the run.

    `allowed` is `data.max_bad_images`. Of no class in `labels`, the labels of all images, may most be bad; `names` are
    those of the classes.
    """

    def __init__(
        self, allowed: float, images: int, labels: Iterable[int] = (), names: Sequence[str] | None = None
    ) -> None:
        self.found: list[BadImage] = []
        self.limit = int(allowed) if allowed >= 1 else math.ceil(round(allowed * images, 6))
        self._allowed, self._images = allowed, images
        self._sizes, self._lost, self._names = Counter(labels), Counter[int](), names
        self._known: set[str] = set()

    @property
    def paths(self) -> list[str]:
        return [bad.path for bad in self.found]

    def add(self, batch: Batch) -> None:
        """Raise DataError beyond the limit."""
        for bad in batch.bad:
            identity = bad.identity or bad.path
            if identity in self._known:
                continue
            self._known.add(identity)
            self.found.append(bad)
            logger.warning("skipped an unreadable image: %s (%s)", bad.path, bad.reason)
            if bad.target is not None:
                self._lost[bad.target] += 1
        if len(self.found) > self.limit:
            raise DataError(
                f"{len(self.found)} of {counted(self._images, 'image')} cannot be read, more than "
                f"data.max_bad_images={self._allowed:g} allows ({self.limit}); the first is {self.found[0].describe()}"
            )
        self._check_classes()

    def _check_classes(self) -> None:
        """Raise DataError for a class that lost most of its images."""
        for label, count in self._lost.items():
            size, name = self._sizes[label], self._names[label] if self._names else label
            if label == UNLABELED or 2 * count <= size:
                continue
            first = next(bad for bad in self.found if bad.target == label)
            raise DataError(
                f"{count} of the {counted(size, 'image')} of class {name!r} cannot be read; the first is "
                f"{first.describe()}: repair them, or leave the class out by data.classes"
            )


TOLD_EVERY = 60.0
"""Seconds between two lines of progress where standard error is no terminal."""


def followed(parts: Iterable[T], total: int, name: str) -> Iterator[T]:
    """Yield the parts, and show on standard error how many are done and the time left: a line that goes away at the end
    on a terminal, a line a minute in a log."""
    if sys.stderr.isatty():
        from rich.console import Console  # here: a job has no terminal
        from rich.progress import track

        yield from track(parts, name, total, console=Console(stderr=True), transient=True)
        return
    start = told = time.monotonic()
    for done, part in enumerate(parts, 1):
        yield part
        now = time.monotonic()
        if now - told >= TOLD_EVERY and done < total:
            left = (now - start) / done * (total - done)
            logger.warning("%s: %.0f %%, about %.0f s left", name, 100 * done / total, left)
            told = now


class Fetcher:
    """Batches for requests, made by the loader processes of `config` that stay from one pass to the next."""

    def __init__(self, dataset: Any, config: DataConfig, bad: BadImages) -> None:
        self.bad = bad
        self._dataset = dataset
        self._config = config
        self._requests = Requests()
        self._loader = self._open()

    def fetch(self, requests: Iterator[BatchRequest]) -> Iterator[Loaded]:
        """Yield a batch for each request, in order. A new pass ends the one before it."""
        for batch in self.fetch_batches(requests):
            if batch.images is not None:
                yield batch.images, batch.targets, batch.valid

    def fetch_batches(self, requests: Iterator[BatchRequest]) -> Iterator[Batch]:
        """Do the same as `fetch`, with all that a batch has."""
        self._requests.pending = requests
        try:
            for batch in guarded(self._loader):
                self.bad.add(batch)
                if batch.images is None:
                    raise DataError(
                        f"no image of the set can be read; the last tried is {batch.bad[-1].describe()}"
                    )
                yield batch
        except DataError:
            _forget(self._loader._iterator)
            self._loader = self._open()
            raise

    def _open(self) -> DataLoader[Batch]:
        keep = self._config.workers > 0
        return create_loader(self._dataset, self._config, sampler=self._requests, persistent_workers=keep)


def create_loader(dataset: Any, config: DataConfig, **keywords: Any) -> DataLoader[Batch]:
    """Return a DataLoader over a data set that makes whole batches. It does not draw from the run's generator.

    This is the one place that reads the settings of loader processes.
    """
    with _any_number():
        return DataLoader(
            dataset,
            batch_size=None,
            num_workers=config.workers,
            collate_fn=as_it_is,
            worker_init_fn=start_worker if config.workers else None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
            **keywords,
        )


@contextmanager
def _any_number() -> Iterator[None]:
    """Leave out torch's warning of more processes than cores: `data_wait` in the log says what they are worth."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        yield


def guarded(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """Yield the batches of a loader; DataError where one cannot be made, or when one of its processes dies."""
    batches = None
    try:
        with _any_number():
            batches = iter(loader)
        for batch in batches:
            if batch.failure is not None:
                raise DataError(batch.failure)
            yield batch
    except Exception as error:
        _forget(batches)
        if isinstance(error, DataError):
            raise
        words = [line for line in str(error).splitlines() if line.strip()]
        if words and words[0].startswith("Caught "):  # and torch has put a traceback behind it
            raise DataError(f"a loader process failed: {words[-1].strip()}") from error
        if isinstance(error, LOST_PROCESS):
            raise lost(error) from error
        with loader_deaths():
            raise


def _forget(batches: Any) -> None:
    """End the processes of a loader that has failed.

    torch would otherwise raise for a dead one again whenever any child ends, and wait five seconds for each that lives
    if the loader is freed with the traceback of its error.
    """
    end = getattr(batches, "_shutdown_workers", None)
    if end is None:  # no processes
        return
    for _ in range(SIGNALS_OF_A_DEATH):
        try:
            end()
        except RuntimeError:  # torch's signal handler, in the middle of it
            continue
        return
