"""A short training: can the projections around a candidate learn what softmax attention computes?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .program_probes import HEADS, Candidate, Run

IMAGES, TOKENS, CHANNELS = 16, 12, 16
STEPS, LEARNING_RATE = 60, 1e-2
FLOOR = 0.9
"""The part of the variance that may be left."""


def untrainable(candidate: Candidate) -> str:
    """Train the four projections of one layer to give the output of a layer of softmax attention."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(IMAGES, TOKENS, CHANNELS, generator=generator)
    teacher, student = torch.randn(2, 4, CHANNELS, CHANNELS, generator=generator) / CHANNELS**0.5
    wanted = _layer(F.scaled_dot_product_attention, teacher, x)
    weights = student.clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=LEARNING_RATE)
    left = torch.tensor(torch.inf)
    for _ in range(STEPS):
        loss = (_layer(candidate.run, weights, x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        left = loss.detach() / wanted.var()
    if float(left) < FLOOR:
        return ""
    return f"after {STEPS} steps {float(left):.2g} of the variance of softmax attention is left"


def _layer(run: Run, weights: Tensor, x: Tensor) -> Tensor:
    """Return the output of a layer with the projections `weights` (4, C, C) for tokens (B, N, C)."""
    q, k, v = ((x @ weight).unflatten(2, (HEADS, -1)).transpose(1, 2) for weight in weights[:3])
    return run(q, k, v).transpose(1, 2).flatten(2) @ weights[3]
