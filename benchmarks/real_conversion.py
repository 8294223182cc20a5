"""Convert a real pretrained ViT to several operators, align it, match its features and measure: into docs/real.md.

OMP_NUM_THREADS=1 python -m benchmarks.real_conversion      three seeds, one after the other; a stopped one is resumed
python -m benchmarks.real_conversion --report               write the page from the results that are there
python -m benchmarks.real_conversion --kernels FOUND.JSON   print how far those of another --out and kernel are away

A seed chooses the images and what operators draw at random. Every number is written down as soon as it is known. No
label is read but by nearest neighbors and the probe.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from graftvit import load, save, visualize
from graftvit.checkpoints.atomic import write_text
from graftvit.checkpoints.files import digest
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.pretrained import build_untrained, load_pretrained
from graftvit.transfer.analysis.benchmark_cases import machine, peak_bytes, step_of, time_steps
from graftvit.transfer.analysis.report.tables import Table
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data.loaders import create_reference_loader
from graftvit.transfer.metrics.distance import Reader, compared_layers
from graftvit.transfer.metrics.measure import Against, Family, measure
from scipy import stats
from torch import Tensor, nn
from torchvision.datasets import FashionMNIST

from .hybrids import run, spread
from .marked import put_between_marks
from .real_hybrids import make_crops, sized

PAGE = Path(__file__).parent.parent / "docs" / "real.md"
IMAGES = PAGE.parent / "images"
RESULTS = Path(__file__).parent / "results" / "real_conversion.json"
STATES = {"converted": "zero-shot", "aligned": "aligned", "matched": "features matched"}
"""Folders of the students, and what tables call them."""
FAMILIES: dict[str, tuple[Family, ...]] = {
    "garments": ("knn", "probe", "distance"),
    "photographs": ("distance",),
}
"""What is measured on which images."""
DRAWN = "linear"
"""The operator whose attention is drawn."""
Cells = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Training:
    """One of the two trainings without labels."""

    steps: int
    lr: float


@dataclass(frozen=True)
class Settings:
    """What the numbers depend on; the test takes smaller ones."""

    operators: tuple[str, ...] = ("linear", "focused", "performer", "linformer", "nystrom", "window")
    size: int = 224
    large: int = 448
    best: int = 4
    """Operators measured at the large size: of the first seed those nearest to the teacher on photographs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    align: Training = Training(40, 3e-4)
    match: Training = Training(15, 1e-4)
    scale: float = 10.0
    """How many times the rate the parameters learn with that a conversion added."""
    batch: int = 4
    unlabeled: int = 450
    """Garments to learn from without labels, beside as many crops of photographs."""
    train: int = 100
    """Labeled garments for nearest neighbors and the probe."""
    test: int = 80
    crops: int = 20
    few: int = 8
    """Images of each set at the large size."""
    rounds: int = 5
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of training and of features; times are of float32."""
    layers: tuple[int, ...] = (2, 5, 8, 11)
    """Blocks whose outputs are compared, and layers in the picture."""


@dataclass(frozen=True)
class Held:
    """Batches that were read once, so that a reader sees the same ones again and runs its model once."""

    batches: list[tuple[Tensor, Tensor, Tensor]]
    num_classes: int
    class_names: Sequence[str] | None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return iter(self.batches)


class Kept(Reader):
    """A reader that keeps its last images and what it read of them, for the next student."""

    def forget(self) -> None:
        """Keep them: its weights do not change."""


def sample(data: DataConfig, split: str, count: int, seed: int, spec: Preprocessing, batch: int) -> Held:
    """Return some images of a split, as many of each class, as evaluation sees them."""
    chosen = {"train_split": split, "train_samples": count, "label_seed": seed, "eval_batch_size": batch}
    other = "validation" if split == "train" else "train"
    loader = create_reference_loader(data.model_copy(update={**chosen, "val_split": other}), spec)
    return Held(list(loader), loader.num_classes, loader.class_names)


class Journal:
    """Numbers by key in files that are written whole after each new one."""

    def __init__(self, settings: Settings, path: Path, *copies: Path) -> None:
        self.settings, self.paths, self.cells = digest(asdict(settings)), (path, *copies), {}
        if path.exists():
            found = json.loads(path.read_text())
            if found["settings"] != self.settings:
                raise SystemExit(f"{path} has numbers of other settings: take another --out, or remove it")
            self.cells: Cells = found["cells"]

    def known(self, key: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what there is of `key`, or else what `find` gives, which is written down."""
        if key not in self.cells:
            self.cells[key] = find()
            content = {"settings": self.settings, "machine": machine(), "cells": self.cells}
            for path in self.paths:
                write_text(path, json.dumps(content, indent=1) + "\n")
            print(key, flush=True)
        return self.cells[key]


class Study:
    """The teacher at both sizes, its students by seed and state, and what is measured of them."""

    def __init__(
        self, teacher: Path, fashion: Path, out: Path, settings: Settings, journal: Journal, pictures: Path
    ) -> None:
        self.out, self.settings, self.journal, self.pictures = out, settings, journal, pictures
        self.fashion, self.crops = fashion, make_crops(out / "crops")
        self.teacher, self.large = out / f"teacher-{settings.size}", out / f"teacher-{settings.large}"
        for size, folder in ((settings.size, self.teacher), (settings.large, self.large)):
            if not folder.is_dir():
                save(sized(load(teacher), size), folder)

    def run(self) -> None:
        """Measure seed after seed, so that a study that is stopped has whole seeds."""
        for seed in self.settings.seeds:
            cells = SeedCells(self, seed)
            cells.references()
            cells.state("converted")
            cells.costs()
            cells.state("aligned")
            cells.at_large()
            self.journal.known("picture", cells.picture)
            cells.state("matched")


class SeedCells:
    """The cells of one seed."""

    def __init__(self, study: Study, seed: int) -> None:
        self.study, self.seed, self.settings = study, seed, study.settings
        self.out, self.known = study.out / f"seed{seed}", study.journal.known
        self.garments = DataConfig(dataset="torch/fashion_mnist", data_path=str(study.fashion), workers=0)
        self.photographs = DataConfig(data_path=str(study.crops), workers=0)

    def references(self) -> None:
        """Measure the teacher, and a model of its architecture that learned nothing."""
        teacher = self.study.teacher
        untrained = partial(build_untrained, load_pretrained(str(teacher)))
        self.known(f"{self.seed}/teacher", lambda: self.numbers(load(teacher)))
        self.known(f"{self.seed}/random", lambda: self.numbers(untrained()))

    def state(self, state: str) -> None:
        """Make the students of a state, and measure each at the small size."""
        missing = [name for name in self.settings.operators if self._key(state, name) not in self.cells]
        if missing:
            getattr(self, state)()
        for name in missing:
            self.known(self._key(state, name), lambda: self.numbers(load(self.out / state / name)))  # noqa: B023

    @property
    def cells(self) -> Cells:
        return self.study.journal.cells

    def _key(self, state: str, name: str) -> str:
        return f"{self.seed}/{state}/{name}"

    # The students, by the commands that a user has.

    def converted(self) -> None:
        for name in self.settings.operators:
            folder = self.out / "converted" / name
            if not folder.is_dir():
                plan = ("--plan", f"*: {name}", "--seed", str(self.seed))
                run(["convert", str(self.study.teacher), *plan, "--output_dir", str(folder)])

    def aligned(self) -> None:
        self._train("aligned", "converted", self.settings.align, {"mode": "align"})

    def matched(self) -> None:
        match = {"method": "feature", "tokens": "both", "task_weight": 0.0, "weight": 1.0}
        self._train("matched", "aligned", self.settings.match, {"mode": "transfer", "transfer": match})

    def _train(self, state: str, before: str, training: Training, mode: dict[str, Any]) -> None:
        """Train all students in one run: one pass of the teacher teaches them all. A stopped run is resumed."""
        batch, rates = self.settings.batch, {r"\.operator\.": self.settings.scale}
        recipe = {
            **mode,
            "seed": self.seed,
            "teacher": {"source": f"local-dir:{self.study.teacher}"},
            "data": {"data_path": str(self.pile), "views": 0, "batch_size": batch, "workers": 0, "val_split": None},
            "optim": {
                "max_steps": training.steps, "lr": training.lr, "weight_decay": 0.0, "clip_grad": 1.0, "scales": rates,
            },
            "engine": {
                "device": "cpu", "precision": self.settings.precision, "save_every": 20, "progress": False,
                "report": False,
            },
            "students": {
                name: {"student.model": f"local-dir:{self.out / before / name}"} for name in self.settings.operators
            },
        }  # fmt: skip
        path = self.out / f"{state}.yaml"
        write_text(path, yaml.safe_dump(recipe))
        run(["train", str(path), "--output_dir", str(self.out / state)])

    @cached_property
    def pile(self) -> Path:
        """A folder of images without labels: garments, and crops of the photographs to train on."""
        root, images = self.out / "pile", FashionMNIST(str(self.study.fashion), train=True)
        if not (root / "complete").exists():
            (root / "train").mkdir(parents=True, exist_ok=True)
            chosen = np.random.default_rng(self.seed).permutation(len(images))[: self.settings.unlabeled]
            for place in chosen.tolist():
                images[place][0].save(root / "train" / f"garment{place}.png")
            for crop in sorted((self.study.crops / "train").glob("*/*.png")):
                (root / "train" / f"{crop.parent.name}{crop.name}").write_bytes(crop.read_bytes())
            (root / "complete").touch()
        return root

    # What is measured.

    @cached_property
    def sets(self) -> dict[str, Held]:
        """Images at the small size that nothing learned from, each set in one batch, and the labeled ones."""
        spec, own = load_pretrained(str(self.study.teacher)).preprocessing, self.settings
        of_train = sample(self.garments, "train", own.train, self.seed, spec, 20)
        return {"labeled": of_train, **self._held_out(spec, own.test, own.crops)}

    def _held_out(self, spec: Preprocessing, garments: int, crops: int) -> dict[str, Held]:
        counts = {"garments": (self.garments, garments), "photographs": (self.photographs, crops)}
        return {
            name: sample(data, "validation", count, self.seed, spec, count)
            for name, (data, count) in counts.items()
        }

    @cached_property
    def teachers(self) -> dict[str, Reader]:
        """A reader of the teacher for each set: it keeps what it read last, so the teacher runs once a set."""
        model = load(self.study.teacher).eval()
        return {name: self._reader(model, Kept) for name in FAMILIES}

    def _reader(self, model: nn.Module, kind: type[Reader] = Reader) -> Reader:
        def predict(images: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.precision == "bf16"):
                out: Tensor = model(images)
            return out

        return kind(model, predict, self.settings.layers)

    @torch.no_grad()
    def numbers(self, model: nn.Module) -> dict[str, Any]:
        """Return what there is to measure of a model at the small size."""
        reader = self._reader(model.eval())
        return {
            images: self._measured(reader, self.sets[images], families, self.teachers[images])
            for images, families in FAMILIES.items()
        }

    def _measured(
        self, reader: Reader, images: Held, families: Collection[Family], teacher: Reader
    ) -> dict[str, float]:
        layers = compared_layers(teacher.model, reader.model)
        pairs = tuple(pair for pair in layers.pairs if pair.student in self.settings.layers)
        against = Against(teacher, {"model": replace(layers, pairs=pairs)})
        labeled = self.sets["labeled"] if "knn" in families else None
        return measure({"model": reader}, {"model": families}, images, reference=labeled, against=against)[
            "model"
        ]

    def at_large(self) -> None:
        """Measure the aligned weights of the best operators on larger images than they were aligned on."""
        missing = [name for name in self._best() if self._key("large", name) not in self.cells]
        if not missing:
            return
        loaded = load_pretrained(str(self.study.large))
        sets = self._held_out(loaded.preprocessing, self.settings.few, self.settings.few)
        teachers = {name: self._reader(loaded.model.eval(), Kept) for name in sets}
        for name in missing:
            model = sized(load(self.out / "aligned" / name), self.settings.large)
            model.pos_embed.data.copy_(loaded.model.pos_embed)  # not its own, resampled twice
            find = partial(self._distances, model, sets, teachers)
            self.known(self._key("large", name), find)

    @torch.no_grad()
    def _distances(
        self, model: nn.Module, sets: Mapping[str, Held], teachers: Mapping[str, Reader]
    ) -> dict[str, Any]:
        reader = self._reader(model)
        return {
            name: self._measured(reader, images, ("distance",), teachers[name])
            for name, images in sets.items()
        }

    def _best(self) -> list[str]:
        def error(name: str) -> float:
            return float(
                last(self.cells[f"{self.settings.seeds[0]}/aligned/{name}"]["photographs"], "relative_error")
            )

        return sorted(self.settings.operators, key=error)[: self.settings.best]

    def costs(self) -> None:
        """Time all operators in turn with softmax, one image a call, and count what a pass allocates."""
        for size, folder in (
            (self.settings.size, self.study.teacher),
            (self.settings.large, self.study.large),
        ):
            self.known(f"{self.seed}/cost/{size}", partial(self._cost, size, folder))

    def _cost(self, size: int, teacher: Path) -> dict[str, Any]:
        models = {"softmax": load(teacher).eval()}
        for name in self.settings.operators:
            models[name] = sized(load(self.out / "converted" / name), size).eval()
        image, device = torch.zeros(1, 3, size, size), torch.device("cpu")
        steps = {name: step_of(partial(model, image)) for name, model in models.items()}
        times = time_steps(steps, self.settings.rounds, device)
        return {
            name: {"seconds": times[name].cpu, "bytes": peak_bytes(step, device)}
            for name, step in steps.items()
        }

    def picture(self) -> dict[str, Any]:
        """Draw what the class token attends to in the teacher and a student, converted and aligned."""
        photograph = next(iter(sorted((self.study.crops / "validation" / "rocket").glob("*.png"))))
        for state in ("converted", "aligned"):
            seen = visualize(
                str(self.out / state / DRAWN),
                [photograph],
                teacher=str(self.study.teacher),
                layers=list(self.settings.layers),
            )
            picture = next(seen.figures[name] for name in seen.figures if name.endswith("_teacher.png"))
            picture.suptitle("")  # it has the paths of this machine
            self.study.pictures.mkdir(exist_ok=True)
            picture.savefig(self.study.pictures / f"real_{state}.png", dpi=60)
        return {"photograph": photograph.name}


def last(numbers: Mapping[str, float], metric: str) -> float:
    """Return the number of the last block."""
    return numbers[max(name for name in numbers if name.startswith(f"{metric}_layer"))]


# The page.


def tables(content: Mapping[str, Any], settings: Settings = Settings()) -> str:
    """Return what the page has between its marks, of every part that was measured for a whole seed."""
    cells: Cells = content["cells"]
    shown = [words for state, words in STATES.items() if of_state(cells, settings, state)[0]]
    parts = {
        f"At {settings.size} pixels": small_table,
        "Debiased CKA with the teacher by block, on photographs, " + " → ".join(shown): layer_table,
        f"Aligned at {settings.size} pixels, measured at both sizes": large_table,
        "Processor time and memory of a forward pass of one image, as shares of softmax attention's": cost_table,
    }
    found = [(words, make(cells, settings)) for words, make in parts.items()]
    texts = [f"{words}:\n\n{table.to_markdown()}" for words, table in found if table.rows]
    return "\n\n".join([*texts, f"Measured on {content['machine']}."])


def whole(cells: Cells, settings: Settings, keys: Collection[str]) -> list[int]:
    """Return the seeds that have a cell under each of the keys."""
    return [seed for seed in settings.seeds if all(f"{seed}/{key}" in cells for key in keys)]


def of_state(cells: Cells, settings: Settings, state: str) -> tuple[list[int], list[str]]:
    """Return the seeds that are whole in a state, and the keys of its operators."""
    keys = [f"{state}/{name}" for name in settings.operators]
    return whole(cells, settings, keys), keys


def counted(seeds: Sequence[int]) -> str:
    return "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"


def over(cells: Cells, seeds: Sequence[int], key: str, find: Callable[[Any], float], form: str) -> str:
    """Return the mean over seeds, and the standard error of several."""
    return spread([find(cells[f"{seed}/{key}"]) for seed in seeds], form)


NUMBERS: tuple[tuple[str, Callable[[Any], float], str], ...] = (
    ("cosine: garments", lambda each: each["garments"]["cosine"], ".3f"),
    ("photographs", lambda each: each["photographs"]["cosine"], ".3f"),
    ("CKA: garments", lambda each: last(each["garments"], "cka"), ".3f"),
    ("photographs", lambda each: last(each["photographs"], "cka"), ".3f"),
    ("kNN, %", lambda each: each["garments"]["knn_top1"], ".1f"),
    ("probe, %", lambda each: each["garments"]["probe_top1"], ".1f"),
)
"""What a row of an operator has at the small size: its header, the number, its form."""


def small_table(cells: Cells, settings: Settings) -> Table:
    """Return a row for each operator and state, in headed groups by state."""

    def row(name: str, key: str, seeds: Sequence[int]) -> list[str]:
        return [name, *(over(cells, seeds, key, find, form) for _, find, form in NUMBERS)]

    rows = [
        row(name, key, seeds)
        for name, key in (("teacher", "teacher"), ("random weights", "random"))
        if (seeds := whole(cells, settings, [key]))
    ]
    for state, words in STATES.items():
        seeds, keys = of_state(cells, settings, state)
        if seeds:
            rows += [
                [f"{words}, {counted(seeds)}"],
                *(row(key.partition("/")[2], key, seeds) for key in keys),
            ]
    return Table(["operator", *(head for head, _, _ in NUMBERS)], rows)


def kernel_table(cells: Cells, others: Cells, settings: Settings) -> Table:
    """Return how far the operators' means over seeds are apart in two studies: mean / largest, by state and number.

    The last column counts the means of the other study that are in the 95 % interval of this one (Student's t).
    """
    rows = []
    for state, words in STATES.items():
        (ours, keys), (theirs, _) = of_state(cells, settings, state), of_state(others, settings, state)
        seeds = sorted({*ours} & {*theirs})
        if len(seeds) < 2:
            continue
        row, inside = [f"{words}, {counted(seeds)}"], []
        reach = float(stats.t.ppf(0.975, len(seeds) - 1)) / len(seeds) ** 0.5
        for _, find, form in NUMBERS:
            apart = []
            for key in keys:
                own, other = ([find(each[f"{seed}/{key}"]) for seed in seeds] for each in (cells, others))
                apart.append(abs(statistics.mean(own) - statistics.mean(other)))
                inside.append(apart[-1] <= reach * statistics.stdev(own))
            row.append(f"{statistics.mean(apart):{form}} / {max(apart):{form}}")
        rows.append([*row, f"{sum(inside)} of {len(inside)}"])
    return Table(["state", *(head for head, _, _ in NUMBERS), "in the interval"], rows)


def layer_table(cells: Cells, settings: Settings) -> Table:
    """Return the CKA of each compared block, converted → aligned → matched."""
    seeds = {state: of_state(cells, settings, state)[0] for state in STATES}

    def mean(state: str, name: str, layer: int) -> float:
        found = [cells[f"{seed}/{state}/{name}"]["photographs"] for seed in seeds[state]]
        return sum(each[f"cka_layer{layer:02d}"] for each in found) / len(found)

    def means(name: str, layer: int) -> str:
        return " → ".join(f"{mean(state, name, layer):.2f}" for state in STATES if seeds[state])

    head = ["operator", *(f"block {layer}" for layer in settings.layers)]
    rows = [[name, *(means(name, layer) for layer in settings.layers)] for name in settings.operators]
    return Table(head, rows if seeds["converted"] else [])


def large_table(cells: Cells, settings: Settings) -> Table:
    """Return the distances at both sizes of the aligned weights, those of the small size on more images."""
    names = [name for name in settings.operators if f"{settings.seeds[0]}/large/{name}" in cells]
    seeds = whole(cells, settings, [f"large/{name}" for name in names])
    head, rows = [f"operator, {counted(seeds)}"], [[name] for name in names]
    for images, (state, size) in itertools.product(
        FAMILIES, (("aligned", settings.size), ("large", settings.large))
    ):
        head += [f"{images}, {size}: cosine", "CKA"]
        for row in rows:
            key = f"{state}/{row[0]}"
            row.append(over(cells, seeds, key, lambda each: each[images]["cosine"], ".3f"))  # noqa: B023
            row.append(over(cells, seeds, key, lambda each: last(each[images], "cka"), ".3f"))  # noqa: B023
    return Table(head, rows if len(names) == settings.best else [])


def cost_table(cells: Cells, settings: Settings) -> Table:
    """Return processor time and peak memory at both sizes."""
    sizes = (settings.size, settings.large)
    seeds = whole(cells, settings, [f"cost/{size}" for size in sizes])
    head = [
        f"operator, {counted(seeds)}",
        *(f"{what}, {size} px" for what in ("time", "memory") for size in sizes),
    ]

    def ratio(name: str, what: str, each: Any) -> float:
        return float(each[name][what] / each["softmax"][what])

    def row(name: str) -> list[str]:
        places = [(what, size) for what in ("seconds", "bytes") for size in sizes]
        return [
            name,
            *(over(cells, seeds, f"cost/{size}", partial(ratio, name, what), ".2f") for what, size in places),
        ]

    return Table(head, [row(name) for name in settings.operators] if seeds else [])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.real_conversion", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, help="model folder; by default that of benchmarks.real_data")
    parser.add_argument(
        "--fashion", type=Path, help="folder of Fashion-MNIST; by default that of benchmarks.real_data"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/real_conversion"))
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--kernels", type=Path, metavar="FOUND.JSON", help="measure nothing, and compare")
    arguments = parser.parse_args()
    if arguments.kernels is not None:
        cells = [json.loads(path.read_text())["cells"] for path in (RESULTS, arguments.kernels)]
        print(kernel_table(*cells, Settings()).to_markdown())
        return
    if not arguments.report:
        from .real_data import fashion_mnist, teacher  # here: a report needs neither

        journal = Journal(Settings(), arguments.out / "found.json", RESULTS)
        own = arguments.teacher or teacher(), arguments.fashion or fashion_mnist()
        Study(*own, arguments.out, Settings(), journal, IMAGES).run()
    put_between_marks(PAGE, "conversion", tables(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
