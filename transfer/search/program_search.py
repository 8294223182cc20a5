"""A search: generations of programs, each evaluated as a cell in a folder, and the front of all of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ...checkpoints.atomic import write_text
from ...models.errors import ConfigError
from ...models.json_types import JsonDict
from ...models.programs.found import FOUND, LINEAR
from ...models.programs.program import Program
from ...models.programs.program_checks import CHECKS, check
from ...models.programs.program_text import parse_program
from ..cells.records import cell_state, digest, load_record, save_record
from .evolution import Child, Evaluation, front, hypervolume, propose
from .matching import RecordedLayer, mismatch

SOFTMAX = "mm(softmax(nt(scale(q) k)) v)"
CONTROLS = {"softmax": SOFTMAX, "elu + 1": LINEAR, "values": "v", "queries": "q", **FOUND}
"""Programs beside which the front is shown."""
USED = tuple(each for each in CHECKS if each.name not in ("stability", "triviality", "half", "training"))
"""The checks of a search: those that take milliseconds."""
ARCHIVE, SETTINGS = "archive.json", "settings.json"


@dataclass(frozen=True)
class SearchSettings:
    """What the records depend on, beside the teacher and its images."""

    seed: int
    population: int
    at_random: bool
    teacher: str
    images: str


@dataclass(frozen=True)
class Search:
    """A search in a folder. The same folder and settings resume a stopped search, and end in the same archive."""

    folder: Path
    settings: SearchSettings
    layers: Sequence[RecordedLayer]

    def run(self, generations: int, tell: Callable[[str], None]) -> list[Evaluation]:
        """Evaluate the generations that have no records, write the archive, and return all evaluations.

        Raises ConfigError: the folder has a search with other settings, which are named.
        """
        self._claim_folder()
        done: list[Evaluation] = []
        for generation in range(generations):
            children = propose(
                self.settings.seed,
                generation,
                self.settings.population,
                done,
                at_random=self.settings.at_random,
            )
            done += [self._evaluation(generation, slot, child) for slot, child in enumerate(children)]
            tell(self._progress(generation, generations, done))
        self._write(done)
        return done

    @property
    def softmax_cost(self) -> int:
        return self.cost(parse_program(SOFTMAX))

    def cost(self, program: Program) -> int:
        """Return the multiply-adds and entries of all layers."""
        return sum(each.cost(program.products + program.entries) for each in self.layers)

    @property
    def _depends_on(self) -> JsonDict:
        return {**asdict(self.settings), "layers": [each.size for each in self.layers]}

    def _claim_folder(self) -> None:
        """Write the settings into a new folder, or compare them with those of the search that it has."""
        path, mine = self.folder / SETTINGS, self._depends_on
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(mine, indent=1) + "\n")
            return
        try:
            there = TypeAdapter(dict[str, Any]).validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise ConfigError(
                f"{path} is not readable as the settings of a search; take another --out"
            ) from error
        for name, value in mine.items():
            if there.get(name) == value:
                continue
            differs = "other recorded layers: the weights or the images have changed"
            if name != "layers":
                differs = f"{name} {there.get(name)}, not {value}"
            raise ConfigError(f"{self.folder} has a search with {differs}; take another --out")

    def _evaluation(self, generation: int, slot: int, child: Child) -> Evaluation:
        folder = self.folder / "cells" / f"{generation:03}-{slot:03}"
        settings = digest({**self._depends_on, "program": child.program.text, "generation": generation})
        if cell_state(folder, settings, flag="--out") == "done":
            found = load_record(Evaluation, folder)
            if found is not None:
                return found
        folder.mkdir(parents=True, exist_ok=True)
        evaluation = self._evaluate(settings, generation, child)
        save_record(evaluation, folder)
        return evaluation

    def _evaluate(self, settings: str, generation: int, child: Child) -> Evaluation:
        program = child.program
        verdict = check(program, USED)
        error = mismatch(program, self.layers) if verdict.passed else None
        if error == float("inf"):
            verdict, error = (
                type(verdict)(program.text, "finite", "it is not finite on the teacher's inputs"),
                None,
            )
        return Evaluation(
            settings, None, generation, program.text, child.parents, verdict.check, verdict.reason, error,
            self.cost(program),
        )  # fmt: skip

    def _progress(self, generation: int, generations: int, done: Sequence[Evaluation]) -> str:
        best = min((each.mismatch for each in done if each.mismatch is not None), default=None)
        volume = hypervolume(done, self.softmax_cost)
        return (
            f"generation {generation + 1} of {generations}: {len(done)} programs, {len(front(done))} in the front, "
            f"hypervolume {volume:.4f}, least mismatch {best}"
        )

    def _write(self, done: Sequence[Evaluation]) -> None:
        refused = Counter(each.refused for each in done if each.refused)
        archive = {
            "settings": asdict(self.settings),
            "evaluated": len(done),
            "refused": {each.name: refused[each.name] for each in USED},
            "hypervolume": round(hypervolume(done, self.softmax_cost), 6),
            "front": [asdict(each) for each in front(done)],
        }
        write_text(self.folder / ARCHIVE, json.dumps(archive, indent=1, ensure_ascii=False) + "\n")


def controls(search: Search) -> dict[str, tuple[float, int]]:
    """Return mismatch and cost of the programs beside which a front is shown, by name."""
    programs = {name: parse_program(text) for name, text in CONTROLS.items()}
    return {
        name: (mismatch(program, search.layers), search.cost(program)) for name, program in programs.items()
    }
