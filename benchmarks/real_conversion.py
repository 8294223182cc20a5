"""Convert a real pretrained ViT to several operators, align it, match its features and measure: into docs/real.md.

OMP_NUM_THREADS=1 python -m benchmarks.real_conversion      three seeds, one after the other; a stopped one is resumed
python -m benchmarks.real_conversion --report               write the page from the results that are there

A seed chooses the images and what operators draw at random. Every number is written down as soon as it is known. No
label is read but by nearest neighbors and the probe.
"""

from __future__ import annotations

import argparse
import json
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
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.pretrained import build_untrained, load_pretrained
from graftvit.transfer.analysis.benchmark_cases import machine, peak_bytes, step_of, time_steps
from graftvit.transfer.analysis.report.tables import Table
from graftvit.transfer.cells import digest
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data.loaders import create_reference_loader
from graftvit.transfer.hybrid_search import Palette
from graftvit.transfer.metrics.distance import Reader, compared_layers
from graftvit.transfer.metrics.measure import Against, Family, measure
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
            cells.small()
            cells.at_large()
            cells.costs()
            self.journal.known("picture", cells.picture)


class SeedCells:
    """The cells of one seed."""

    def __init__(self, study: Study, seed: int) -> None:
        self.study, self.seed, self.settings = study, seed, study.settings
        self.out, self.known = study.out / f"seed{seed}", study.journal.known
        self.garments = DataConfig(dataset="torch/fashion_mnist", data_path=str(study.fashion), workers=0)
        self.photographs = DataConfig(data_path=str(study.crops), workers=0)

    def small(self) -> None:
        """Measure the teacher, random weights, and every operator in every state."""
        teacher = self.study.teacher
        self.known(f"{self.seed}/teacher", lambda: self.numbers(load(teacher)))
        self.known(
            f"{self.seed}/random", lambda: self.numbers(build_untrained(load_pretrained(str(teacher))))
        )
        for state in STATES:
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
        return {name: self._reader(model, self.settings.layers, Kept) for name in FAMILIES}

    def _reader(self, model: nn.Module, layers: Collection[int], kind: type[Reader] = Reader) -> Reader:
        def predict(images: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.precision == "bf16"):
                out: Tensor = model(images)
            return out

        return kind(model, predict, layers)

    @torch.no_grad()
    def numbers(self, model: nn.Module) -> dict[str, Any]:
        """Return what there is to measure of a model at the small size."""
        return {
            images: self._measured(model.eval(), self.sets[images], families, self.teachers[images])
            for images, families in FAMILIES.items()
        }

    def _measured(
        self, model: nn.Module, images: Held, families: Collection[Family], teacher: Reader
    ) -> dict[str, float]:
        layers = compared_layers(teacher.model, model)
        pairs = tuple(pair for pair in layers.pairs if pair.student in self.settings.layers)
        layers = replace(layers, pairs=pairs)
        readers, against = {"model": self._reader(model, layers.student)}, Against(teacher, {"model": layers})
        labeled = self.sets["labeled"] if "knn" in families else None
        return measure(readers, {"model": families}, images, reference=labeled, against=against)["model"]

    def at_large(self) -> None:
        """Measure the aligned weights of the best operators on larger images than they were aligned on."""
        missing = [name for name in self._best() if self._key("large", name) not in self.cells]
        if not missing:
            return
        loaded = load_pretrained(str(self.study.large))
        sets = self._held_out(loaded.preprocessing, self.settings.few, self.settings.few)
        teachers = {name: self._reader(loaded.model.eval(), self.settings.layers, Kept) for name in sets}
        for name in missing:
            student = sized(load(self.out / "aligned" / name), self.settings.large)
            palette = Palette(loaded.model, {name: student})
            model = palette.model(palette.single(range(palette.depth), name))
            find = partial(self._distances, model, sets, teachers)
            self.known(self._key("large", name), find)

    @torch.no_grad()
    def _distances(
        self, model: nn.Module, sets: Mapping[str, Held], teachers: Mapping[str, Reader]
    ) -> dict[str, Any]:
        return {
            name: self._measured(model, images, ("distance",), teachers[name])
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
            self.study.pictures.mkdir(exist_ok=True)
            picture.savefig(self.study.pictures / f"real_{state}.png", dpi=60)
        return {"photograph": photograph.name}


def last(numbers: Mapping[str, float], metric: str) -> float:
    """Return the number of the last block."""
    return numbers[max(name for name in numbers if name.startswith(f"{metric}_layer"))]


# The page.


def tables(content: Mapping[str, Any], settings: Settings = Settings()) -> str:
    """Return what the page has between its marks: means over the seeds that are whole, with the standard error."""
    cells = content["cells"]
    seeds = [key.partition("/")[0] for key in cells if key.endswith(f"/cost/{settings.large}")]
    operators = list(cells[f"{seeds[0]}/cost/{settings.large}"])[1:]
    return "\n\n".join([
        f"{len(seeds)} seeds ({', '.join(seeds)}); {content['machine']}.",
        small_table(cells, seeds, operators).to_markdown(),
        "Debiased CKA with the teacher by block, on photographs:",
        layer_table(cells, seeds, operators).to_markdown(),
        f"The best {settings.best} at {settings.large} pixels, aligned at {settings.size}:",
        large_table(cells, seeds, settings).to_markdown(),
        "Time and memory of a forward pass of one image, as a ratio to softmax's:",
        cost_table(cells, seeds, operators, settings).to_markdown(),
    ])  # fmt: skip


def over(cells: Cells, seeds: Sequence[str], key: str, find: Callable[[Any], float], form: str) -> str:
    return spread([find(cells[f"{seed}/{key}"]) for seed in seeds], form)


def small_table(cells: Cells, seeds: Sequence[str], operators: Sequence[str]) -> Table:
    """Return a row for each operator and state, in headed groups by state."""
    head = [
        "operator",
        "cosine: garments",
        "photographs",
        "CKA: garments",
        "photographs",
        "kNN, %",
        "probe, %",
    ]
    numbers: list[tuple[Callable[[Any], float], str]] = [
        (lambda each: each["garments"]["cosine"], ".3f"),
        (lambda each: each["photographs"]["cosine"], ".3f"),
        (lambda each: last(each["garments"], "cka"), ".3f"),
        (lambda each: last(each["photographs"], "cka"), ".3f"),
        (lambda each: each["garments"]["knn_top1"], ".1f"),
        (lambda each: each["garments"]["probe_top1"], ".1f"),
    ]

    def row(name: str, key: str) -> list[str]:
        return [name, *(over(cells, seeds, key, find, form) for find, form in numbers)]

    rows: list[list[str]] = [row("teacher", "teacher"), row("random weights", "random")]
    for state, words in STATES.items():
        rows += [[words], *(row(name, f"{state}/{name}") for name in operators)]
    return Table(head, rows)


def layer_table(cells: Cells, seeds: Sequence[str], operators: Sequence[str]) -> Table:
    """Return the CKA of each compared block, converted → aligned → matched."""
    shown = [name for name in cells[f"{seeds[0]}/random"]["photographs"] if name.startswith("cka_layer")]

    def means(name: str, operator: str) -> str:
        found = [
            sum(cells[f"{seed}/{state}/{operator}"]["photographs"][name] for seed in seeds) / len(seeds)
            for state in STATES
        ]
        return " → ".join(f"{each:.2f}" for each in found)

    head = [f"block {int(name[-2:])}" for name in shown]
    return Table(["operator", *head], [[each, *(means(name, each) for name in shown)] for each in operators])


def large_table(cells: Cells, seeds: Sequence[str], settings: Settings) -> Table:
    """Return the distances at both sizes of the aligned weights, the small size on more images."""
    best = [key.split("/")[2] for key in cells if key.startswith(f"{seeds[0]}/large/")]
    head, rows = ["operator"], [[name] for name in best]
    for images in FAMILIES:
        for state, size in (("aligned", settings.size), ("large", settings.large)):
            head += [f"{images}, {size}: cosine", "CKA"]
            for name, row in zip(best, rows, strict=True):
                key = f"{state}/{name}"
                row.append(over(cells, seeds, key, lambda each: each[images]["cosine"], ".3f"))  # noqa: B023
                row.append(over(cells, seeds, key, lambda each: last(each[images], "cka"), ".3f"))  # noqa: B023
    return Table(head, rows)


def cost_table(cells: Cells, seeds: Sequence[str], operators: Sequence[str], settings: Settings) -> Table:
    """Return processor time and peak memory at both sizes."""
    sizes = (settings.size, settings.large)
    head = ["operator", *(f"{what}, {size}" for what in ("time", "memory") for size in sizes)]

    def ratio(name: str, what: str, each: Any) -> float:
        return float(each[name][what] / each["softmax"][what])

    rows = [
        [
            name,
            *(
                over(cells, seeds, f"cost/{size}", partial(ratio, name, what), ".2f")
                for what in ("seconds", "bytes")
                for size in sizes
            ),
        ]
        for name in operators
    ]
    return Table(head, rows)


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
    arguments = parser.parse_args()
    if not arguments.report:
        from .real_data import fashion_mnist, teacher  # here: a report needs neither

        journal = Journal(Settings(), arguments.out / "found.json", RESULTS)
        own = arguments.teacher or teacher(), arguments.fashion or fashion_mnist()
        Study(*own, arguments.out, Settings(), journal, IMAGES).run()
    put_between_marks(PAGE, "conversion", tables(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
