"""From which size on an operator is faster than fused softmax attention."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from .cases import SOFTMAX, Case, Row, drifted


@dataclass(frozen=True)
class Crossover:
    """The size where the ratio is one, interpolated; below the smallest or above the largest that was measured."""

    size: float
    where: str

    def __str__(self) -> str:
        return f"{self.where} {self.size:,.0f}".strip()


def crossover(sizes: Iterable[int], ratios: Iterable[float]) -> Crossover:
    """Return the size where the ratio is one for the last time; it is above one from there on.

    Between two sizes log(ratio) is linear in log(size).
    """
    points = sorted(zip(sizes, ratios, strict=True))
    if points[-1][1] < 1:
        return Crossover(points[-1][0], "above")
    for (small, slower), (large, faster) in reversed(list(itertools.pairwise(points))):
        if slower < 1:
            part = -math.log(slower) / (math.log(faster) - math.log(slower))
            return Crossover(small * (large / small) ** part, "")
    return Crossover(points[0][0], "below")


def crossovers(rows: Iterable[Row]) -> dict[Case, Crossover]:
    """Return the crossovers by operator and setting, a case of size 0, where there are two sizes or more.

    An operator with a row whose reference drifted is left out.
    """
    rows = list(rows)
    unsteady = drifted(rows)
    left_out = {without_size(row.case) for row in unsteady}
    groups: dict[Case, list[Row]] = {}
    for row in rows:
        if row.case.name != SOFTMAX and without_size(row.case) not in left_out:
            groups.setdefault(without_size(row.case), []).append(row)
    return {
        case: crossover((row.case.size for row in group), (row.ratio for row in group))
        for case, group in groups.items()
        if len(group) > 1
    }


def without_size(case: Case) -> Case:
    """Return the setting that rows of several sizes share."""
    return replace(case, size=0)
