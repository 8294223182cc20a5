"""Rows of a benchmark that were never measured, for tests of what is made of them."""

from __future__ import annotations

from typing import Any

from graftvit.transfer.analysis.benchmark_cases import Case, Kind, Row


def case(
    name: str = "linear", size: int = 196, batch: int = 1, kind: Kind = "operators", **more: Any
) -> Case:
    return Case(kind, name, "6 heads of 64", size, batch, "float32", "cpu", **more)


def row(name: str = "linear", size: int = 196, batch: int = 1, ratio: float = 2.0, **more: Any) -> Row:
    """A row of 10 ms, with quartiles of 9 and 12."""
    macs = 5_000_000
    return Row(case(name, size, batch, **more), 0.01, 0.009, 0.012, 0.01 * ratio, 2**20, macs, macs, 1.5)
