"""`log.jsonl` of a run folder: one JSON object per interval and one per epoch."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

from ...checkpoints.atomic import write_bytes
from ...checkpoints.json_lines import append_line, open_lines, parse_record, read_lines
from ...models.errors import Json, RunFailedError

logger = logging.getLogger(__name__)

WALL_CLOCK = ("seconds", "images_per_second", "data_wait", "comm_wait", "peak_memory_gib")
"""The keys that depend on the clock or the device. All others are equal bit for bit in a resumed run."""


class RunLog:
    """Append records. A state stores their number, so that a resumed run can drop the records after it.

    Each write is inside a `guard`, which raises if another attempt has taken over the run. The file is opened once, so
    a replaced attempt still writes into the old file, which `keep` has replaced.
    """

    def __init__(self, path: Path, guard: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self.path = path
        self.records = 0
        self._guard = guard
        self._file: BinaryIO | None = None

    def append(self, record: Json) -> None:
        """Write one record immediately. Raise RunFailedError if the disk fails."""
        with self._writing():
            if self._file is None:
                self._file = open_lines(self.path)
            append_line(self._file, json.dumps(record))
        self.records += 1

    def sync(self) -> None:
        """Flush the records to the disk; called before a state is written. Raise as `append`."""
        if self._file is not None:
            with self._writing():
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with suppress(OSError):  # `append` has reported a full disk
                self._file.close()
            self._file = None

    def keep(self, records: int) -> None:
        """Keep the first `records` records and drop the rest, in one atomic replacement. Warn if there are fewer.

        Raises CheckpointError: the log is no regular file.
        """
        with self._writing():
            self.close()
            lines = read_lines(self.path) if self.path.exists() else []
            kept = [line + b"\n" for line in lines[:records] if parse_record(line) is not None]
            write_bytes(self.path, b"".join(kept))
        self.records = len(kept)
        if self.records < records:
            logger.warning(
                "%s has %d of the %d records up to the resumed state; the others were cut or lost, as by a crash",
                self.path,
                self.records,
                records,
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._guard():
            try:
                yield
            except OSError as error:
                raise RunFailedError(
                    f"{self.path} cannot be written: {error.strerror}; the last saved state is intact"
                ) from error
