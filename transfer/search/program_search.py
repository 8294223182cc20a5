"""A search: generations of programs, each evaluated as a cell in a folder, and the front of all of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from ...checkpoints.atomic import write_shared
from ...checkpoints.files import read_if_there
from ...models.errors import ConfigError, JsonDict
from ...models.programs.program import FOUND, LINEAR, Program, ProgramError, parse_program
from ...models.programs.program_checks import CHECKS, check
from ..cells.records import cell_state, digest, load_record, save_first
from ..cells.threads import torch_threads
from .evolution import Child, Evaluation, front, hypervolume, propose
from .gradient_fit import fitted_mismatch
from .layer_file import layers_to_bytes, read_layers
from .matching import DIGITS, RecordedLayer, mismatch

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
    """What mismatch is measured by: a name of `PROXIES`."""
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
            raise ConfigError(f"{self.folder} has a search with {differs}; take another --out")

    def _children(self, generation: int, done: Sequence[Evaluation]) -> list[Child]:
        settings = self.settings
        return propose(settings.seed, generation, settings.population, done, at_random=settings.at_random)

    def _cell(self, generation: int, slot: int) -> Path:
        return self.folder / "cells" / f"{generation:03}-{slot:03}"

    def _evaluation(self, generation: int, slot: int, child: Child) -> Evaluation:
        folder = self._cell(generation, slot)
        settings = self._digest(generation, child.program.text)
        if cell_state(folder, settings, flag="--out") == "done":
            found = self._record(generation, slot)
            if found is not None:
                return found
        folder.mkdir(parents=True, exist_ok=True)
        return save_first(self._evaluate(settings, generation, child), folder)

    def _record(self, generation: int, slot: int) -> Evaluation | None:
        """Return a record; None without one. Raises ConfigError: it is not of this search."""
        folder = self._cell(generation, slot)
        found = load_record(Evaluation, folder)
        if found is None:
            return None
        cell_state(folder, self._digest(generation, found.program), flag="--out")
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
        raise ConfigError(f"{folder} has no search: give the --out of `graftvit search`")
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        raise ConfigError(
            f"{path} is not readable as the settings of a search; take another --out"
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
