"""Choose hybrids of a pretrained ViT at two image sizes, recover them, and compare with a greedy search.

python -m benchmarks.real_hybrids TEACHER        everything, in about two hours of two cores; a stopped one is resumed
python -m benchmarks.real_hybrids --report       write the page from the results that are there

TEACHER is a model folder of a ViT, or what `graftvit checkpoint convert` wrote. Images are crops of scikit-image's
photographs; the photographs of the validation split are others than those of training. Operators are aligned at the
smaller size, and hybrids recovered at their own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import skimage.data
import torch
from graftvit import load, save
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.launch.commands.hybrid import recovery_flags
from graftvit.models.conversion import resize
from graftvit.transfer.analysis.report.tables import Table
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data.survey import sample_images
from graftvit.transfer.hybrid_search import (
    KEEP,
    Budget,
    HybridSearch,
    Journal,
    Measure,
    Mix,
    Palette,
    Scale,
    end_error,
    end_of,
)
from PIL import Image
from torch import Tensor, nn

from .hybrids import OPERATORS, PAGE, SHARES, put_back, run
from .marked import put_between_marks

RESULTS = Path(__file__).parent / "results" / "real_hybrids.json"
SIZES: dict[int, Measure] = {224: "macs", 448: "latency"}
"""Sides of the images, and what budgets are of: at 224 pixels no operator here is faster than softmax on a CPU."""
CROPS_SCORED = {"train": {224: 32, 448: 8}, "validation": {224: 32, 448: 16}}
"""Crops that mixes are chosen by, and that they are judged by."""
BASE = 224
STEPS = {"align": 60, "recover": 20}
RECOVERY = {224: ("--batch_size", "8", "--lr", "1e-4"), 448: ("--batch_size", "4", "--lr", "1e-5")}
PHOTOGRAPHS = {
    "train": ("astronaut", "brick", "chelsea", "coffee", "coins", "grass", "horse", "hubble_deep_field", "moon"),
    "validation": ("camera", "gravel", "immunohistochemistry", "retina", "rocket"),
}  # fmt: skip
CROPS = {"train": 50, "validation": 24}
"""Crops of each photograph."""


@dataclass(frozen=True)
class Outcome:
    """One budget at one size, errors on crops of photographs that nothing was chosen or trained on."""

    size: int
    share: float
    """How far from the cheapest mix to the teacher."""
    promised: float
    name: str
    """`chosen` or `greedy`."""
    cost: float
    plan: str
    error: float
    recovered: float


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.real_hybrids", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("teacher", nargs="?", help="model folder of a pretrained ViT")
    parser.add_argument("--sizes", nargs="+", type=int, choices=SIZES, default=list(SIZES))
    parser.add_argument("--out", type=Path, default=Path("runs/real_hybrids"))
    parser.add_argument("--report", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    found = [Outcome(**each) for each in json.loads(RESULTS.read_text())] if RESULTS.exists() else []
    if not (arguments.report or arguments.teacher):
        parser.error("give the teacher, or --report")
    for size in [] if arguments.report else arguments.sizes:
        own = Study(arguments.teacher, arguments.out).outcomes(size)
        found = [*(each for each in found if each.size != size), *own]
        RESULTS.write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n")
    put_between_marks(PAGE, "real", table(found))


def make_crops(root: Path) -> Path:
    """Write square crops of at least 150 pixels, in a folder for each photograph, unless they are there."""
    if (root / "complete").exists():
        return root
    for split, names in PHOTOGRAPHS.items():
        for number, name in enumerate(names):
            photograph = Image.fromarray(np.asarray(getattr(skimage.data, name)())).convert("RGB")
            random, folder = np.random.default_rng([len(split), number]), root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for place in range(CROPS[split]):
                side = int(random.integers(150, min(photograph.size) + 1))
                left, top = (int(random.integers(0, length - side + 1)) for length in photograph.size)
                box = (left, top, left + side, top + side)
                photograph.crop(box).resize((448, 448), Image.Resampling.BICUBIC).save(
                    folder / f"{place:02d}.png"
                )
    (root / "complete").touch()
    return root


class Study:
    """The teacher at both sizes, its aligned operators, and what is measured of their mixes."""

    def __init__(self, teacher: str, out: Path) -> None:
        self.out, self.images = out, make_crops(out / "crops")
        for size in SIZES:
            if not self.teacher(size).is_dir():
                save(sized(load(teacher), size), self.teacher(size))
        run([
            *("hybrid", str(self.teacher(BASE)), "--keep", "1", "--operators", ",".join(OPERATORS)),
            *("--max_steps", str(STEPS["align"]), "--images", "4", "--validation", "0", *self.words(out / "aligned")),
        ])  # fmt: skip

    def teacher(self, size: int) -> Path:
        return self.out / f"teacher-{size}"

    def words(self, out: Path) -> list[str]:
        data = ["--data_path", str(self.images), "--batch_size", "8", "--workers", "0", "--device", "cpu"]
        return [*data, "--output_dir", str(out), "--no-progress"]

    def palette(self, size: int) -> Palette:
        library = sorted((self.out / "aligned" / "library").iterdir())
        students = {
            name: next(each for each in library if each.name.startswith(name[:6])) for name in OPERATORS
        }
        models = {name: sized(load(folder).eval(), size) for name, folder in students.items()}
        return Palette(load(self.teacher(size)), models)

    def crops(self, size: int, split: str) -> Tensor:
        data = DataConfig(data_path=str(self.images), train_split=split, workers=0)
        preprocessing = load_pretrained(str(self.teacher(size))).preprocessing
        return sample_images(data, preprocessing, CROPS_SCORED[split][size], seed=1)

    def outcomes(self, size: int) -> list[Outcome]:
        batches = self.crops(size, "train").split(4)
        journal = Journal(self.out / f"{size}.jsonl", str(size))
        search = HybridSearch(self.palette(size), batches, Scale((size, size), repeats=9), journal, print)
        measure = SIZES[size]
        least = search.cost(measure, search.cheapest(search.cost_sum(measure)))
        found, chosen = [], []
        for share in SHARES:
            limit = round(least + share * (1 - least), 4)
            mixes = {
                "chosen": search.best(Budget(measure, limit)).mix,
                "greedy": put_back(search, measure, limit),
            }
            chosen += [(share, limit, name, mix) for name, mix in mixes.items()]
            print(chosen[-2:], flush=True)
        for share, limit, name, mix in chosen:
            plan = "".join("s" if each == KEEP else each[0] for each in mix)
            errors = self.errors(search, mix, self.out / f"hybrids-{size}" / plan)
            found.append(Outcome(size, share, limit, name, search.cost(measure, mix), plan, *errors))
            print(found[-1], flush=True)
        return found

    def errors(self, search: HybridSearch, mix: Mix, folder: Path) -> tuple[float, float]:
        """Return the error of a mix on held-out crops, before it is recovered and after."""
        size = search.scale.size[0]
        batches = self.crops(size, "validation").split(4)
        models = search.palette.model(mix), self.recovered(search.palette.model(mix), size, folder).eval()
        with torch.no_grad():
            own = [end_of(search.palette.teacher, batch) for batch in batches]
            before, after = (end_error([end_of(model, batch) for batch in batches], own) for model in models)
        return before, after

    def recovered(self, student: nn.Module, size: int, folder: Path) -> nn.Module:
        """Return a mix after its final tokens were taught to be the teacher's, without labels."""
        if not (folder / "start").is_dir():
            save(student, folder / "start")
        run([
            *("train", *recovery_flags(student), "--student.model", f"local-dir:{folder / 'start'}", "--no-report"),
            *("--teacher.source", str(self.teacher(size)), "--max_steps", str(STEPS["recover"])),
            *(*self.words(folder / "run"), *RECOVERY[size]),
        ])  # fmt: skip
        return load(folder / "run")


def sized(model: nn.Module, size: int) -> nn.Module:
    resize(model, (size, size))
    return model


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a row for each size and budget."""
    header = [
        "pixels",
        "cost",
        "budget",
        "chosen",
        "error",
        "recovered",
        "greedy: cost",
        "error",
        "recovered",
    ]
    rows = []
    for size, share in dict.fromkeys((each.size, each.share) for each in outcomes):
        both = {each.name: each for each in outcomes if (each.size, each.share) == (size, share)}
        first, other = both["chosen"], both["greedy"]
        costs = f"{SIZES[size]} {first.cost:.3f}", f"{first.promised:.3f}"
        numbers = (first.error, first.recovered), (other.cost, other.error, other.recovered)
        own, theirs = ([f"{each:.3f}" for each in part] for part in numbers)
        rows.append([str(size), *costs, first.plan, *own, *theirs])
    return Table(header, rows).to_markdown()


if __name__ == "__main__":
    main()
