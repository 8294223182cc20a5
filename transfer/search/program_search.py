"""A search: generations of programs, each evaluated as a cell in a folder, and the front of all of them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from ...checkpoints.atomic import write_shared
from ...checkpoints.files import digest, read_if_there
from ...models.errors import ConfigError, JsonDict
from ...models.programs.drawing import cross, draw_program, mutate
from ...models.programs.program import FOUND, LINEAR, Program, ProgramError, parse_program
from ...models.programs.program_checks import CHECKS, check
from ..cells import (
    Ending,
    Share,
    State,
    StoppedError,
    Whole,
    cell_state,
    load_record,
    refuse_links,
    run_in_processes,
    save_first,
    torch_threads,
)
from .matching import DIGITS, RecordedLayer, fitted_mismatch, layers_to_bytes, mismatch, read_layers

# Evolution of programs in generations, of which each is a pure function of the seed and of earlier evaluations.

RECENT = 2
"""Generations whose programs can be parents, beside the front."""
CROSSED = 0.3
"""The part of children of two parents; each child is also mutated."""
CONTEST = 4
"""Candidates for a parent, of which the best is taken."""
TRIES = 50
Error = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Evaluation(Ending):
    """The record of one evaluation."""

    generation: Whole = 0
    program: str = ""
    parents: tuple[str, ...] = ()
    refused: str = ""
    """The check that refused the program; empty if it was measured."""
    reason: str = ""
    mismatch: Error | None = None
    """Mean mismatch of the teachers' attention (`matching.mismatch`); None if it was refused."""
    cost: Whole = 0
    """Multiply-adds and entries of all layers, for one image."""
    errors: tuple[Error, ...] = ()
    """The mismatch with each teacher."""

    @property
    def objectives(self) -> tuple[float, ...]:
        """Return what a front compares beside the cost."""
        return self.errors or (math.inf if self.mismatch is None else self.mismatch,)


@dataclass(frozen=True)
class Child:
    """A program to evaluate, and the texts of those that it comes from."""

    program: Program
    parents: tuple[str, ...] = ()


def propose(
    seed: int, generation: int, count: int, earlier: Sequence[Evaluation], *, at_random: bool = False
) -> list[Child]:
    """Return the programs of a generation, all of which are new.

    The first generation is drawn. Later ones are children of the front and of the last generations. `at_random` draws
    every generation, for comparison.
    """
    seen = {each.program for each in earlier}
    children: list[Child] = []
    parents = _parents(generation, earlier)
    for slot in range(count):
        random = Random(f"{seed}/{generation}/{slot}")
        child = Child(draw_program(random))
        for _ in range(TRIES):
            if parents and not at_random:
                child = _child(parents, random)
            elif child.program.text in seen:
                child = Child(draw_program(random))
            if child.program.text not in seen:
                break
        seen.add(child.program.text)
        children.append(child)
    return children


def front(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Return the evaluations that no other one beats in cost and the mismatch with each teacher, the cheapest first."""
    best: list[Evaluation] = []
    measured = [each for each in evaluations if each.mismatch is not None]
    for each in sorted(measured, key=lambda one: (one.cost, one.mismatch, one.program)):
        if not any(_covers(one, each) for one in best):
            best.append(each)
    return best


def hypervolume(evaluations: Sequence[Evaluation], cost: int) -> float:
    """Return the part of the area below mismatch 1 and log(`cost`) that is dominated, from cost 1 on.

    With several teachers, it is the area of their mean mismatch.
    """
    volume, edge = 0.0, math.log(cost)
    for each in reversed(front([replace(each, errors=()) for each in evaluations])):
        left = math.log(max(1, each.cost))
        if left < edge and _of(each) < 1:
            volume += (edge - left) * (1 - _of(each))
            edge = left
    return volume / math.log(cost)


def _of(evaluation: Evaluation) -> float:
    return math.inf if evaluation.mismatch is None else evaluation.mismatch


def _covers(one: Evaluation, other: Evaluation) -> bool:
    """Return whether a program of no more cost has no larger mismatch with any teacher."""
    return all(mine <= its for mine, its in zip(one.objectives, other.objectives, strict=True))


def _parents(generation: int, earlier: Sequence[Evaluation]) -> list[Evaluation]:
    recent = [
        each for each in earlier if each.generation >= generation - RECENT and each.mismatch is not None
    ]
    return list(dict.fromkeys([*front(earlier), *recent]))


def _child(parents: Sequence[Evaluation], random: Random) -> Child:
    first = _parent(parents, random)
    program = parse_program(first.program)
    texts: tuple[str, ...] = (first.program,)
    if random.random() < CROSSED:
        second = _parent(parents, random)
        program = cross(program, parse_program(second.program), random)
        texts = (first.program, second.program)
    return Child(mutate(program, random), texts)


def _parent(parents: Sequence[Evaluation], random: Random) -> Evaluation:
    """Return the best of a few candidates, by cost and the mismatch with one of the teachers, weighed at random."""
    weight = random.random()
    rivals = [random.choice(parents) for _ in range(CONTEST)]
    teachers = len(rivals[0].objectives)
    teacher = random.randrange(teachers) if teachers > 1 else 0

    def score(one: Evaluation) -> float:
        error = max(one.objectives[teacher], 1e-6)
        return weight * math.log(error) + (1 - weight) * math.log(one.cost + 1)

    return min(rivals, key=score)


SOFTMAX = "mm(softmax(nt(scale(q) k)) v)"
CONTROLS = {"softmax": SOFTMAX, "elu + 1": LINEAR, "values": "v", "queries": "q", **FOUND}
"""Programs beside which the front is shown."""
USED = tuple(each for each in CHECKS if each.name not in ("stability", "triviality", "half", "training"))
"""The checks of a search: those that take milliseconds."""
PROXIES: Mapping[str, Callable[[Program, Sequence[RecordedLayer]], float]] = {
    "matching": mismatch,
    "fitted": fitted_mismatch,
}
"""Measures of a program that need the recorded layers alone."""
ARCHIVE, SETTINGS, LAYERS = "archive.json", "settings.json", "layers.safetensors"
T = TypeVar("T")


@dataclass(frozen=True)
class SearchSettings:
    """What the records depend on, beside the teacher and its images."""

    seed: int
    population: Annotated[int, Field(ge=1)]
    at_random: bool
    teacher: str
    images: str
    proxy: Literal["matching", "fitted"] = "matching"
    """Measure of the mismatch: a name of `PROXIES`."""
    identity: str = ""
    """The digest of the teachers' identities."""


@dataclass(frozen=True)
class Search:
    """A search in a folder. The same folder and settings resume a stopped search, and end in the same archive."""

    folder: Path
    settings: SearchSettings
    teachers: Sequence[Sequence[RecordedLayer]]
    """The recorded layers of each teacher."""

    def claim(self) -> Search:
        """Write the settings and the recorded layers into the folder; return the search with the layers that it has.

        Raises ConfigError: the folder has a search with other settings, which are named.
        """
        self._claim_folder()
        if not (self.folder / LAYERS).exists():
            write_shared(self.folder / LAYERS, layers_to_bytes(self.teachers), replace=False)
        return replace(self, teachers=read_layers(self.folder / LAYERS))

    def evaluate(
        self,
        generations: int,
        order: Callable[[int], Iterable[int]],
        look: Callable[[], object] = lambda: None,
    ) -> None:
        """Evaluate what has no record, generation by generation; `order` sorts the slots of each.

        `look` is called after each generation.
        """
        done: list[Evaluation] = []
        with torch_threads(1):
            for generation in range(generations):
                children = self._children(generation, done)
                found = {
                    slot: self._evaluation(generation, slot, children[slot]) for slot in order(len(children))
                }
                done += [found[slot] for slot in range(len(children))]
                look()

    def recorded(self, done: Sequence[Evaluation]) -> list[Evaluation] | None:
        """Return the evaluations of the generation after those that are `done`; None where one is missing.

        Raises ConfigError: one was made with other settings, or is no child of those that are done.
        """
        generation = len(done) // self.settings.population
        measured = {each.program for each in done if each.mismatch is not None}
        found = []
        for slot in range(self.settings.population):
            record = self._record(generation, slot)
            if record is None:
                return None
            strange = [parent for parent in record.parents if parent not in measured]
            if strange:
                raise ConfigError(
                    f"{self._cell(generation, slot)} is no cell of this search: no earlier generation has measured its "
                    f"parent {strange[0]}"
                )
            found.append(record)
        return found

    @property
    def layers(self) -> list[RecordedLayer]:
        """Return the layers of all teachers."""
        return [layer for layers in self.teachers for layer in layers]

    @property
    def softmax_cost(self) -> int:
        return self.cost(parse_program(SOFTMAX))

    def cost(self, program: Program) -> int:
        """Return the multiply-adds and entries of all layers."""
        return sum(each.cost(program.products + program.entries) for each in self.layers)

    def mismatch(self, program: Program) -> float:
        """Return the program's mismatch, by the proxy of the search: the mean over teachers, to three digits."""
        return mean_error(self.errors(program))

    def errors(self, program: Program) -> tuple[float, ...]:
        """Return the program's mismatch with each teacher."""
        return tuple(PROXIES[self.settings.proxy](program, layers) for layers in self.teachers)

    @cached_property
    def _depends_on(self) -> JsonDict:
        return {**asdict(self.settings), "layers": [each.size for each in self.layers]}

    def _digest(self, generation: int, program: str) -> str:
        return digest({**self._depends_on, "program": program, "generation": generation})

    def _claim_folder(self) -> None:
        """Write the settings into a new folder, or compare them with those of the search that it has."""
        path, mine = self.folder / SETTINGS, self._depends_on
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_shared(path, (json.dumps(mine, indent=1) + "\n").encode(), replace=False)
        there = _read_settings(dict[str, Any], self.folder)
        for name, value in mine.items():
            if there.get(name) == value:
                continue
            differs = "other recorded layers: the weights or the images have changed"
            if name not in ("layers", "identity"):
                differs = f"{name} {there.get(name)}, not {value}"
            raise ConfigError(f"{self.folder} has a search with {differs}; take another --output_dir")

    def _children(self, generation: int, done: Sequence[Evaluation]) -> list[Child]:
        settings = self.settings
        return propose(settings.seed, generation, settings.population, done, at_random=settings.at_random)

    def _cell(self, generation: int, slot: int) -> Path:
        return self.folder / "cells" / f"{generation:03}-{slot:03}"

    def _evaluation(self, generation: int, slot: int, child: Child) -> Evaluation:
        folder = self._cell(generation, slot)
        settings = self._digest(generation, child.program.text)
        if cell_state(folder, settings, flag="--output_dir") == "done":
            found = self._record(generation, slot)
            if found is not None:
                return found
        refuse_links(folder, self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        return save_first(self._evaluate(settings, generation, child), folder)

    def _record(self, generation: int, slot: int) -> Evaluation | None:
        """Return a record; None without one. Raises ConfigError: it is not of this search."""
        folder = self._cell(generation, slot)
        found = load_record(Evaluation, folder)
        if found is None:
            return None
        cell_state(folder, self._digest(generation, found.program), flag="--output_dir")
        measured = found.mismatch is not None
        if (
            (found.generation, found.error) != (generation, None)
            or measured == bool(found.refused)
            or (measured and len(found.objectives) != len(self.teachers))
            or not _is_canonical(found.program)
        ):
            raise ConfigError(f"{folder} is no cell of this search: remove it, and it is evaluated again")
        return found

    def _evaluate(self, settings: str, generation: int, child: Child) -> Evaluation:
        program = child.program
        verdict = check(program, USED)
        errors = self.errors(program) if verdict.passed else ()
        error = mean_error(errors) if errors else None
        if error == float("inf"):
            verdict = type(verdict)(program.text, "finite", "it is not finite on the teacher's inputs")
            errors, error = (), None
        return Evaluation(
            settings, None, generation, program.text, child.parents, verdict.check, verdict.reason, error,
            self.cost(program), errors,
        )  # fmt: skip

    def progress(self, generation: int, generations: int, done: Sequence[Evaluation]) -> str:
        """Return a line about the evaluations up to a generation."""
        best = min((each.mismatch for each in done if each.mismatch is not None), default=None)
        volume = hypervolume(done, self.softmax_cost)
        return (
            f"generation {generation + 1} of {generations}: {len(done)} programs, {len(front(done))} in the front, "
            f"hypervolume {volume:.4f}, least mismatch {best}"
        )

    def write_archive(self, done: Sequence[Evaluation]) -> None:
        """Write the front and what was refused. Raises WriteFailedError as `write_file`."""
        refused = Counter(each.refused for each in done if each.refused)
        archive = {
            "settings": asdict(self.settings),
            "evaluated": len(done),
            "refused": {each.name: refused[each.name] for each in USED},
            "hypervolume": round(hypervolume(done, self.softmax_cost), 6),
            "front": [asdict(each) for each in front(done)],
        }
        text = json.dumps(archive, indent=1, ensure_ascii=False) + "\n"
        write_shared(self.folder / ARCHIVE, text.encode(), replace=True)


def _is_canonical(program: str) -> bool:
    try:
        return parse_program(program).text == program
    except ProgramError:
        return False


def mean_error(errors: Sequence[float]) -> float:
    """Return the mean mismatch, to three digits."""
    return float(f"{fmean(errors):.{DIGITS}g}")


def open_search(folder: Path) -> Search:
    """Return the search of a folder. Raises ConfigError: it has none, or a file is damaged."""
    return Search(folder, _read_settings(SearchSettings, folder), read_layers(folder / LAYERS))


def _read_settings(kind: type[T], folder: Path) -> T:
    path = folder / SETTINGS
    text = read_if_there(path, refusal=ConfigError)
    if text is None:
        raise ConfigError(f"{folder} has no search: give the --output_dir of `graftvit programs search`")
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        raise ConfigError(
            f"{path} is not readable as the settings of a search; take another --output_dir"
        ) from error


def recorded_generations(search: Search) -> list[Evaluation]:
    """Return the evaluations of all complete generations."""
    done: list[Evaluation] = []
    while (found := search.recorded(done)) is not None:
        done += found
    return done


def controls(search: Search) -> dict[str, tuple[float, int]]:
    """Return mismatch and cost of the programs beside which a front is shown, by name."""
    programs = {name: parse_program(text) for name, text in CONTROLS.items()}
    return {name: (search.mismatch(program), search.cost(program)) for name, program in programs.items()}


# A search by several processes or jobs: each evaluates its share of a generation first, then what is missing.


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
