"""Polynomials in N (tokens) and D (head width): the sizes of a program's matrices, and its cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

Powers = tuple[int, int]
"""The exponents of N and D."""


@dataclass(frozen=True)
class Polynomial:
    """Σ c N^i D^j with whole c > 0; `terms` are ((i, j), c), the highest powers first."""

    terms: tuple[tuple[Powers, int], ...] = ()

    def __add__(self, other: Polynomial) -> Polynomial:
        return _collect([*self.terms, *other.terms])

    def __mul__(self, other: Polynomial) -> Polynomial:
        return _collect([((i + k, j + m), a * b) for (i, j), a in self.terms for (k, m), b in other.terms])

    def at(self, tokens: int, width: int) -> int:
        """Return the value for N = `tokens` and D = `width`."""
        return sum(count * tokens**i * width**j for (i, j), count in self.terms)

    @property
    def order(self) -> int:
        """Return the highest power of N."""
        return max((i for (i, _), _ in self.terms), default=0)

    def __str__(self) -> str:
        return " + ".join(_term(powers, count) for powers, count in self.terms) or "0"


def _collect(terms: list[tuple[Powers, int]]) -> Polynomial:
    counts: Counter[Powers] = Counter()
    for powers, count in terms:
        counts[powers] += count
    return Polynomial(tuple(sorted(counts.items(), reverse=True)))


def _term(powers: Powers, count: int) -> str:
    names = [
        f"{name}^{power}" if power > 1 else name for name, power in zip("ND", powers, strict=True) if power
    ]
    return " ".join([*([str(count)] if count != 1 or not names else []), *names])


NOTHING = Polynomial()
ONE = Polynomial((((0, 0), 1),))
N = Polynomial((((1, 0), 1),))
D = Polynomial((((0, 1), 1),))


@dataclass(frozen=True)
class Shape:
    """The shape of a value: a matrix of `rows` by `cols` for each image and head."""

    rows: Polynomial
    cols: Polynomial

    @property
    def entries(self) -> Polynomial:
        return self.rows * self.cols

    @property
    def transposed(self) -> Shape:
        return Shape(self.cols, self.rows)

    def __str__(self) -> str:
        return f"{self.rows}×{self.cols}"


TOKENS = Shape(N, D)
"""The shape of Q, K, V and of a program's output."""
SCALAR = Shape(ONE, ONE)
