"""Aliases: programs with other texts that compute the same, found by comparing outputs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .program import Program

PROBES = ((0, 7, 4), (1, 12, 6), (2, 5, 8))
"""Seed, tokens and head width of the inputs; N is smaller and larger than D."""
HEADS = 2
TOLERANCE = 1e-6
"""Relative, in float64."""


def find_aliases(programs: Iterable[Program], tolerance: float = TOLERANCE) -> dict[str, list[str]]:
    """Return the other texts of each program that has any, by the text of the first of them.

    Programs are aliases if their outputs agree on `PROBES`, NaN included. They stay programs of their own: equal
    numbers on probes are no proof.
    """
    first: list[tuple[str, list[Tensor]]] = []
    found: dict[str, list[str]] = {}
    for program in dict.fromkeys(programs):
        outputs = [_output(program, *probe) for probe in PROBES]
        known = next((text for text, others in first if _agree(outputs, others, tolerance)), None)
        if known is None:
            first.append((program.text, outputs))
        else:
            found.setdefault(known, []).append(program.text)
    return found


def _output(program: Program, seed: int, tokens: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, HEADS, tokens, width, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return program(q=q, k=k, v=v)


def _agree(outputs: list[Tensor], others: list[Tensor], tolerance: float) -> bool:
    """Compare the first probe first, which tells most programs apart."""
    for out, other in zip(outputs, others, strict=True):
        size = float(other.nan_to_num().abs().max())
        if not torch.allclose(out, other, rtol=0, atol=tolerance * size, equal_nan=True):
            return False
    return True
