"""Hadamard matrices: entries of +1 and -1, and rows that are orthogonal."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard_matrix(order: int) -> Tensor | None:
    """Return a Hadamard matrix (order, order) in float64, or None where Sylvester and Paley give none.

    H Hᵀ = order · I. Sylvester doubles a matrix of half the order. Paley makes one of order q + 1, or 2 (q + 1), from
    the squares modulo a prime q that leaves 3, or 1, when divided by 4.
    """
    doublings, base = 0, order
    while base > 0:
        found = _base(base)
        if found is not None:
            return _doubled(found, doublings)
        if base % 2:
            return None
        doublings, base = doublings + 1, base // 2
    return None


def _base(order: int) -> Tensor | None:
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order % 4 == 0 and (order - 1) % 4 == 3 and _is_prime(order - 1):
        return _paley_first(order - 1)
    half = order // 2 - 1
    if order % 4 == 0 and half % 4 == 1 and _is_prime(half):
        return _paley_second(half)
    return None


def _doubled(matrix: Tensor, times: int) -> Tensor:
    """Return the matrix [[H, H], [H, -H]], `times` times."""
    for _ in range(times):
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def _paley_first(prime: int) -> Tensor:
    """Return I + S, where S = [[0, 1ᵀ], [-1, Q]] and Q is skew-symmetric."""
    skew = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    skew[0, 0] = 0
    skew[1:, 0] = -1
    skew[1:, 1:] = _residues(prime)
    return skew + torch.eye(prime + 1, dtype=torch.float64)


def _paley_second(prime: int) -> Tensor:
    """Return C ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]], where C = [[0, 1ᵀ], [1, Q]] and Q is symmetric."""
    conference = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    conference[0, 0] = 0
    conference[1:, 1:] = _residues(prime)
    sign = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, sign) + torch.kron(torch.eye(prime + 1, dtype=torch.float64), diagonal)


def _residues(prime: int) -> Tensor:
    """Return Q with Q[i, j] = χ(i - j): 1 for a square modulo the prime, -1 for another number, 0 for 0."""
    kind = torch.full((prime,), -1.0, dtype=torch.float64)
    numbers = torch.arange(1, prime)
    kind[numbers * numbers % prime] = 1
    kind[0] = 0
    index = torch.arange(prime)
    return kind[(index[:, None] - index[None]) % prime]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
