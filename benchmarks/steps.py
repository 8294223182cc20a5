"""The steps that are compared: forward and backward of one batch, without the optimizer."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from graftvit.transfer.analysis.benchmark_cases import Step
from graftvit.transfer.methods.dual import DualViT
from torch import Tensor, nn

from .dense import DenseDual

MODELS = {"ViT-S": "vit_small_patch16_224", "ViT-B": "vit_base_patch16_224", "ViT-L": "vit_large_patch16_224"}
SIDES = {
    197: 224,
    577: 384,
    1025: 512,
    2305: 768,
    4097: 1024,
}  # image side in pixels that gives this many tokens
OURS = {
    "distill": {"method": "distill"},
    "copy": {"method": "copy"},
    "distill, rows 0.25": {"method": "distill", "rows": 0.25},
}
DENSE = {"dense distill": "distill", "dense copy": "copy"}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    model: str
    tokens: int
    batch: int
    device: torch.device
    dtype: torch.dtype

    def describe(self) -> str:
        return f"{self.model}, {self.tokens} tokens, batch {self.batch}, {self.device.type}, {str(self.dtype)[6:]}"


def build_steps(case: Case) -> dict[str, Step]:
    """`teacher` and `plain`, whose sum is the bound, and every way to take a transfer step."""
    side = SIDES[case.tokens]
    torch.manual_seed(0)
    images = torch.randn(case.batch, 3, side, side, device=case.device)
    targets = torch.randint(1000, (case.batch,), device=case.device)
    teacher, student = (create(case.model, side).to(case.device) for _ in range(2))
    teacher.eval().requires_grad_(False)
    autocast = torch.autocast(case.device.type, case.dtype) if case.dtype != torch.float32 else nullcontext()

    def run_teacher() -> None:
        with torch.no_grad(), autocast:
            teacher(images)

    def learn(model: nn.Module) -> None:
        with autocast:
            out = model(images)
            logits, extra = (out, 0.0) if isinstance(out, Tensor) else unpack(out)
            loss = F.cross_entropy(logits.float(), targets) + extra
        loss.backward()
        model.zero_grad(set_to_none=True)

    steps: dict[str, Step] = {"teacher": run_teacher, "plain": lambda: learn(student)}
    for name, options in OURS.items():
        dual = DualViT(teacher, copy.deepcopy(student), **options)  # type: ignore[arg-type]
        steps[name] = lambda dual=dual: learn(dual)  # type: ignore[misc]
    for name, method in DENSE.items():
        dense = DenseDual(copy.deepcopy(teacher), copy.deepcopy(student), method)
        steps[name] = lambda dense=dense: learn(dense)  # type: ignore[misc]
    return steps


def create(model: str, side: int) -> Any:
    return timm.create_model(MODELS[model], img_size=side)


def unpack(out: Any) -> tuple[Tensor, Tensor]:
    return out if isinstance(out, tuple) else (out.logits, out.transfer_loss)


def floor(model: str, tokens: int, method: str) -> float:
    """Floating-point operations of a step over those of its bound, 4 M + 4.5 A.

    M is a forward pass's linear layers, A its attention, with backward passes of 2 M and 2.5 A. Distilling adds
    2 A: teacher map times student keys, and the gradient of the keys alone. Copying leaves out the student's
    query and key projections (M / 6, three times) and all but the value gradient of its attention (1.5 A).
    """
    width = {"ViT-S": 384, "ViT-B": 768, "ViT-L": 1024}[model]
    linear, attention = 24 * width, 4 * tokens  # a token, a layer and a channel
    bound = 4 * linear + 4.5 * attention
    spent = {
        "distill": bound + 2 * attention,
        "copy": bound - linear / 2 - 1.5 * attention,
        "distill, rows 0.25": bound + 4 * 0.25 * attention,
    }
    return spent[method] / bound


def format_ratio(ratio: float, least: float | None) -> str:
    """Return the time of a step over the bound, and in parentheses its floor."""
    return f"{ratio:.2f}" + ("" if least is None else f" ({least:.2f})")
