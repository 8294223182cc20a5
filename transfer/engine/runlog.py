"""`log.jsonl` of a run folder: one JSON object an interval and one an epoch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TextIO

from ...models.errors import RunFailedError
from ...models.json_types import Json, JsonDict

WALL_CLOCK = ("seconds", "images_per_second", "data_wait", "comm_wait")
"""The keys that depend on the machine's clock. All others are the same after a resume, bit for bit."""


class RunLog:
    """Appends records. The saved state counts them, so that a resumed run can drop what came after it.

    Each write is inside a `guard`, which raises where another attempt has taken the run over. The file is opened
    once: what an attempt that was given up still writes goes into the file that `keep` has replaced.
    """

    def __init__(self, path: Path, guard: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self.path = path
        self.records = 0
        self._guard = guard
        self._file: TextIO | None = None

    def append(self, record: Json) -> None:
        """Writes one record at once; RunFailedError where the disk does not take it."""
        with self._writing():
            if self._file is None:
                self._file = self.path.open("a")
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        self.records += 1

    def sync(self) -> None:
        """Makes the records durable; called before a state that counts them is written. Raises as `append`."""
        if self._file is not None:
            with self._writing():
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Nothing is appended any more."""
        if self._file is not None:
            with suppress(OSError):  # a full disk was told of at the append
                self._file.close()
            self._file = None

    def keep(self, records: int) -> None:
        """Keeps the first `records` records and drops the rest, in one atomic replacement."""
        with self._writing():
            self.close()
            lines = self.path.read_text().splitlines(keepends=True)[:records] if self.path.exists() else []
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(lines))
            temporary.replace(self.path)
        self.records = len(lines)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._guard():
            try:
                yield
            except OSError as error:
                raise RunFailedError(
                    f"{self.path} cannot be written: {error.strerror}; the last saved state is intact"
                ) from error


def read_log(path: Path) -> list[JsonDict]:
    """The records of a log; a last line that a crash cut short is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
