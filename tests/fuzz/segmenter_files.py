"""A segmenter on the disk: its settings and the weights of neck and head beside the folder of its backbone."""

from __future__ import annotations

from pathlib import Path
from random import Random

import timm
import torch
from graftvit.checkpoints.dense_models import load_dense, save_dense
from graftvit.models.dense.dense_model import create_dense
from safetensors.torch import load_file, save_file
from support.files.hostile import ARCHITECTURE, ARGUMENTS
from torch import Tensor

from .mutations import damage_bytes, damage_json, damage_tensors

FILE = "segmenter.safetensors"


def make_segmenter(folder: Path) -> None:
    torch.manual_seed(0)
    body = timm.create_model(ARCHITECTURE, **{**ARGUMENTS, "img_size": 32, "dynamic_img_size": True})
    save_dense(create_dense("semantic_fpn", body, 3, width=8, norms=(0,)), folder)


def damage_segmenter(rng: Random, folder: Path) -> str:
    if rng.random() < 0.5:
        return damage_json(rng, folder / "segmenter.json")
    if rng.random() < 0.5:
        return damage_bytes(rng, folder / FILE)
    there = load_file(folder / FILE)
    tensors, how = damage_tensors(rng, {name: each for name, each in there.items() if each.ndim})
    counts = {name: each for name, each in there.items() if not each.ndim}
    whole = {name: each.clone().contiguous() for name, each in {**counts, **tensors}.items()}
    save_file(whole, folder / FILE)
    return how


def read_segmenter(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights that were loaded, once they ran on an image, and those that are there."""
    model, body = load_dense(folder), load_file(folder / "model.safetensors")
    if model.size_divisor < 1000:
        with torch.no_grad():
            model([torch.zeros(3, 20, 40)])
    there = {f"backbone.body.{name}": tensor for name, tensor in body.items()}
    return model.state_dict(), there | load_file(folder / FILE)
