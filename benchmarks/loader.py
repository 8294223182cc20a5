"""Measure where the CPU loader ends: `OMP_NUM_THREADS=1 python -m benchmarks.loader [--page]`.

One loader process makes batches of photographs for a student, as in a run. Its processor time for an image, from one
batch to the next and with the way to the training process, says how many images a core feeds. The second table has the
cores and the disk that a node needs, by the operations of a training step. With `--page` both go into docs/scale.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.transfer.analysis.report.tables import Table
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data.loaders import TrainLoader, create_train_loader
from graftvit.transfer.target_shards import add_checksums
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .__main__ import machine
from .marked import put_between_marks
from .steps import MODELS

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
SPEC = Preprocessing((3, 224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SIZE, QUALITY, BATCH = (500, 375), 95, 64
IMAGES = 2 * BATCH
"""Photographs: two batches an epoch."""
PLAIN: dict[str, Any] = {"aa": None, "views": 1}
RANDOM = {**PLAIN, "aa": "rand-m9-mstd0.5-inc1"}
KEPT = "kept views"
CASES: dict[str, dict[str, Any]] = {
    "JPEG, as evaluation sees it": {"views": 0, "aa": None},
    "JPEG, crop and flip": PLAIN,
    "JPEG, RandAugment": RANDOM,
    "JPEG, RandAugment, mixup and cutmix": {**RANDOM, "mixup": 0.8, "cutmix": 1.0},
    "JPEG, three augmentations": {**PLAIN, "aa": "3a", "color_jitter": 0.3},
    KEPT: {**RANDOM, "keep_views": "views"},
    f"{KEPT}, mixup and cutmix": {**RANDOM, "mixup": 0.8, "cutmix": 1.0, "keep_views": "views"},
    f"{KEPT}, with a checksum for cached targets": {**RANDOM, "keep_views": "views"},
}
NAMED = ("JPEG, crop and flip", "JPEG, RandAugment", KEPT)
"""The cases of the second table."""
DEVICES, PEAK, USED = 8, 989e12, 0.4
"""Devices of a node, operations a second of one (an H100 in bf16), and the part of them that a step uses."""
Clock = Callable[[int, Sequence[int], Tensor, Callable[[int], str]], dict[str, Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--page", action="store_true", help="write the tables into docs/scale.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = write_photographs(Path(folder) / "train" / "photographs")
        measured = measure(Path(folder), arguments.rounds)
    text = f"{describe(size)}\n\n{speeds(measured)}\n\n{needs(measured)}"
    print(text)
    if arguments.page:
        put_between_marks(PAGE, "loader", text)


def write_photographs(folder: Path) -> float:
    """Write parts of scikit-learn's two photographs, and return their mean size in KiB."""
    folder.mkdir(parents=True)
    random, sizes = np.random.default_rng(0), []
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for number in range(IMAGES):
        photograph, path = photographs[number % 2], folder / f"{number:04d}.jpg"
        left, top = (int(random.integers(0, free + 1)) for free in np.subtract(photograph.size, SIZE))
        photograph.crop((left, top, left + SIZE[0], top + SIZE[1])).save(path, quality=QUALITY)
        sizes.append(path.stat().st_size)
    return statistics.mean(sizes) / 1024


def measure(folder: Path, rounds: int) -> dict[str, tuple[float, float]]:
    """Return the processor time for an image, in seconds, of a loader process and of the training process."""
    loaders = {name: create_loader(folder, name, keys) for name, keys in CASES.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
    for _ in range(rounds + 1):
        for name, loader in loaders.items():
            times[name].append(time_epochs(loader))
    kept = [time_reading(loaders[KEPT]) for _ in range(rounds)]
    return {
        **{name: _medians(found[1:]) for name, found in times.items()},  # the first one writes the kept views
        "bytes of kept views, not normalized": (statistics.median(kept), 0.0),
    }


def _medians(found: Sequence[tuple[float, float]]) -> tuple[float, float]:
    loader, trainer = (statistics.median(each) for each in zip(*found, strict=True))
    return loader, trainer


def create_loader(folder: Path, name: str, keys: dict[str, Any]) -> TrainLoader:
    """Return the loader of a case, whose one process tells its processor time with each batch."""
    placed = {**keys, **({"keep_views": str(folder / "views")} if "keep_views" in keys else {})}
    config = DataConfig(data_path=str(folder), batch_size=BATCH, workers=1, num_classes=1, **placed)
    loader = create_train_loader(config, SPEC, seed=0)
    loader.batches.beside = partial(tell_time, checked="checksum" in name)
    return loader


def tell_time(
    view: int, indices: Sequence[int], images: Tensor, name: Callable[[int], str], *, checked: bool
) -> dict[str, Tensor]:
    """Return the processor time of this process, after the checksums of a cache of targets if these are `checked`."""
    if checked:
        add_checksums(view, indices, images, name)
    return {"seconds": torch.tensor(time.process_time(), dtype=torch.float64)}


def time_epochs(loader: TrainLoader, epochs: int = 3) -> tuple[float, float]:
    """Return the processor time for an image of the loader process, and of this one, which receives batches."""
    start, told = time.process_time(), []
    for epoch in range(epochs):
        told += [float(beside["seconds"]) for _, _, beside in loader.full_epoch(epoch)]
    here = (time.process_time() - start) / (epochs * IMAGES)
    return (told[-1] - told[0]) / ((len(told) - 1) * BATCH), here


def time_reading(loader: TrainLoader) -> float:
    """Return the processor time to read an image of kept views and check it."""
    kept = loader.kept
    assert kept is not None
    names = [loader.batches.name(index) for index in range(IMAGES)]
    start = time.process_time()
    found = [kept.find(0, index, name, 0) for index, name in enumerate(names)]
    seconds = time.process_time() - start
    assert None not in found
    return seconds / IMAGES


def describe(size: float) -> str:
    """Say what was measured, and where."""
    return (
        f"Photographs of {SIZE[0]} x {SIZE[1]} pixels in JPEG files of {size:.0f} KiB, for a student of "
        f"{SPEC.input_size[1]} x {SPEC.input_size[2]} pixels; kept views are read from the page cache. {machine()}."
    )


def speeds(measured: dict[str, tuple[float, float]]) -> str:
    """Return the table of images a second."""
    head = [
        "what a loader process makes",
        "ms an image",
        "images a second a core",
        "ms in the training process",
    ]
    rows = [
        [name, f"{1e3 * loader:.2f}", f"{1 / loader:,.0f}", f"{1e3 * trainer:.2f}" if trainer else "-"]
        for name, (loader, trainer) in measured.items()
    ]
    return Table(head, rows).to_markdown()


def needs(measured: dict[str, tuple[float, float]]) -> str:
    """Return the table of what feeds a node."""
    head = ["student", "images a second a node", *(f"cores: {name}" for name in NAMED), f"{KEPT}, GB/s read"]
    rows = []
    for name, architecture in MODELS.items():
        rate = DEVICES * PEAK * USED / step_operations(architecture)
        cores = [f"{rate * measured[case][0]:,.0f}" for case in NAMED]
        rows.append([name, f"{rate:,.0f}", *cores, f"{rate * SPEC_BYTES / 1e9:.1f}"])
    return Table(head, rows).to_markdown()


SPEC_BYTES = 3 * 224 * 224
"""Bytes of a kept image."""


def step_operations(architecture: str) -> float:
    """Return the operations of a training step for an image, forward and backward, without the teacher."""
    with torch.device("meta"):
        model = timm.create_model(architecture)
        images = torch.empty(1, *SPEC.input_size)
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    return float(counter.get_total_flops())


if __name__ == "__main__":
    main()
