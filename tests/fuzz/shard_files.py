"""A shard and the index beside it; read by tarfile."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import torch
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data.loading import BadImage, attempted
from graftvit.transfer.data.shards import ShardImages, index_split
from PIL import Image
from support.files.data_sets import encoded, write_tar
from torch import Tensor

from .mutations import damage_bytes

Tensors = dict[str, Tensor]


def _config(folder: Path) -> DataConfig:
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    return DataConfig(dataset="wds/s", data_path=str(folder), train_split="s.tar", num_classes=9, workers=0)


def make_shard(folder: Path) -> None:
    members = {
        f"{n}.{kind}": encoded(n) if kind == "png" else b"%d" % n for n in range(4) for kind in ("png", "cls")
    }
    write_tar(folder / "s.tar", members)
    index_split(_config(folder), "s.tar", aside=True)


def damage_shard(rng: Random, folder: Path) -> str:
    return damage_bytes(rng, folder / rng.choice(["s.tar", "s.tar.npz", "s.tar.npz"]))


def read_shard(folder: Path) -> tuple[Tensors, Tensors]:
    """Return images and labels as training reads them, and as tarfile does; what only one can read is left out."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    images = ShardImages(_config(folder), "s.tar", "RGB")
    found: Tensors = {}
    for number in range(len(images)):
        sample = attempted(images, number, partial(images.read, number))
        if not isinstance(sample, BadImage):
            key = images.path(number).rpartition(" ")[2]
            found |= {f"{key}.png": _pixels(sample[0]), f"{key}.cls": torch.tensor(sample[1])}
    there = _members(folder / "s.tar")
    return {name: tensor for name, tensor in found.items() if name in there}, there


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB")))


def _members(path: Path) -> Tensors:
    found: Tensors = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                content = archive.extractfile(member)
                if content is not None and member.name.endswith(".png"):
                    found[member.name] = _pixels(Image.open(io.BytesIO(content.read())))
                elif content is not None:
                    found[member.name] = torch.tensor(int(content.read()))
    except Exception:  # the rest is damaged
        return found
    return found
