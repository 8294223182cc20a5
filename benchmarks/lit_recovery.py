"""Recover LIT-shaped students of a small Swin by transfer and by fine-tuning, three seeds each, into docs/lit.md.

python -m benchmarks.lit_recovery                     a quarter of an hour on two idle cores; a stopped one is resumed
python -m benchmarks.lit_recovery --data digits       one of the two data sets, as beside another process
python -m benchmarks.lit_recovery --report            write the page from the results that are there

Every run is a `graftvit train` of a recipe: the teacher is `digits_lit_teacher`, transfer is `digits_lit`, and
fine-tuning is `digits_lit_finetune`. Both ways have the same number of steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from graftvit.checkpoints.files import read_records
from graftvit.launch.cli import main as graftvit
from graftvit.transfer.analysis.report.tables import Table

from .marked import put_between_marks
from .tiles import make_tiles

PAGE = Path(__file__).parent.parent / "docs" / "lit.md"
RESULTS = Path(__file__).parent / "results" / "lit_recovery.json"
PLANS = {
    "LIT": "stage1,stage2: none; stage3,stage4: softmax; merge: deformable",
    "HiLo": "stage1,stage2: none; stage3: hilo; stage4: softmax; merge: deformable",
}
WAYS = {"transfer": "digits_lit", "fine-tuning": "digits_lit_finetune"}
DATA = ("digits", "photographs")
TILES = [
    "--dataset",
    "folder",
    "--aa",
    "none",
    "--crop_scale",
    "0.5,1.0",
    "--student.model_args.in_chans",
    "3",
]


@dataclass(frozen=True)
class Outcome:
    """The top-1 of one student, in percent."""

    data: str
    plan: str
    way: str
    seed: int
    before: float
    """After the conversion, before any training."""
    after: float
    teacher: float


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.lit_recovery", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/lit_recovery"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("further", nargs="*", help="words for each `graftvit train`, after --")
    arguments = parser.parse_args()
    if not arguments.report:
        for data in arguments.data:
            train(data, arguments.seeds, arguments.out, arguments.further)
    outcomes = list(collect(arguments.out))
    if outcomes:
        arguments.results.write_text(json.dumps([asdict(each) for each in outcomes], indent=1) + "\n")
    write_page(arguments.page, [Outcome(**each) for each in json.loads(arguments.results.read_text())])


def train(data: str, seeds: list[int], out: Path, further: list[str]) -> None:
    """Train the teacher of a data set, and all students. What is finished is not trained again."""
    words = [*data_words(data, out), *further]
    teacher = out / data / "teacher"
    if not (teacher / "student").is_dir():
        run(["train", "digits_lit_teacher", *words, "--output_dir", str(teacher)])
    for seed in seeds:
        for plan, way in ((plan, way) for plan in PLANS for way in WAYS):
            folder = out / data / f"{plan}-{way}-{seed}"
            source = f"local-dir:{teacher / 'student'}"
            own = ["--teacher", source, "--plan", PLANS[plan], "--seed", str(seed)]
            print(folder, flush=True)
            run(["train", WAYS[way], *own, *words, "--output_dir", str(folder)])


def run(words: list[str]) -> None:
    code = graftvit([*words, "--no-progress"])
    if code != 0:
        raise SystemExit(code)


def data_words(data: str, out: Path) -> list[str]:
    """Return the flags of a data set; for the photographs, write their tiles."""
    if data == "digits":
        return []
    return [*TILES, "--data_path", str(make_tiles(out / "tiles"))]


def collect(out: Path) -> Iterator[Outcome]:
    """Yield the outcome of each finished student in `out`."""
    for folder in sorted(out.glob("*/*-*-*")):
        plan, way = folder.name.split("-", 1)
        way, seed = way.rsplit("-", 1)
        runs = sorted(path.parent for path in folder.rglob("log.jsonl"))
        if not (folder / "student").is_dir():
            continue
        after = top1(runs[-1], last=True)
        yield Outcome(
            folder.parent.name,
            plan,
            way,
            int(seed),
            top1(runs[0]),
            after,
            top1(folder.parent / "teacher", last=True),
        )


def top1(run: Path, *, last: bool = False) -> float:
    """Return the first or the last top-1 in the log of a run."""
    found = [record["test_top1"] for record in read_records(run / "log.jsonl") if "test_top1" in record]
    return float(found[-1 if last else 0])


def write_page(page: Path, outcomes: list[Outcome]) -> None:
    """Put the table between its marks."""
    put_between_marks(page, "recovery", table(outcomes))
    print(f"{page} has {len(outcomes)} students")


def table(outcomes: list[Outcome]) -> str:
    """Return a row for each data set and plan: mean and standard deviation over seeds."""
    rows = []
    for data, plan in dict.fromkeys((each.data, each.plan) for each in outcomes):
        own = [each for each in outcomes if (each.data, each.plan) == (data, plan)]
        ways = [[each.after for each in own if each.way == way] for way in WAYS]
        before = spread([each.before for each in own])
        rows.append([data, plan, f"{own[0].teacher:.1f}", before, *(spread(each) for each in ways)])
    return Table(["data", "student", "teacher", "before training", *WAYS], rows).to_markdown()


def spread(values: list[float]) -> str:
    """Return `mean ± standard deviation`, or one value as it is."""
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else ""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


if __name__ == "__main__":
    main()
