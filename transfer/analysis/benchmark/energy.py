"""What the multiplications and additions of models cost in energy and in chip area."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from ....checkpoints.architecture import build, check_name
from ....checkpoints.pretrained import load_pretrained
from ....checkpoints.sources import TimmSource, parse_source
from ....models.attention.base import Accounting, Operations
from ....models.conversion import convert, plan_of
from ....models.cost import OperationCount, count_operations
from ....models.families import find_family, is_pyramid
from ..report.tables import markdown

BIASES = ("relative_position_bias_table", "cpb_mlp.0.weight")


@dataclass(frozen=True)
class Prices:
    """Energy in pJ and area in µm² of one operation, by default of a 32-bit float at 45 nm (Horowitz, ISSCC 2014)."""

    multiplication_pj: float = 3.7
    addition_pj: float = 0.9
    multiplication_area: float = 7700.0
    addition_area: float = 4184.0

    def energy(self, operations: Operations) -> float:
        """Return the energy in pJ."""
        return self.multiplication_pj * operations.multiplications + self.addition_pj * operations.additions

    def area(self, operations: Operations) -> float:
        """Return the area in µm² of a circuit that has a unit for each operation."""
        return (
            self.multiplication_area * operations.multiplications + self.addition_area * operations.additions
        )


@dataclass(frozen=True)
class EnergyRow:
    """A model and its operations for one image."""

    source: str
    plan: str
    count: OperationCount


def energy_rows(
    sources: Sequence[str], plans: Sequence[str], img_size: int | None, accounting: Accounting
) -> list[EnergyRow]:
    """Count each source as it is, and converted by each plan. A timm name is built without weights.

    Raises GraftError: a source is not there, a plan is invalid, or a model's attention is not known.
    """
    rows = []
    for source in sources:
        model = _load(source, img_size)
        own = None if find_family(model) is None else plan_of(model)
        rows.append(EnergyRow(source, own or "as it is", count_operations(model, accounting)))
        for plan in plans:
            student = convert(model, plan, without=("bias",) if _gives_up(model) else ())
            rows.append(EnergyRow(source, plan, count_operations(student, accounting)))
    return rows


def energy_table(rows: Iterable[EnergyRow], prices: Prices) -> str:
    """Return a line for each model: operations in billions, energy in mJ (10⁹ pJ) and area."""
    head = [
        "model",
        "plan",
        "multiplications (G)",
        "additions (G)",
        "in attention (G)",
        "energy (mJ)",
        "area (m²)",
    ]
    lines = []
    for row in rows:
        total, attention = row.count.total, row.count.attention
        lines.append(
            [
                row.source,
                row.plan,
                f"{total.multiplications / 1e9:.5g}",
                f"{total.additions / 1e9:.5g}",
                f"{attention.multiplications / 1e9:.5g} + {attention.additions / 1e9:.5g}",
                f"{prices.energy(total) / 1e9:.5g}",
                f"{prices.area(total) / 1e12:.4g}",
            ]
        )
    return markdown(head, lines)


def _load(source: str, img_size: int | None) -> nn.Module:
    found = parse_source(source)
    if not isinstance(found, TimmSource):
        return load_pretrained(source, img_size=img_size).model
    check_name(found.name)
    size = {} if img_size is None else {"img_size": img_size}
    return build(found.name.partition(".")[0], size, on_meta=True)


def _gives_up(model: nn.Module) -> bool:
    """Return whether a pyramid has a relative position bias, which a count does not need."""
    biased = any(name.endswith(BIASES) for name, _ in model.named_parameters())
    return biased and is_pyramid(model)
