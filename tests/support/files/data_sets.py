"""Small data sets as people have them: folders, tar files, shards, files of Hugging Face's `datasets`."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def image(number: int, side: int = 10) -> Image.Image:
    """Noise that depends on the number."""
    pixels = np.random.RandomState(number).randint(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(number: int, kind: str = "PNG", side: int = 10) -> bytes:
    file = io.BytesIO()
    image(number, side).save(file, format=kind)
    return file.getvalue()


def write_images(folder: Path, count: int = 3, suffix: str = "png", side: int = 10, first: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        image(number, side).save(folder / f"{number:03d}.{suffix}")


def write_classes(
    root: Path,
    classes: Sequence[str],
    splits: Sequence[str] = ("train", "val"),
    count: int = 3,
    side: int = 10,
) -> Path:
    """A folder a class, in a folder a split."""
    for place, split in enumerate(splits):
        for number, name in enumerate(classes):
            write_images(root / split / name, count, side=side, first=100 * number + 10 * place)
    return root


def write_tar(path: Path, members: dict[str, bytes], *headers: tarfile.TarInfo) -> Path:
    """Write files of these contents, and members of headers alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            described = tarfile.TarInfo(name)
            described.size = len(content)
            archive.addfile(described, io.BytesIO(content))
        for header in headers:
            archive.addfile(header)
    return path


def write_shards(root: Path, classes: int = 2, shards: int = 2, each: int = 4, suffix: str = "jpg") -> Path:
    """Shards of `train` and `validation` with their `_info.json`, as WebDataset and timm have them."""
    info: dict[str, Any] = {"splits": {}}
    for split in ("train", "validation"):
        names = []
        for shard in range(shards):
            members: dict[str, bytes] = {}
            for number in range(each):
                key = f"{shard:02d}{number:04d}"
                members[f"{key}.{suffix}"] = encoded(
                    10 * shard + number, "JPEG" if suffix != "png" else "PNG"
                )
                members[f"{key}.cls"] = str(number % classes).encode()
                members[f"{key}.json"] = json.dumps({"kind": number % classes}).encode()
            names.append(write_tar(root / f"{split}-{shard:04d}.tar", members).name)
        info["splits"][split] = {
            "name": split, "num_samples": shards * each, "filenames": names, "shard_lengths": [each] * shards,
        }  # fmt: skip
    (root / "_info.json").write_text(json.dumps(info))
    return root


def write_parquet(
    root: Path, columns: dict[str, Any], splits: dict[str, str] | None = None, image_column: str = "image"
) -> Path:
    """Six images a split with other `columns`, a parquet file a split; `columns` are (feature, values)."""
    import datasets

    for split, stem in (splits or {"train": "train", "validation": "validation"}).items():
        count = 6
        rows = {
            image_column: [
                {"bytes": encoded(number), "path": f"{split}{number}.png"} for number in range(count)
            ]
        }
        features = {image_column: datasets.Image()}
        for name, (feature, values) in columns.items():
            rows[name], features[name] = list(values), feature
        table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        root.mkdir(parents=True, exist_ok=True)
        table.to_parquet(str(root / f"{stem}-00000-of-00001.parquet"))
    return root


def write_fashion(folder: Path, train: int = 60, test: int = 20, packed: bool = False) -> Path:
    """Write noise in the files of Fashion-MNIST, `packed` as its Debian package has them; ten classes in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("t10k", test)):
        pixels = np.random.RandomState(count).randint(0, 256, (count, 28, 28), dtype=np.uint8).tobytes()
        labels = bytes(number % 10 for number in range(count))
        files = {
            "images-idx3": struct.pack(">4i", 2051, count, 28, 28) + pixels,
            "labels-idx1": struct.pack(">2i", 2049, count) + labels,
        }
        for kind, content in files.items():
            path = folder / f"{name}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)
    return folder
