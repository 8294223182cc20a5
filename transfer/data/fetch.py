"""Runs a DataLoader: its processes, what is lost when one dies, and the account of unreadable images."""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader

from ...models.errors import DataError, counted
from .images import UNLABELED
from .loader_deaths import LOST_PROCESS, loader_deaths, lost
from .loading import BadImage, Batch, Loaded, Requests, as_it_is, start_worker
from .sampler import BatchRequest

logger = logging.getLogger(__name__)


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


class Fetcher:
    """Batches for requests, made by `workers` processes that stay from one pass to the next."""

    def __init__(self, dataset: Any, workers: int, bad: BadImages) -> None:
        self.bad = bad
        self._dataset = dataset
        self._workers = workers
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
        keep = self._workers > 0
        return create_loader(self._dataset, self._workers, sampler=self._requests, persistent_workers=keep)


def create_loader(dataset: Any, workers: int, **keywords: Any) -> DataLoader[Batch]:
    """Return a DataLoader over a data set that makes whole batches. It does not draw from the run's generator."""
    with _any_number():
        return DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            collate_fn=as_it_is,
            worker_init_fn=start_worker if workers else None,
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
