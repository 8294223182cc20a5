"""What cached targets take and how wrong they are, by the form in which they are kept: `python -m benchmarks.targets`.

Targets of tiles of photographs are written as a run writes them, and read and checked row by row.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import numpy as np
import timm
import torch
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.transfer.analysis.report.tables import Table
from graftvit.transfer.data.loading import Samples
from graftvit.transfer.loss_config import CacheType
from graftvit.transfer.methods.dual import DualViT
from graftvit.transfer.target_shards import SCALE, Shard, TargetForm, TargetRows, TargetShards, add_checksums
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from .tiles import CLASSES, draw_tiles

BILLION = 10**9
OBJECTS = 100_000
"""Shards of 10,000 images of a billion."""
HEAD = ("kept", "bytes an image", "10^9 images", "error, rms", "error / (scale / 2)", "images/s a core")


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.targets", description=__doc__)
    parser.add_argument("--teacher", default="vit_base_patch16_224", help="a source, or a name of timm")
    parser.add_argument("--images", type=int, default=96)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    source = given.teacher
    teacher = (timm.create_model(source) if timm.is_model(source) else load_pretrained(source).model).eval()
    images = draw_images(given.images, teacher.pretrained_cfg["input_size"][-1])
    targets = compute_targets(teacher, images)
    rows = [
        measure(name, form, {f"teacher.{result}": targets[f"teacher.{result}"]}, images)
        for name, result, form in forms(targets["teacher.classes"].shape[1])
    ]
    print(Table(HEAD, rows).to_markdown())
    print(f"\nbefore the first step: {OBJECTS:,} objects are listed in {time_listing():.1f} s")


def forms(classes: int) -> Iterable[tuple[str, str, TargetForm]]:
    for result in ("classes", "pooled", "patches"):
        for kind in get_args(CacheType):
            yield f"{result}, {kind}", result, TargetForm(kind)
    for kind in ("exact", "bf16"):
        yield f"10 largest logits, {kind}", "classes", TargetForm(kind, top=10, classes=classes)
    for side in (2, 4):
        yield f"patches, means of {side} x {side}, int8", "patches", TargetForm("int8", pool=side)


def draw_images(count: int, side: int) -> Tensor:
    """Return tiles of photographs (B, 3, side, side)."""
    tiles = [draw_tiles(label, np.random.default_rng(label)) for label in range(len(CLASSES))]
    return torch.stack([to_tensor(next(tiles[n % len(tiles)]).resize((side, side))) for n in range(count)])


def compute_targets(teacher: torch.nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return all that a cache can keep of the teacher, by name."""
    student = timm.create_model("test_vit", num_classes=teacher.num_classes, img_size=images.shape[-1])
    losses = [{"method": "logits"}, {"method": "feature", "tokens": "both"}]
    dual = DualViT(teacher, student, losses=losses)
    parts = [dual.teach(batch) for batch in images.split(16)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def measure(name: str, form: TargetForm, targets: dict[str, Tensor], images: Tensor) -> list[object]:
    """Return a row: what is on the disk, and how far it is from the targets (of means: from exact means)."""
    count = len(images)
    exact = TargetForm(pool=form.pool).pack(targets)
    with tempfile.TemporaryDirectory() as folder:
        cache = TargetShards(folder, {}, [Samples("tiles", count)], form)
        shard = Shard(0, 0, count)
        cache.write(shard, form.pack(targets) | add_checksums(0, range(count), images, str))
        size = Path(cache.place(shard)).stat().st_size
        reader, start = TargetRows(cache), time.process_time()
        packed = reader.read(0, range(count), images, str)
        seconds = time.process_time() - start
    start = time.process_time()
    add_checksums(0, range(count), images, str)  # of the images, which are no part of reading targets
    seconds -= time.process_time() - start
    ((key, found),) = form.unpack(packed).items()
    error = (found - exact[key]).abs()
    scale = packed.get(key + SCALE)
    return [
        name,
        f"{size / count:,.0f}",
        f"{size / count * BILLION / 1e12:,.2f} TB",
        "" if form.top else f"{(error.square().mean() / exact[key].square().mean()).sqrt():.2%}",
        "" if scale is None else f"{(error / (scale[..., None] / 2)).max():.4f}",
        f"{count / seconds:,.0f}",
    ]


def time_listing() -> float:
    """Return the seconds in which a start finds that all objects of a billion images are there."""
    with tempfile.TemporaryDirectory() as folder:
        shards = [Samples(f"{number:06d}.tar", 10_000) for number in range(OBJECTS)]
        cache = TargetShards(folder, {}, shards, TargetForm())
        wanted = cache.shards([0])
        for number, shard in enumerate(wanted):
            path = Path(cache.place(shard))
            if not number:
                path.parent.mkdir(parents=True)
            path.touch()
        start = time.perf_counter()
        assert len(cache.stored(cache.shards([0]))) == OBJECTS
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
