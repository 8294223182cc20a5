"""Genotypes of AttnZero's code, run as that code runs them: with its numbers, whatever they are worth.

A genotype names one of eight graphs, a chain of unary operators before each operand of a binary operator, and the
binary operators, all by number (`legacy_operators`). `legacy_import` turns a genotype into a program.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from ..errors import did_you_mean
from .legacy_operators import BINARY, UNARY
from .program import ProgramError

MAX_CHAIN = 16
Value = TypeVar("Value")

GRAPHS: dict[str, str] = {
    "i3n2": "a=q0 b=k1 x=a.b c=v2 d=x3 out=d.c",
    "i3n301": "a=q0 b=k1 x=a.b c=v2 e=x4 d=x3 y=d.c f=y5 out=f.e",
    "i3n302": "a=k0 b=v1 c=v2 x=a.b d=x3 y=c.d e=q4 f=y5 out=e.f",
    "i3n303": "a=k0 b=v1 x=a.b d=x3 c=q2 y=c.d e=q4 f=y5 out=e.f",
    "i3n304": "a=k0 b=v1 x=a.b d=x3 c=q2 y=c.d e=v4 f=y5 out=e.f",
    "i3n305": "a=k0 b=v1 x=a.b c=q2 d=v3 y=c.d e=x4 f=y5 out=e.f",
    "i3n401": "a=k0 b=v1 x=a.b c=q2 d=k3 y=c.d e=q4 f=x5 z=e.f g=y6 h=z7 out=g.h",
    "i3n402": "a=k0 b=v1 x=a.b c=q2 d=x3 y=c.d e=v4 f=y5 z=e.f g=f6 h=z7 out=g.h",
}
"""The graphs, step by step: `a=q0` applies unary chain 0 to Q, `x=a.b` is the next binary operator of a and b.

A chain on an input starts from a copy. A chain on an intermediate value does not, so that an operator that overwrites
its operand also changes what later steps read (i3n301, i3n402)."""
BENCH_GRAPHS = {**GRAPHS, "i3n301": "a=q0 b=k1 x=a.b c=v2 d=x3 y=d.c e=x4 f=y5 out=f.e"}
"""The same in the benchmark's copy of the code, which applies chains 3 and 4 of i3n301 in the other order."""


@dataclass(frozen=True)
class Genotype:
    """A graph, its unary chains and its binary operators.

    Raises ProgramError: the graph does not exist, or a number or a count is wrong.
    """

    graph_type: str
    unary_op: tuple[tuple[int, ...], ...]
    binary_op: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.graph_type, str) or self.graph_type not in GRAPHS:
            graph = reprlib.repr(self.graph_type)
            raise ProgramError(f"unknown graph {graph}; {did_you_mean(graph.strip(repr('')), GRAPHS)}")
        count = GRAPHS[self.graph_type].count(".")
        if (len(self.unary_op), len(self.binary_op)) != (2 * count, count):
            raise ProgramError(
                f"{self.graph_type} takes {2 * count} unary chains and {count} binary operators, and "
                f"{len(self.unary_op)} and {len(self.binary_op)} are given"
            )
        for numbers, table in ((self.binary_op, BINARY), *((chain, UNARY) for chain in self.unary_op)):
            wrong = [number for number in numbers if type(number) is not int or not 0 <= number < len(table)]
            if wrong or len(numbers) > MAX_CHAIN:
                given = reprlib.repr(list(numbers))
                raise ProgramError(
                    f"operators are up to {MAX_CHAIN} numbers from 0 to {len(table) - 1}, not {given}"
                )

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Genotype:
        """Return the genotype of a mapping with the keys of AttnZero's code.

        Raises ProgramError: a key is missing, or a value is not what the key needs.
        """
        try:
            chains = tuple(tuple(chain) for chain in given["unary_op"])
            return cls(given["graph_type"], chains, tuple(given["binary_op"]))
        except (KeyError, TypeError) as error:
            raise ProgramError(
                f"a genotype has graph_type, unary_op (lists of numbers) and binary_op (numbers): {error}"
            ) from error

    def described(self) -> dict[str, Any]:
        """Return the mapping that `read` takes."""
        chains = [list(chain) for chain in self.unary_op]
        return {"graph_type": self.graph_type, "unary_op": chains, "binary_op": list(self.binary_op)}


def walk(
    genotype: Genotype,
    inputs: Mapping[str, Value],
    copy: Callable[[Value], Value],
    unary: Callable[[int, Value], Value],
    binary: Callable[[int, Value, Value], Value],
    graphs: Mapping[str, str] = GRAPHS,
) -> Value:
    """Return the output of a genotype over values of any kind, such as tensors or nodes of programs."""
    values, joins = dict(inputs), iter(genotype.binary_op)
    for step in graphs[genotype.graph_type].split():
        target, source = step.split("=")
        if "." in source:
            left, right = source.split(".")
            values[target] = binary(next(joins), values[left], values[right])
            continue
        value = values[source[0]]
        value = copy(value) if source[0] in inputs else value
        for number in genotype.unary_op[int(source[1:])]:
            value = unary(number, value)
        values[target] = value
    return values["out"]


def run_legacy(genotype: Genotype, q: Tensor, k: Tensor, v: Tensor, *, bench: bool = False) -> Tensor:
    """Return what AttnZero's code computes from q, k and v (B, H, N, D), in whatever shape.

    `bench` takes the order of its benchmark's copy in the graph i3n301.

    Raises ProgramError: that code raises.
    """
    try:
        return walk(
            genotype,
            {"q": q, "k": k, "v": v},
            Tensor.clone,
            lambda number, x: UNARY[number](x),
            lambda number, a, b: BINARY[number](a, b),
            BENCH_GRAPHS if bench else GRAPHS,
        )
    except (RuntimeError, IndexError, ValueError) as error:
        raise ProgramError(f"{genotype.described()} cannot be computed: {error}") from error
