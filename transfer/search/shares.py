"""A search by several processes or jobs: each evaluates its share of a generation first, then what is missing."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from ...models.errors import ConfigError
from ..cells.pool import StoppedError, run_in_processes
from ..cells.records import State
from .evolution import Evaluation
from .program_search import Search, open_search


@dataclass(frozen=True)
class Share:
    """One of `count` shares of each generation."""

    index: int = 0
    count: int = 1

    def order(self, slots: int) -> list[int]:
        """Return all slots, its own first; the others from the last on, where their owners come late."""
        own = range(self.index, slots, self.count)
        return [*own, *(slot for slot in reversed(range(slots)) if slot not in own)]

    def part(self, index: int, count: int) -> Share:
        """Return one of `count` parts of this share."""
        return Share(self.index + self.count * index, self.count * count)

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"


def parse_share(text: str) -> Share:
    """Read `2/4`, the second of four shares. Raises ConfigError: it is not a share."""
    index, slash, count = text.partition("/")
    if slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count):
        return Share(int(index) - 1, int(count))
    raise ConfigError(f"--share {text}: give a share, such as 2/4 for the second of four")


@dataclass(frozen=True)
class SearchProcess:
    """A process of a search. It ends when all generations are evaluated, by itself or by others."""

    out: Path
    share: Share
    generations: int
    needs: None = None

    @property
    def folder(self) -> Path:
        """The folder of its log."""
        return self.out / "processes" / f"{self.share.index + 1}-of-{self.share.count}"

    def __str__(self) -> str:
        return f"process {self.share} of the search"

    def state(self) -> State:
        return "to do"

    def run(self) -> None:
        open_search(self.out).evaluate(self.generations, self.share.order)


class Watch:
    """The generations of a search that have all their records, and a line about each."""

    def __init__(self, search: Search, generations: int, tell: Callable[[str], None]) -> None:
        self.done: list[Evaluation] = []
        self._search, self._left, self._tell = search, list(range(generations)), tell
        self._generations = generations

    @property
    def is_over(self) -> bool:
        return not self._left

    def look(self, running: object = ()) -> None:
        """Read the generations that became complete."""
        while self._left and (found := self._search.recorded(self.done)) is not None:
            self.done += found
            self._tell(self._search.progress(self._left.pop(0), self._generations, self.done))


def run_search(
    search: Search,
    generations: int,
    tell: Callable[[str], None],
    *,
    workers: int = 1,
    share: Share | None = None,
) -> list[Evaluation]:
    """Evaluate all generations in `workers` processes, write the archive, and return all evaluations.

    Other processes and jobs with other shares may do the same in the same folder: the archive is the same.

    Raises:
        ConfigError: the folder has a search with other settings, which are named.
        StoppedError: on SIGINT, SIGTERM or SIGUSR2.
        RunFailedError: a process failed.
    """
    share = share or Share()
    search = search.claim()
    watch = Watch(search, generations, tell)
    watch.look()
    if workers == 1 and not watch.is_over:
        search.evaluate(generations, share.order, watch.look)
    elif not watch.is_over:
        _run_processes([SearchProcess(search.folder, share.part(index, workers), generations)
                        for index in range(workers)], watch)  # fmt: skip
    search.write_archive(watch.done)
    return watch.done


def _run_processes(processes: Collection[SearchProcess], watch: Watch) -> None:
    try:
        run_in_processes(list(processes), len(processes), look=watch.look, finish=watch.look)
    except StoppedError as stopped:
        place = f"in {next(iter(processes)).out}; all evaluations are saved"
        raise StoppedError(stopped.exit_code - 128, place) from stopped
