"""Compare the hybrids that `graftvit hybrid` chooses with every mix that there is, into docs/hybrids.md.

python -m benchmarks.hybrids                     three teachers x three seeds; a stopped one is resumed
python -m benchmarks.hybrids --data digits       one of the teachers, as beside another process
python -m benchmarks.hybrids --report            write the page from the results that are there

Each teacher has four or five layers and four operators, so each seed has 625 or 3,125 mixes, and the error of every mix
is measured for the comparison. Budgets are shares of the way from the cheapest mix to the teacher in multiplications,
which are exact. Latency is measured for what is chosen under budgets of latency.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.provenance import Pretrained
from graftvit.launch.cli import main as graftvit
from graftvit.launch.load_config import load_config
from graftvit.transfer.analysis.report.tables import Table
from graftvit.transfer.data.loaders import create_eval_loader
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
    end_of,
)
from scipy.stats import spearmanr
from torch import Tensor

from .marked import put_between_marks
from .tiles import make_tiles

PAGE = Path(__file__).parent.parent / "docs" / "hybrids.md"
RESULTS = Path(__file__).parent / "results" / "hybrids.json"
OPERATORS = ("linear", "window(window=3)", "hedgehog", "focused")
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Budgets: how far from the cheapest mix to the teacher."""
SIDE = {"digits": 48, "photographs": 48, "swin": 64}
"""Pixels of the images that costs are measured at: the teachers see 12, 16 and 32, where attention costs little."""
TEACHERS = {"digits": "digits_teacher", "photographs": "digits_teacher", "swin": "digits_lit_teacher"}


@dataclass(frozen=True)
class Outcome:
    """One budget of one teacher and seed; accuracies in percent of the test images, errors in nats."""

    data: str
    seed: int
    share: float
    teacher: float
    best: float
    """Highest accuracy of all mixes within the budget that are the best by their error there."""
    chosen: float
    greedy: float
    best_error: float
    chosen_error: float
    greedy_error: float
    images: int
    spearman: float
    """Rank correlation of the sum of single errors with the error, over all mixes."""
    promised: float
    """Budget of latency of the same share."""
    latency: float
    """Latency of what was chosen under it, measured again."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.hybrids", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/hybrids"))
    parser.add_argument("--report", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    found = [Outcome(**each) for each in json.loads(RESULTS.read_text())] if RESULTS.exists() else []
    for data, seed in [] if arguments.report else itertools.product(arguments.data, arguments.seeds):
        if not any((each.data, each.seed) == (data, seed) for each in found):
            found += study(data, seed, arguments.out)
            RESULTS.write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n")
    put_between_marks(PAGE, "enumerated", table(found))


def data_words(data: str, out: Path) -> list[str]:
    words = ["--workers", "0", "--device", "cpu"]
    if data != "photographs":
        return ["--dataset", "digits", *words]
    tiles = ["--dataset", "folder", "--data_path", str(make_tiles(out / "tiles")), "--aa", "none"]
    return [*tiles, "--crop_scale", "0.5,1.0", *words]


def study(data: str, seed: int, out: Path) -> list[Outcome]:
    """Train the teacher, let `graftvit hybrid` align the operators, and compare its choices with every mix."""
    teacher, folder, words = out / data / "teacher", out / data / f"seed{seed}", data_words(data, out)
    color = (
        ["--student.model_args.in_chans", "3", "--student.img_size", "16"] if data == "photographs" else []
    )
    if not (teacher / "student").is_dir():
        run(["train", TEACHERS[data], *words, *color, "--output_dir", str(teacher), "--no-progress"])
    without = ["--without", "bias"] if data == "swin" else []
    run([
        *("hybrid", str(teacher), "--keep", "1", "--operators", ",".join(OPERATORS), "--batch_size", "64"),
        *("--aa", "none"),
        *("--seed", str(seed), "--images", "128", "--output_dir", str(folder), "--no-progress"),
        *[word for word in words if word not in ("--aa", "none")], *without,
    ])  # fmt: skip
    loaded = load_pretrained(teacher)
    names = dict(zip(OPERATORS, sorted((folder / "library").iterdir(), key=_place), strict=True))
    palette = Palette(loaded.model, {name: load_pretrained(path).model for name, path in names.items()})
    images, labels = _split(teacher, loaded, train=False)
    scored, _ = _split(teacher, loaded, train=True, count=128, seed=seed)
    search = HybridSearch(
        palette,
        scored.split(64),
        Scale((SIDE[data], SIDE[data]), repeats=25),
        Journal(folder / "study.jsonl", str(seed)),
    )
    mixes = [
        mix for mix in itertools.product((KEEP, *OPERATORS), repeat=palette.depth) if _possible(palette, mix)
    ]
    cost, single = search.cost_sum("macs"), search.error_sum()
    own = torch.tensor([search.error(mix) for mix in mixes])
    rank = spearmanr([single.of(mix) for mix in mixes], own).statistic
    least, first = cost.of(search.cheapest(cost)), search.cost_sum("latency")
    fastest = first.of(search.cheapest(first))
    outcomes = []
    for share in SHARES:
        limit = least + share * (1 - least)
        fitting = [place for place, mix in enumerate(mixes) if cost.of(mix) <= limit + 1e-9]
        best = mixes[min(fitting, key=lambda place: float(own[place]))]
        chosen, greedy = search.best(Budget("macs", limit)).mix, put_back(search, "macs", limit)
        promised = fastest + share * (1 - fastest)
        quick = search.best(Budget("latency", promised)).mix
        scores = [top1(palette, mix, images, labels) for mix in (palette.kept, best, chosen, greedy)]
        errors = [search.error(mix) for mix in (best, chosen, greedy)]
        latency = search.measure("latency", quick)
        outcomes.append(
            Outcome(data, seed, share, *scores, *errors, len(labels), float(rank), promised, latency)
        )
        print(outcomes[-1], flush=True)
    return outcomes


def _place(folder: Path) -> int:
    return [name.partition("(")[0] for name in OPERATORS].index(folder.name.partition("_")[0])


def _possible(palette: Palette, mix: Mix) -> bool:
    return all(name == KEEP or layer in palette.layers[name] for layer, name in enumerate(mix))


def put_back(search: HybridSearch, measure: Measure, limit: float) -> Mix:
    """Return what a greedy search gives that puts the teacher's layers back into the linear student while it can.

    It goes by the sum of costs, which is exact for multiplications.
    """
    cost = search.cost_sum(measure).corrected(search.costs[measure])
    mix = search.palette.single(range(search.palette.depth), "linear")
    while True:
        more = [(*mix[:layer], KEEP, *mix[layer + 1 :]) for layer, name in enumerate(mix) if name != KEEP]
        fitting = [each for each in more if cost.of(each) <= limit + 1e-9]
        if not fitting:
            return mix
        mix = min(fitting, key=search.error)


def _split(
    teacher: Path, loaded: Pretrained, *, train: bool, count: int = 1, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return training images that no alignment begins with, or all test images, and their labels."""
    data = load_config(teacher).data
    if train:
        images = sample_images(data, loaded.preprocessing, count, seed=seed + 1)
        return images, torch.zeros(len(images))
    loader = create_eval_loader(data, loaded.preprocessing)
    batches = [(images[valid], labels[valid]) for images, labels, valid in loader]
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


@torch.no_grad()
def top1(palette: Palette, mix: Mix, images: Tensor, labels: Tensor) -> float:
    model = palette.model(mix)
    right = sum(
        int((end_of(model, part).argmax(-1) == own).sum())
        for part, own in zip(images.split(100), labels.split(100), strict=True)
    )
    return 100 * right / len(labels)


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a row for each teacher and budget: means over seeds with the standard error."""
    header = [
        "teacher",
        "budget",
        "best of all",
        "chosen",
        "greedy",
        "error: best",
        "chosen",
        "greedy",
        "latency / promised",
    ]
    rows = []
    for data, share in dict.fromkeys((each.data, each.share) for each in outcomes):
        own = [each for each in outcomes if (each.data, each.share) == (data, share)]
        scores = [
            spread([getattr(each, name) for each in own], ".1f") for name in ("best", "chosen", "greedy")
        ]
        errors = [
            spread([getattr(each, f"{name}_error") for each in own], ".3f")
            for name in ("best", "chosen", "greedy")
        ]
        latency = spread([each.latency / each.promised for each in own], ".2f")
        rows.append([f"{data}, {own[0].teacher:.1f} %", f"{share:.0%}", *scores, *errors, latency])
    return Table(header, rows).to_markdown()


def spread(values: Sequence[float], form: str) -> str:
    """Return `mean ± standard error`."""
    if len(values) < 2:
        return format(values[0], form)
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values) / len(values) ** 0.5:{form}}"


def run(words: list[str]) -> None:
    code = graftvit(words)
    if code != 0:
        raise SystemExit(code)


if __name__ == "__main__":
    main()
