"""Runs a DataLoader: its processes, what is lost when one dies, and the account of unreadable images."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from ..models.errors import DataError
from .loading import Batch, Requests, as_it_is, start_worker
from .sampler import BatchRequest

logger = logging.getLogger(__name__)


LOST_PROCESS = (ConnectionError, EOFError, FileNotFoundError)
"""What the exchange of tensors fails with when the process that holds them is gone."""


class BadImages:
    """The unreadable images of a loader: each is logged once, and more than `limit` of them stop the run."""

    def __init__(self, limit: int) -> None:
        self.paths: list[str] = []
        self._limit = limit
        self._known: set[str] = set()

    def add(self, batch: Batch) -> None:
        """Raises DataError beyond the limit, or when `batch` found nothing to put in their place."""
        for path, reason in batch.bad:
            if path in self._known:
                continue
            self._known.add(path)
            self.paths.append(path)
            logger.warning("skipped an unreadable image: %s (%s)", path, reason)
        if len(self.paths) > self._limit:
            raise DataError(
                f"{len(self.paths)} images cannot be read, more than data.max_bad_images={self._limit}; "
                f"the last is {self.paths[-1]}"
            )
        if batch.images is None:
            raise DataError(f"no image of the set can be read; the last tried is {self.paths[-1]}")


class Fetcher:
    """Batches for requests, made by `workers` processes that stay from one pass to the next."""

    def __init__(self, dataset: Any, workers: int, limit: int) -> None:
        self.bad = BadImages(limit)
        self._requests = Requests()
        self._loader = create_loader(dataset, workers, sampler=self._requests, persistent_workers=workers > 0)

    def fetch(self, requests: Iterator[BatchRequest]) -> Iterator[Batch]:
        """A batch for each request, in order. A new pass ends the one before it."""
        self._requests.pending = requests
        for batch in guarded(self._loader):
            self.bad.add(batch)
            yield batch


def create_loader(dataset: Any, workers: int, **keywords: Any) -> DataLoader[Batch]:
    """A DataLoader over a data set that makes whole batches. It does not draw from the run's generator."""
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        collate_fn=cast(Any, as_it_is),
        worker_init_fn=start_worker if workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
        **keywords,
    )


def guarded(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches; DataError when a loader process dies."""
    try:
        yield from batches
    except (RuntimeError, *LOST_PROCESS) as error:
        if str(error).startswith("Caught ") or not (
            isinstance(error, LOST_PROCESS) or str(error).startswith("DataLoader worker")
        ):
            raise  # an error in the data set itself
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"a loader process died ({reason}); it may have run out of memory: try a smaller data.workers"
        ) from error
