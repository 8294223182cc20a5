"""Stochastic depth with the same masks for teacher and student, as in the official attention-transfer code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ...models.copying.tape import Tape
from ...models.errors import TransferError
from ...models.families import blocks_of, depths, find_family

BRANCHES = ("drop_path1", "drop_path2")


class SharedDropPath(nn.Module):
    """A student's `DropPath` whose drawn mask is also used by the teacher's layer of the same depth.

    Without a drawn mask it acts as the `DropPath` that it replaces.
    """

    def __init__(self, original: DropPath, tape: Tape, index: int) -> None:
        super().__init__()
        self.original = original
        self.tape = tape
        self.index = index

    def draw(self, batch: int, like: Tensor) -> None:
        """Keep each image with probability 1 − p, scaled by 1 / (1 − p): shape (B,)."""
        keep = 1.0 - float(self.original.drop_prob or 0.0)
        mask = torch.empty(batch, dtype=like.dtype, device=like.device).bernoulli_(keep).div_(keep)
        self.tape.masks[self.index] = mask

    def forward(self, x: Tensor) -> Tensor:
        mask = self.tape.masks.get(self.index) if self.tape.active else None
        if mask is None:
            return self.original(x)
        return x * mask.view(-1, *[1] * (x.dim() - 1))  # (B, N, C), and (B, height, width, C) of Swin


def check_shares(name: str, teacher: nn.Module, student: nn.Module) -> None:
    """Raise TransferError: the teacher of this name has no blocks whose masks could be the student's."""
    for role, model in ((name, teacher), ("the student", student)):
        if find_family(model) is None:
            raise TransferError(
                "transfer.share_drop_path needs a teacher with the blocks of a vision transformer, and such a student; "
                f"{role} is a {type(model).__name__}: set it to false"
            )


def share_drop_paths(student: nn.Module, teacher_view: Any, tape: Tape) -> list[SharedDropPath]:
    """Let every block of the view use the masks of the student's block, and return the modules to draw."""
    blocks, teacher_blocks = blocks_of(student), blocks_of(teacher_view.model)
    _check_stages(depths(student), depths(teacher_view.model))
    shared: list[SharedDropPath] = []
    for index, block in enumerate(blocks):
        for branch, drop in _branches(block):
            module = SharedDropPath(drop, tape, len(shared))
            block._modules[branch] = module
            shared.append(module)
            if index < len(teacher_blocks):
                twin = getattr(teacher_blocks[index], "block", teacher_blocks[index])
                if branch in twin._modules:
                    twin._modules[branch] = module
    return shared


def _check_stages(student: list[int], teacher: list[int]) -> None:
    """Raise TransferError where a block of the teacher and the student's block of its number are in other stages."""
    used = [own for own in teacher if own]
    before, last = used[:-1], used[-1:]
    if before != student[: len(before)] or (last and last[0] > (student[len(before) :] or [0])[0]):
        raise TransferError(
            f"transfer.share_drop_path needs stages of the same depths, and a student as deep as the teacher's last "
            f"layer in use: the student's have {student} blocks and those of the teacher {used}; set it to false"
        )


def release_drop_paths(student: nn.Module) -> None:
    """Put timm's own `DropPath` modules back."""
    for block in blocks_of(student):
        for branch, drop in _branches(block):
            block._modules[branch] = drop.original if isinstance(drop, SharedDropPath) else drop


def _branches(block: nn.Module) -> Iterator[tuple[str, Any]]:
    for branch in BRANCHES:
        drop = block._modules.get(branch)
        if isinstance(drop, DropPath | SharedDropPath):
            yield branch, drop
