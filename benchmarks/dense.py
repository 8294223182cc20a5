"""The dense form of a transfer step: every map formed and kept, as the official code computes it.

Written from the equations, as operators of the same hosts, so that all else is equal.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from graftvit.models.attention.base import QKV, Heads
from graftvit.models.hosting import host_attention
from torch import Tensor, nn


@dataclass
class Maps:
    """Logits of the teacher's maps and losses of the student's, layer by layer."""

    logits: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)


def dense_logits(heads: Heads) -> Tensor:
    assert heads.q is not None
    assert heads.k is not None
    return (heads.q * heads.scale) @ heads.k.transpose(-2, -1)


@dataclass
class DenseTeacher:
    """Attention that keeps its logits."""

    maps: Maps
    needs = QKV

    def __call__(self, heads: Heads) -> Tensor:
        logits = dense_logits(heads)
        self.maps.logits.append(logits)
        assert heads.v is not None
        return logits.softmax(-1) @ heads.v


@dataclass
class DenseDistill:
    """Attention whose map is compared with the teacher's: −Σ softmax(T) log softmax(S)."""

    maps: Maps
    layer: int
    needs = QKV

    def __call__(self, heads: Heads) -> Tensor:
        logits = dense_logits(heads)
        target = self.maps.logits[self.layer].softmax(-1)
        self.maps.losses.append(-(target * logits.log_softmax(-1)).sum(-1).mean())
        assert heads.v is not None
        return logits.softmax(-1) @ heads.v


@dataclass
class DenseCopy:
    """The teacher's map on the student's values; the student's own queries and keys are computed all the same."""

    maps: Maps
    layer: int
    needs = QKV

    def __call__(self, heads: Heads) -> Tensor:
        assert heads.v is not None
        return self.maps.logits[self.layer].softmax(-1) @ heads.v


class DenseDual(nn.Module):
    """Teacher and student with dense maps at every layer; returns logits and the transfer loss of weight 3."""

    def __init__(self, teacher: nn.Module, student: nn.Module, method: str) -> None:
        super().__init__()
        self.maps = Maps()
        for host in host_attention(teacher).values():
            host.operator = DenseTeacher(self.maps)
        for layer, host in host_attention(student).items():
            host.operator = (DenseDistill if method == "distill" else DenseCopy)(self.maps, layer)
        self.teacher, self.student = teacher, student

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            self.teacher(images)
        logits = self.student(images)
        loss = 3 * torch.stack(self.maps.losses).sum() if self.maps.losses else logits.new_zeros(())
        self.maps.logits.clear()
        self.maps.losses.clear()
        return logits, loss
