"""Ask whether a pretrained teacher's attention helps students on images that it never saw, into docs/real.md.

python -m benchmarks.real_transfer                  everything, one thread, about three hours; a stopped one is resumed
python -m benchmarks.real_transfer --labels 10      a part: labels a class, --students and --seeds choose it
python -m benchmarks.real_transfer --report         write the page from the results that are there
python -m benchmarks.real_transfer --kernels CELLS.JSON   print how far those of another --out and kernel are away

The teacher is the ViT-S/14 of a saliency package (`python -m benchmarks.real_data`), the images are those of
Fashion-MNIST, 28 pixels upsampled to 56: 16 patches and the class token. Each cell is one `graftvit train` of the same
steps, tested on the first 1,000 test images. Learning rates were chosen with another seed: that of scratch for all
fresh students, and one for fine-tuning.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from graftvit.checkpoints.atomic import write_bytes, write_text
from graftvit.checkpoints.files import read_records
from graftvit.transfer.analysis.report.tables import Table

from . import real_data
from .hybrids import run
from .marked import put_between_marks

PAGE = Path(__file__).parent.parent / "docs" / "real.md"
RESULTS = Path(__file__).parent / "results" / "real_transfer.json"
SEEDS, LABELS = (0, 1, 2), (10, 40, 100)
"""Seeds that are reported, and labels for each of ten classes."""
CLASSES, IMAGES, SIDE = 10, 1000, 56
"""Classes, test images, and pixels of a side."""
STEPS, BATCH = 200, 16
SWEEP_SEED, SWEEP_LABELS = 100, 40
RATES = {"scratch": (2.5e-4, 5e-4, 1e-3), "finetune": (1e-4, 3e-4)}
"""Learning rates that are tried, of the small student and of the teacher; other fresh students take that of scratch."""
STUDENTS = {"small": {"embed_dim": 192, "depth": 6, "num_heads": 3}, "same": {}}
"""What a fresh student has other than its teacher."""
METHODS = (
    ("small", ("scratch", "copy mean", "distill mean", "feature")),
    ("same", ("scratch", "copy", "distill", "feature", "finetune")),
    ("small", ("copy match", "distill match")),
)
"""Students and methods in the order in which they run; where the numbers of heads differ, with the choice of heads."""
TAKES = {
    "scratch": "nothing",
    "copy": "maps, also at inference",
    "distill": "maps, in training",
    "feature": "pooled features, in training",
    "finetune": "all weights, as the start",
}


@dataclass(frozen=True)
class Cell:
    """One training."""

    student: str
    method: str
    labels: int
    seed: int
    rate: float

    @property
    def name(self) -> str:
        return f"{self.student}-{self.method.replace(' ', '-')}-{self.labels}-{self.seed}-{self.rate:g}"

    def words(self, teacher: Path, side: int) -> list[str]:
        """Return the words of `graftvit train` that say what learns, from what, and how fast."""
        method, _, heads = self.method.partition(" ")
        mode = method if method in ("scratch", "finetune") else "transfer"
        words = [] if mode == "scratch" else ["--teacher.source", f"local-dir:{teacher}"]
        if mode != "finetune":
            config = json.loads((teacher / "config.json").read_text())
            # LayerScale of 1e-5, as the architecture has it, keeps fresh blocks out of the first hundreds of steps
            arguments = {**config["model_args"], **STUDENTS[self.student], "init_values": 1.0}
            for own in ("img_size", "num_classes", "global_pool"):
                arguments.pop(own, None)
            words += [
                "--student.model",
                config["architecture"],
                "--student.model_args",
                json.dumps(arguments),
            ]
        if mode == "transfer":
            words += ["--method", method, *(["--heads", heads] if heads else [])]
        samples = ["--train_samples", str(CLASSES * self.labels), "--label_seed", str(self.seed)]
        return [
            *("--mode", mode, *words, "--img_size", str(side), *samples),
            *("--seed", str(self.seed), "--lr", f"{self.rate:g}"),
        ]


@dataclass(frozen=True)
class Outcome:
    """What a cell ended with: top-1 on the test images in percent."""

    cell: Cell
    top1: float


@dataclass(frozen=True)
class Study:
    """Where cells run, and what of them is known; `out/cells.json` has the results."""

    teacher: Path
    data: Path
    out: Path
    steps: int = STEPS
    side: int = SIDE

    @property
    def file(self) -> Path:
        return self.out / "cells.json"

    def top1(self, cell: Cell) -> float:
        """Run a cell unless its result is there."""
        found = load(self.file)
        for each in found:
            if each.cell == cell:
                return each.top1
        folder = self.out / "runs" / cell.name
        run(["train", *cell.words(self.teacher, self.side), *self.common(folder)])
        scores = [each["test_top1"] for each in read_records(folder / "log.jsonl") if "test_top1" in each]
        save([*found, Outcome(cell, scores[-1])], self.file)
        for large in ("checkpoints", "student"):
            shutil.rmtree(folder / large)
        print(f"{cell.name}: {scores[-1]:.1f}", flush=True)
        return float(scores[-1])

    def common(self, folder: Path) -> list[str]:
        """Return the words that all cells have: images, length, and states at stops and each two minutes alone."""
        return [
            *("--dataset", "torch/fashion_mnist", "--data_path", str(self.data), "--output_dir", str(folder)),
            *("--aa", "none", "--crop_scale", "0.5,1.0", "--smoothing", "0", "--batch_size", str(BATCH)),
            *("--eval_batch_size", "100", "--log_interval", str(self.steps)),
            *("--max_steps", str(self.steps), "--warmup_steps", str(self.steps // 10), "--clip_grad", "3"),
            *("--eval_every", "100000", "--save_every", "100000", "--save_minutes", "2"),
            *("--workers", "0", "--device", "cpu", "--trackers", "none", "--no-report", "--no-progress"),
        ]  # fmt: skip

    def rate(self, method: str) -> float:
        """Return the learning rate: of fresh students the best for scratch, whatever they take from the teacher."""
        student, method = ("same", method) if method == "finetune" else ("small", "scratch")
        tried = [Cell(student, method, SWEEP_LABELS, SWEEP_SEED, rate) for rate in RATES[method]]
        return max(tried, key=self.top1).rate


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.real_transfer", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--labels", nargs="+", type=int, choices=LABELS, default=list(LABELS))
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=Path("runs/real_transfer"))
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--kernels", type=Path, metavar="CELLS.JSON", help="measure nothing, and compare")
    arguments = parser.parse_args()
    if arguments.kernels is not None:
        print(kernel_table(load(RESULTS), load(arguments.kernels)))
        return
    torch.set_num_threads(1)  # so that numbers do not depend on the number of cores
    if not arguments.report:
        data = first_images(real_data.fashion_mnist(), arguments.out / "data", IMAGES)
        study = Study(real_data.teacher(), data, arguments.out)
        for cell in cells(arguments.students, arguments.labels, arguments.seeds):
            study.top1(replace(cell, rate=study.rate(cell.method)))
            shutil.copyfile(study.file, RESULTS)
    put_between_marks(PAGE, "transfer", table(load(RESULTS)))


def cells(students: Sequence[str], labels: Sequence[int], seeds: Sequence[int]) -> Iterator[Cell]:
    """Give all cells without their rates: those of few labels first, in the order of METHODS, seed by seed."""
    for count in labels:
        for student, methods in METHODS:
            for seed in seeds:
                for method in methods if student in students else ():
                    yield Cell(student, method, count, seed, 0.0)


def first_images(data: Path, out: Path, count: int) -> Path:
    """Write the data set with its first `count` test images alone."""
    shutil.copytree(data / real_data.RAW, out / real_data.RAW, dirs_exist_ok=True)
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        content = (data / real_data.RAW / f"t10k-{kind}-ubyte").read_bytes()
        size, *sides = struct.unpack(f">{header // 4 - 1}I", content[4:header])
        kept = min(size, count)
        end = header + kept * math.prod(sides)
        first = content[:4] + struct.pack(">I", kept) + content[8:header]
        write_bytes(out / real_data.RAW / f"t10k-{kind}-ubyte", first + content[header:end])
    return out


def load(file: Path) -> list[Outcome]:
    """Return the results that are there."""
    found = json.loads(file.read_text()) if file.exists() else []
    return [Outcome(Cell(**each["cell"]), each["top1"]) for each in found]


def save(outcomes: Sequence[Outcome], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps([asdict(each) for each in outcomes], indent=1) + "\n")


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a row for each student and method: top-1, and the gain over scratch within the seeds; last its mean."""
    header = ["student", "method", "takes"]
    counts = [
        count
        for count in LABELS
        if any(each.cell.labels == count and each.cell.seed in SEEDS for each in outcomes)
    ]
    for count in counts:
        header += [f"{count} a class", "against scratch"]
    header.append("in the mean")
    rows = []
    for student, method in pairs():
        numbers = [text for count in counts for text in columns(outcomes, student, method, count)]
        if any(numbers):
            mean = mean_gain(gains(outcomes, student, method, counts))
            rows.append([student, method, TAKES[method.partition(" ")[0]], *numbers, mean])
    return Table(header, rows).to_markdown()


def pairs() -> list[tuple[str, str]]:
    """Return students and their methods, those of a student together."""
    blocks = sorted(METHODS, key=lambda block: list(STUDENTS).index(block[0]))
    return [(student, method) for student, methods in blocks for method in methods]


def kernel_table(outcomes: Sequence[Outcome], others: Sequence[Outcome]) -> str:
    """Return the mean gains with two kernels, and by how many points means over seeds and single students differ."""
    words = "student, method, against scratch, with the other, largest difference of a mean, of a student"
    rows = []
    for student, method in pairs():
        found = [[by_seed(each, student, method, count) for count in LABELS] for each in (outcomes, others)]
        means = [[statistics.mean(top1.values()) for top1 in each] for each in found]
        apart = [abs(one[seed] - other[seed]) for one, other in zip(*found, strict=True) for seed in SEEDS]
        largest = max(abs(one - other) for one, other in zip(*means, strict=True))
        both = [mean_gain(gains(each, student, method, LABELS)) for each in (outcomes, others)]
        rows.append([student, method, *both, f"{largest:.1f}", f"{max(apart):.1f}"])
    return Table(words.split(", "), rows).to_markdown()


def columns(outcomes: Sequence[Outcome], student: str, method: str, count: int) -> tuple[str, str]:
    """Return the mean top-1 and the mean gain over scratch; in bold beyond three standard errors."""
    own = by_seed(outcomes, student, method, count)
    if not own:
        return "", ""
    seeds = "" if len(own) == len(SEEDS) else f" (seeds: {len(own)})"
    return f"{statistics.mean(own.values()):.1f} %{seeds}", mean_gain(
        gains(outcomes, student, method, [count])
    )


def gains(outcomes: Sequence[Outcome], student: str, method: str, counts: Sequence[int]) -> list[float]:
    """Return what each seed gains over scratch, its mean over numbers of labels, for seeds that have all of them."""
    if method == "scratch":
        return []
    own, base = (
        [by_seed(outcomes, student, each, count) for count in counts] for each in (method, "scratch")
    )
    seeds = set[int](SEEDS).intersection(*own, *base)
    return [
        statistics.mean(top1[seed] - scratch[seed] for top1, scratch in zip(own, base, strict=True))
        for seed in sorted(seeds)
    ]


def mean_gain(found: Sequence[float]) -> str:
    """Return the mean with its standard error, in bold beyond three of them."""
    if len(found) < 2:
        return f"{found[0]:+.1f}" if found else ""
    mean, error = statistics.mean(found), statistics.stdev(found) / len(found) ** 0.5
    text = f"{mean:+.1f} ± {error:.1f}"
    return f"**{text}**" if len(found) == len(SEEDS) and abs(mean) > 3 * error else text


def by_seed(outcomes: Sequence[Outcome], student: str, method: str, count: int) -> dict[int, float]:
    """Return the accuracies of the reported seeds."""
    return {
        each.cell.seed: each.top1
        for each in outcomes
        if (each.cell.student, each.cell.method, each.cell.labels) == (student, method, count)
        and each.cell.seed in SEEDS
    }


if __name__ == "__main__":
    main()
