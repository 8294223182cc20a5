"""Train detectors on composed scenes, recover one with linear attention, and time both, into docs/dense.md.

OMP_NUM_THREADS=1 python -m benchmarks.dense_recovery            most of an hour on one core; a stopped one is resumed
OMP_NUM_THREADS=1 python -m benchmarks.dense_recovery latency    one part: scratch, recovery, latency, picture
python -m benchmarks.dense_recovery --report                     write the page from the results that are there

Every training is a `graftvit train`: from scratch, `recover_detector`, and as many steps of fresh weights. The scenes
are those of the tests: cut-out coins, dahlias and saucers on photographs, others to train than to validate.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import graftvit
import timm
import torch
from graftvit.checkpoints import load_dense
from graftvit.checkpoints.files import read_records
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.launch.cli import main as command
from graftvit.models import create_dense
from graftvit.models.dense.backbone import Backbone
from graftvit.transfer.analysis.benchmark_cases import keep_freed_memory, machine
from graftvit.transfer.analysis.report.tables import Table
from graftvit.transfer.metrics.dense_scores import evaluate_dense
from PIL import Image
from torch import nn

from .marked import put_between_marks

ROOT = Path(__file__).parent.parent
PAGE, PICTURE = ROOT / "docs" / "dense.md", ROOT / "docs" / "images" / "detections.png"
RESULTS = Path(__file__).parent / "results" / "dense_recovery.json"
PARTS = ("scratch", "recovery", "latency", "picture")
SEEDS = (0, 1, 2)
PLAN = "*: linear"
SIZE = {"depths": [1, 1, 2, 1], "embed_dims": [24, 48, 96, 128], "num_heads": [1, 2, 4, 8]}
ALL_KEYS = {**SIZE, "sr_ratios": [1, 1, 1, 1]}
"""Every token attends to every token, 1,024 in the first stage, as in the PVT of AttnZero."""
COMMON = [
    *("dense.width=64", "dense.short=[128]", "dense.long=128", "data.batch_size=8", "data.workers=0"),
    *("engine.device=cpu", "engine.report=false", "engine.progress=false", "engine.trackers=[]"),
]
FRESH = [
    *("mode=scratch", "student.model=pvt_v2_b0", "optim.lr=1e-3", "optim.weight_decay=0.05"),
    *("optim.clip_grad=1.0", "engine.eval_every=3"),
]
TEACHER = [*FRESH, f"student.model_args={json.dumps(ALL_KEYS)}", "dense.head=retinanet", "optim.epochs=12"]
SMALL = [*FRESH, f"student.model_args={json.dumps(SIZE)}"]
MASKS = [*SMALL, "dense.head=mask_rcnn", "dense.samples=32", "dense.anchor_scale=4", "optim.epochs=3"]
SCRATCH = {
    "RetinaNet": ("teacher-0", "scenes", [*TEACHER, "seed=0"]),
    "Mask R-CNN": ("masks", "scenes", MASKS),
    "Semantic FPN": ("pixels", "labeled", [*SMALL, "dense.head=semantic_fpn", "optim.epochs=2"]),
}
"""By head, its folder, data and words."""
SCORES = {"box_ap": "box AP", "mask_ap": "mask AP", "miou": "mIoU"}
RECOVER = ["recover_detector", "optim.epochs=2", "engine.eval_every=99"]
OTHERS = {
    "labels": [
        *("mode=finetune", f"student.plan={PLAN}", "student.init=teacher", "dense.head=retinanet"),
        *("optim.lr=1e-3", "optim.weight_decay=0.05", "optim.clip_grad=1.0", "optim.epochs=4"),
    ],
    "fresh": [*TEACHER[:-1], f"student.plan={PLAN}", "optim.epochs=4"],
}
"""As many steps as of both stages of `RECOVER`."""
STEPS = {
    "teacher": "the detector, softmax attention",
    "converted": "its backbone made linear",
    "aligned": "aligned, 150 steps",
    "recovered": "fine-tuned, 150 steps",
    "labels": "converted, 300 steps with labels alone",
    "fresh": "fresh weights, linear, 300 steps",
}
SPENT = "cpu_seconds.txt"
IMAGES = ((512, 512), (800, 1344))
DETECTORS: dict[str, tuple[str, dict[str, Any], int]] = {
    "of the table above": ("pvt_v2_b0", ALL_KEYS, 64),
    "ViT-S/16": ("vit_small_patch16_224", {"dynamic_img_size": True}, 256),
}
"""By name, the model of timm, its arguments and the width of the neck."""
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.dense_recovery",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=Path("runs/dense_recovery"))
    parser.add_argument("--report", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    for part in () if arguments.report else arguments.parts or PARTS:
        made = MEASURES[part](arguments.out, arguments.seeds)
        if made is not None:
            RESULTS.write_text(json.dumps({**results(), "machine": machine(), part: made}, indent=1) + "\n")
    found = results()
    for part, table in TABLES.items():
        if part in found:
            put_between_marks(PAGE, part, table(found[part]))
    print(f"{PAGE} has {', '.join(part for part in TABLES if part in found)}")


def results() -> dict[str, Any]:
    """Return what has been measured."""
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return found


# Training.


def scenes(out: Path) -> Path:
    """Write 600 composed scenes to train and 100 to validate as COCO and as ADE20K, unless they are there."""
    if not (out / "labeled").is_dir():
        sys.path.append(str(ROOT / "tests"))
        from support.files.dense_scenes import composed, write_ade20k, write_coco

        train, validation = composed("train", 600), composed("validation", 100, seed=1)
        write_coco(out / "scenes", {"train": train, "validation": validation})
        write_ade20k(out / "labeled", {"training": train, "validation": validation})
    return out / "scenes"


def train(folder: Path, data: Path, words: Sequence[str]) -> Path:
    """Run `graftvit train` unless it is finished, and write the seconds of processor time that it has taken."""
    if (folder / "student").is_dir():
        return folder
    print(folder, flush=True)
    dataset = "ade20k" if data.name == "labeled" else "coco"
    spent, before = folder / SPENT, time.process_time()
    try:
        own = [*COMMON, f"data.dataset={dataset}", f"data.data_path={data}", f"output_dir={folder}"]
        code = command(["train", *words, *own])
    finally:
        earlier = float(spent.read_text()) if spent.exists() else 0.0
        folder.mkdir(parents=True, exist_ok=True)
        spent.write_text(f"{earlier + time.process_time() - before:.1f}\n")
    if code != 0:
        raise SystemExit(code)
    return folder


def last(folder: Path) -> dict[str, Any]:
    """Return the last scores in the log of a run, by their names without `test_`, and its steps."""
    *_, run = sorted(path.parent for path in folder.rglob("log.jsonl"))
    *_, record = (
        each for each in read_records(run / "log.jsonl") if any(key.startswith("test_") for key in each)
    )
    return {key.removeprefix("test_"): value for key, value in record.items()}


def from_scratch(out: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Return the scores of each head, with one seed."""
    scenes(out)
    rows = []
    for name, (kept, data, words) in SCRATCH.items():
        folder = train(out / kept, out / data, words)
        scores = {key: value for key, value in last(folder).items() if key in SCORES}
        spent = float((folder / SPENT).read_text())
        rows.append({"head": name, "steps": last(folder)["step"], "cpu_seconds": spent, **scores})
    return rows


def recovery(out: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Return box AP and seconds of processor time of each way, for each seed."""
    data, rows = scenes(out), []
    for seed in seeds:
        teacher = train(out / f"teacher-{seed}", data, [*TEACHER, f"seed={seed}"])
        given = [f"teacher.source={teacher}", f"dense.source={teacher}", f"seed={seed}"]
        recovered = train(out / f"recovered-{seed}", data, [*RECOVER, *given])
        folders = {"teacher": teacher, "recovered": recovered}
        for name, words in OTHERS.items():
            own = given if name == "labels" else given[2:]
            folders[name] = train(out / f"{name}-{seed}", data, [*words, *own])
        found = {name: float(last(folder)["box_ap"]) for name, folder in folders.items()}
        found |= untrained(teacher, recovered, data)
        spent = {name: float((folder / SPENT).read_text()) for name, folder in folders.items()}
        rows.append({"seed": seed, "box_ap": found, "cpu_seconds": spent})
    return rows


def untrained(teacher: Path, recovered: Path, data: Path) -> dict[str, float]:
    """Return the box AP of the detector with its backbone converted, and with it aligned."""
    kept = recovered / "between.json"
    if not kept.exists():
        bodies = {
            "converted": graftvit.convert(load_pretrained(str(teacher)).model, PLAN),
            "aligned": load_pretrained(str(recovered / "1-align")).model,
        }
        found = {name: box_ap(str(teacher), body, data) for name, body in bodies.items()}
        kept.write_text(json.dumps(found))
    result: dict[str, float] = json.loads(kept.read_text())
    return result


def box_ap(source: str, body: nn.Module, data: Path) -> float:
    """Return the box AP of the detector `source` on another backbone."""
    model = load_dense(source)
    model.backbone = Backbone(body)
    return evaluate_dense(model.eval(), data)["box_ap"]


# Time, and a picture.


def latency(out: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Return the seconds of each detector of fresh weights, as it is and converted, in turn: no box is left to draw."""
    keep_freed_memory()
    rows = []
    for name, (source, arguments, width) in DETECTORS.items():
        for size in IMAGES:
            torch.manual_seed(0)
            body = timm.create_model(source, **arguments)
            bodies = {"softmax": body, "linear": graftvit.convert(body, PLAN)}
            models = {
                kind: create_dense("retinanet", each, 3, width=width).eval() for kind, each in bodies.items()
            }
            image, found = [torch.rand(3, *size)], []
            for _ in range(ROUNDS + 1):
                found.append({kind: seconds(model, image) for kind, model in models.items()})
                print(name, size, found[-1], flush=True)
            rows.append({"detector": name, "size": size, "rounds": found[1:]})
    return rows


@torch.no_grad()
def seconds(model: nn.Module, images: list[torch.Tensor]) -> float:
    before = time.thread_time()
    model(images)
    return time.thread_time() - before


def picture(out: Path, seeds: Sequence[int], shown: Sequence[int] = (0, 2, 6), side: int = 360) -> None:
    """Draw what the first detector finds above what the recovered one finds, by `graftvit visualize`."""
    sheet = Image.new("RGB", (side * len(shown), side * 2), "white")
    for row, name in enumerate(("teacher-0", "recovered-0")):
        words = ["--data_path", str(scenes(out)), "--dataset", "coco"]
        folder = out / "drawn" / name
        if command(["visualize", str(out / name), *words, "--output_dir", str(folder)]) != 0:
            raise SystemExit(1)
        files = sorted(folder.glob("*.png"))
        for column, place in enumerate(shown):
            with Image.open(files[place]) as drawn:
                small = drawn.convert("RGB").resize((side - 4, side - 4), Image.Resampling.LANCZOS)
            sheet.paste(small, (column * side + 2, row * side + 2))
    sheet.quantize(128, dither=Image.Dither.NONE).save(PICTURE, optimize=True)


MEASURES = {"scratch": from_scratch, "recovery": recovery, "latency": latency, "picture": picture}


# The page.


def scratch_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a row for each head."""
    cells = []
    for row in rows:
        scores = ", ".join(f"{SCORES[key]} {row[key]:.3f}" for key in SCORES if key in row)
        cells.append([row["head"], f"{row['steps']}", f"{row['cpu_seconds'] / 60:.1f}", scores])
    return Table(["head", "steps", "CPU minutes", "validation"], cells).to_markdown()


def recovery_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a row for each step of the recovery, and for the ways beside it: mean and standard error over seeds."""
    cells = []
    for name, words in STEPS.items():
        found = [100 * row["box_ap"][name] for row in rows if name in row["box_ap"]]
        spent = [row["cpu_seconds"][name] for row in rows if name in row["cpu_seconds"]]
        seconds_spent = f"{statistics.mean(spent):.0f}" if spent else ""
        cells.append([words, f"{len(found)}", seconds_spent, mean_error(found)])
    return Table(["detector", "seeds", "CPU seconds", "box AP, %"], cells).to_markdown()


def mean_error(values: Sequence[float]) -> str:
    """Return `mean ± standard error`."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}"


def latency_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a row for each detector and size: median seconds, and the median ratio with the least and largest."""
    return Table(
        ["detector", "image", "softmax, s", "linear, s", "times as fast"], list(_timed(rows))
    ).to_markdown()


def _timed(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    for row in rows:
        softmax, linear = ([each[kind] for each in row["rounds"]] for kind in ("softmax", "linear"))
        ratios = sorted(one / other for one, other in zip(softmax, linear, strict=True))
        medians = [f"{statistics.median(each):.2f}" for each in (softmax, linear)]
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        yield [row["detector"], " x ".join(map(str, row["size"])), *medians, spread]


TABLES = {"scratch": scratch_table, "recovery": recovery_table, "latency": latency_table}


if __name__ == "__main__":
    main()
