"""A tower of transformers and SAM's encoder, from a folder to an aligned student, on photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graftvit
import pytest
import torch
import torch.nn.functional as F
from graftvit.launch.cli import main
from graftvit.models.attention.base import Heads
from graftvit.models.converted import converted_layers, plan_of
from graftvit.models.families import sites
from PIL import Image
from support.models import hf_models, tiny_families
from support.models.tiny_students import save_folder
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

LAST = 1
"""The converted layer; the first keeps its softmax, of SAM within windows."""


def write_dinov3(folder: Path) -> None:
    [case] = [case for case in hf_models.CASES if case.name == "dinov3"]
    model: Any = case.build()
    model.save_pretrained(folder)


def write_sam(folder: Path) -> None:
    model = tiny_families.tiny("sam", (32, 32))
    save_folder(model, folder, tiny_families.TINY["sam"].name, tiny_families.arguments("sam", (32, 32)))


WRITERS = {"dinov3": write_dinov3, "sam": write_sam}


def dense_linear(heads: Heads) -> Tensor:
    """Return Σ_j φ(q_i)·φ(k_j − mean k) v_j / Σ_j φ(q_i)·φ(k_j − mean k) with φ(x) = elu(x) + 1, by its whole map."""
    q, k, v = (x.double() for x in heads.qkv())
    weights = (F.elu(q) + 1) @ (F.elu(k - k.mean(2, keepdim=True)) + 1).transpose(2, 3)
    return weights / weights.sum(-1, keepdim=True) @ v


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_is_converted_aligned_and_loaded(kind: str, photos: Path, tmp_path: Path) -> None:
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    WRITERS[kind](teacher)
    without = ["--without", "bias"] if kind == "sam" else []
    plan = f"{LAST}: linear"
    words = (
        f"--teacher.source local-dir:{teacher} --data_path {photos} --batch_size 8 --workers 0 --max_steps 4"
    )
    words += f" --warmup_epochs 0.5 --device cpu --output_dir {run}"
    start = ["train", "--mode", "align", "--init", "teacher", "--plan", plan, *without]
    assert main([*start, *words.split()]) == 0
    student = graftvit.load(run / "student").eval()
    assert str(plan_of(student)).endswith(f"; {plan}")
    assert [site.num_heads > 0 for site in sites(student)] == [True, True]
    transform = create_transform(**resolve_model_data_config(student), is_training=False)
    photo = sorted((photos / "validation").rglob("*.png"))[0]
    layer, seen = converted_layers(student)[LAST], list[tuple[Heads, Tensor]]()
    layer.operator.register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    with torch.no_grad():
        student(transform(Image.open(photo).convert("RGB")).unsqueeze(0))
    [(heads, out)] = seen
    torch.testing.assert_close(out.double(), dense_linear(heads), rtol=0, atol=1e-5)
    assert len(heads.values()[0, 0]) == sites(student)[LAST].shape.geometry.num_tokens
