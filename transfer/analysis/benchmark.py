"""A benchmark from its first case to its last: what was measured before is kept, each case is written at once."""

from __future__ import annotations

import itertools
import logging
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ...checkpoints.architecture import build, check_name
from ...checkpoints.atomic import write_bytes, write_text
from ...checkpoints.pretrained import load_pretrained
from ...checkpoints.sources import TimmSource, parse_source
from ...models.attention.base import Geometry, Heads, LayerShape
from ...models.calibration import fit_at_random
from ...models.conversion import convert, converted_layers, resize
from ...models.cost import attention_macs, counted_macs, other_macs
from ...models.errors import ConfigError
from ...models.families import family_of, image_size, patch_size
from ...models.layer_plan import Choice, create_operator
from ...models.plan_syntax import parse_plan
from ..cells import left_to_run, run_in_turn
from .benchmark_cases import (
    DTYPES,
    SOFTMAX,
    Case,
    Kind,
    Results,
    Row,
    Step,
    Ways,
    drifted,
    keep_freed_memory,
    load_average,
    load_results,
    machine,
    peak_bytes,
    step_of,
    time_steps,
)
from .report.ink import INK, Line, color_of, dashes_of, draw_lines, to_png
from .report.rendering import Report, compose
from .report.tables import Table, milliseconds, tabulate

# From which size on an operator is faster than fused softmax attention.


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


# The tables of a benchmark, and the latency against the number of tokens, or the image side.

MARK = "†"
"""Of numbers whose reference drifted."""
MISCOUNT = 0.05
"""How far an operator's own account may be from the counter before the table says so."""


def make_report(results: Results) -> Report:
    """Return a table of cases for each setting, and one of crossovers."""
    settings: dict[str, list[Row]] = {}
    for row in sorted(results.rows, key=lambda row: row.case.size):
        settings.setdefault(f"{row.case.size_text}, {row.case.setting}", []).append(row)
    return compose(
        "benchmark.txt",
        results=results,
        loads=[row.load for row in results.rows] or [0.0],
        settings=[
            (name, size_table(rows), _miscounted(rows), drifted(rows)) for name, rows in settings.items()
        ],
        crossovers=crossover_table(results) if crossovers(results.rows) else None,
    )


def crossover_table(results: Results) -> Table:
    """Return a line an operator or plan, a column a setting."""
    found = crossovers(results.rows)
    settings = list(dict.fromkeys(case.setting for case in found))
    names = list(dict.fromkeys(case.name for case in found))
    cells = {(case.name, case.setting): str(value) for case, value in found.items()}
    head = "operator" if results.kind == "operators" else "plan"
    return Table(
        [head, *settings], [[name, *(cells.get((name, one), "") for one in settings)] for name in names]
    )


def size_table(rows: Sequence[Row]) -> Table:
    """Return a line a case of one setting, the fastest first."""
    unsteady = drifted(rows)
    columns: dict[str, Callable[[Row], str]] = {
        "operator" if rows[0].case.kind == "operators" else "plan": lambda row: row.case.name,
        "ms": lambda row: milliseconds(row.median),
        "spread": lambda row: f"{milliseconds(row.low)}–{milliseconds(row.high)}",
        "CPU ms": lambda row: _processor(row.cpu),
        f"{rows[0].case.beside} ms": lambda row: milliseconds(row.softmax) + MARK * (row in unsteady),
        "its CPU ms": lambda row: _processor(row.softmax_cpu),
        "ratio": lambda row: f"{row.ratio:.2f}" + MARK * (row in unsteady),
        "images/s": lambda row: f"{row.case.batch / row.median:,.1f}",
        "peak MiB": lambda row: f"{row.peak_bytes / 2**20:,.1f}",
        "attention MMACs": lambda row: f"{row.macs / 1e6:,.1f}",
        "counted": lambda row: f"{row.counted_macs / 1e6:,.1f}",
    }
    if all(row.cpu is None for row in rows):
        del columns["CPU ms"], columns["its CPU ms"]
    return tabulate(sorted(rows, key=lambda row: -row.ratio), columns)


def _processor(seconds: float | None) -> str:
    return "" if seconds is None else milliseconds(seconds)


def _miscounted(rows: Sequence[Row]) -> list[str]:
    """Return the operators whose count differs from torch's."""
    return [row.case.name for row in rows if abs(row.counted_macs - row.macs) > MISCOUNT * row.macs]


def draw_latency(rows: Sequence[Row]) -> Figure:
    """Draw one plot a setting: a line an operator, softmax dashed, a ring where a line crosses it for good."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(row.case.setting, []).append(row)
    tokens = not rows or rows[0].case.kind == "operators"
    return draw_lines(
        {setting: _latency_lines(group) for setting, group in panels.items()},
        "light",
        ("tokens N" if tokens else "image side, pixels", "milliseconds"),
        size=(8.4, 5.0 * max(1, len(panels))),
        stacked=True,
        log=True,
    )


def _latency_lines(rows: Sequence[Row]) -> list[Line]:
    found, sizes = crossovers(rows), sorted({row.case.size for row in rows})
    softmax = [statistics.median_high(row.softmax for row in rows if row.case.size == size) for size in sizes]
    lines = [Line(rows[0].case.beside, sizes, [1e3 * y for y in softmax], INK["light"], "--")]
    names = [name for name in dict.fromkeys(row.case.name for row in rows) if name != SOFTMAX]
    for place, name in enumerate(names):
        own = sorted((row for row in rows if row.case.name == name), key=lambda row: row.case.size)
        low, y, high = ([1e3 * getattr(row, key) for row in own] for key in ("low", "median", "high"))
        at = found.get(without_size(own[0].case))
        lines.append(
            Line(
                name if at is None else f"{name} ({at})",
                [row.case.size for row in own],
                y,
                color_of(place),
                dashes_of(place),
                (low, high),
                at.size if at is not None and not at.where else None,
            )
        )
    return lines


logger = logging.getLogger(__name__)
AGAIN = 2
"""How often rows are measured again whose reference drifted."""


def run_cases(
    kind: Kind,
    cases: Sequence[Case],
    measure: Callable[[Case], Row],
    folder: Path,
    *,
    force: bool = False,
    tell: Callable[[str], None] = logger.info,
) -> Results:
    """Measure the cases that `folder` does not have yet, and write tables and the plot.

    Rows whose reference drifted are measured again, and marked where it drifts still.

    Args:
        kind: What the cases are of.
        cases: In the order in which they are measured.
        measure: Gives the row of a case.
        folder: Gets `results.json` and `results.csv` after each case, `table.md` and `latency.png` at the end.
        force: Drop what is in the folder.
        tell: Called with a line before and after each case.

    Raises ConfigError: the folder has results of another kind or machine.
    """
    results = Results(kind, machine()) if force else load_results(folder, kind)
    keep_freed_memory()

    def run(case: Case) -> str:
        row = measure(case)
        results.rows.append(row)
        results.save(folder)
        return f"{1e3 * row.median:.3g} ms, {row.ratio:.2f} times as fast as {case.beside}"

    run_in_turn(left_to_run(cases, results.state, tell), run, tell)
    for _ in range(AGAIN):
        for row in drifted(row for row in results.rows if row.case in cases):
            tell(f"{row.case}: {row.case.beside} took {1e3 * row.softmax:.3g} ms, in other rows not: again")
            results.rows[results.rows.index(row)] = measure(row.case)
            results.save(folder)
    asked = Results(kind, results.machine, [row for row in results.rows if row.case in cases])
    write_text(folder / "table.md", make_report(asked).to_markdown())
    write_bytes(folder / "latency.png", to_png(draw_latency(asked.rows), ground="white"))
    return asked


def check_device(device: str) -> str:
    """Return the device, where this machine has it. Raises ConfigError."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; take --device cpu")
    return device


# The row of a case from its two steps: fused softmax attention, and what is measured beside it.


def compiled(module: nn.Module, case: Case) -> nn.Module:
    """Return the module, compiled where the case asks for it."""
    return cast(nn.Module, torch.compile(module)) if case.compiled else module


def measure_case(case: Case, steps: Sequence[Step], repeats: int, *, macs: int, counted: int) -> Row:
    """Time both `steps` in turn, softmax first, and measure the peak memory of the second."""
    device, (softmax, own) = torch.device(case.device), steps
    timings = time_steps({"softmax": softmax, "own": own}, repeats, device)
    time, beside = timings["own"], timings["softmax"]
    return Row(
        case,
        time.median,
        time.low,
        time.high,
        beside.median,
        peak_bytes(own, device),
        macs,
        counted,
        load_average(),
        time.cpu,
        beside.cpu,
    )


# A whole model converted by a plan, timed in turn with the model as it is.


def model_cases(sources: Sequence[str], plans: Sequence[str], sizes: Sequence[int], ways: Ways) -> list[Case]:
    """Return every combination, small images first.

    Raises GraftError: a source is not there, an image size does not fit it, or a plan is not valid.
    """
    for source in sources:
        model = load_model(source, min(sizes))
        for plan in plans:
            convert(model, plan, without=ways.without)
        for size in sizes:
            load_model(source, size)
    return ways.cases("models", plans, sources, sizes)


def load_model(source: str, img_size: int) -> nn.Module:
    """Return the model of a source for images of `img_size` pixels.

    A timm name is built with random weights, which are as fast as any: nothing is downloaded for it.

    Raises CheckpointError: there is no such source, or it takes no such images.
    """
    found = parse_source(source)
    if isinstance(found, TimmSource):
        check_name(found.name)
        model = build(found.name.partition(".")[0], {"img_size": img_size}).eval()
    else:
        model = load_pretrained(source, img_size=img_size).model
    if image_size(model) is None:  # it takes images of any size, and does not know this one
        resize(model, img_size)
    check_fills(model, img_size)
    return model


def check_fills(model: nn.Module, img_size: int) -> None:
    """Raise ConfigError where patches do not fill the image: timm ignores the rest silently."""
    patch = patch_size(model)
    if img_size % patch[0]:
        nearest = patch[0] * max(1, round(img_size / patch[0]))
        raise ConfigError(
            f"--img_size {img_size}: patches of {patch[0]} pixels do not fill it; take {nearest}"
        )


def measure_model(case: Case, repeats: int) -> Row:
    """Measure times, memory and multiply-adds of one case."""
    device, dtype = torch.device(case.device), DTYPES[case.dtype]
    softmax = load_model(case.source, case.size)
    student = convert(softmax, case.name, without=case.without)
    fit_at_random(converted_layers(student))
    softmax, student = (model.to(device, dtype).requires_grad_(case.backward) for model in (softmax, student))
    torch.manual_seed(0)
    images = torch.randn(case.batch, 3, case.size, case.size, device=device, dtype=dtype)
    compared = (softmax, compiled(student, case))
    steps = [
        _learning(model, images) if case.backward else step_of(partial(model, images)) for model in compared
    ]
    counted, whole = (counted_macs(step_of(partial(model, images[:1]))) for model in (student, softmax))
    return measure_case(
        case,
        steps,
        repeats,
        macs=sum(attention_macs(student)),
        counted=counted - macs_beside(student, softmax, whole),
    )


def macs_beside(student: nn.Module, unconverted: nn.Module, whole: int) -> int:
    """Return the multiply-adds for one image of all but the attention operators of a converted model.

    `whole` is what torch's counter gives for the unconverted model, which has as much beside its attention, unless a
    conversion drops parts.
    """
    keeps_all = family_of(student).keeps_all
    return whole - sum(attention_macs(unconverted)) if keeps_all else other_macs(student)


def _learning(model: nn.Module, images: torch.Tensor) -> Step:
    return step_of(lambda: model(images).float().square().mean(), list(model.parameters()))


# One attention operator on random projections, timed in turn with fused softmax attention.

LONGEST = 2
"""How many times as long as wide a grid may be."""


@dataclass(frozen=True)
class Layer:
    """The layer around the operator."""

    heads: int = 6
    head_dim: int = 64
    prefix: int = 0

    def shape(self, tokens: int) -> LayerShape:
        """Return the layer over so many patches."""
        return LayerShape(self.heads, self.head_dim, Geometry(self.prefix, grid_of(tokens)))

    def __str__(self) -> str:
        prefix = f", {self.prefix} prefix tokens" if self.prefix else ""
        return f"{self.heads} heads of {self.head_dim}{prefix}"


def grid_of(tokens: int) -> tuple[int, int]:
    """Return the squarest grid of `tokens` patches. Raises ConfigError: no grid has a common shape."""
    height = next((side for side in range(math.isqrt(max(tokens, 0)), 0, -1) if tokens % side == 0), 0)
    if height == 0 or tokens > LONGEST * height**2:
        side = max(1, round(max(tokens, 1) ** 0.5))
        raise ConfigError(
            f"--tokens {tokens}: there is no grid of so many patches; take {side**2} ({side} x {side}), and "
            "--prefix for a class token"
        )
    return height, tokens // height


def choice_of(text: str) -> Choice:
    """Parse an operator with options, as `kernel(feature=relu)`. Raises ConfigError: it is not valid."""
    return parse_plan({"*": text}, 1)[0]


def operator_cases(names: Sequence[str], tokens: Sequence[int], layer: Layer, ways: Ways) -> list[Case]:
    """Return every combination, short ones first.

    Raises ConfigError: an operator, an option or a grid is not there.
    """
    for name in names:
        for size in tokens:
            create_operator(choice_of(name), layer.shape(size))
    return ways.cases("operators", [str(choice_of(name)) for name in names], [str(layer)], tokens)


def measure_operator(case: Case, layer: Layer, repeats: int) -> Row:
    """Measure times, memory and multiply-adds of one case."""
    torch.manual_seed(0)
    device, dtype, shape = torch.device(case.device), DTYPES[case.dtype], layer.shape(case.size)
    softmax, operator = (
        create_operator(choice_of(name), shape).to(device, dtype).eval() for name in (SOFTMAX, case.name)
    )
    operator.fit([], seed=0)
    heads = draw_heads(shape, case.batch, device, dtype)
    steps = [
        operator_step(each, heads, case.backward, each.parameters())
        for each in (softmax, compiled(operator, case))
    ]
    counted = counted_macs(operator_step(operator, draw_heads(shape, 1, device, dtype), backward=False))
    return measure_case(case, steps, repeats, macs=operator.macs(shape.geometry), counted=counted)


def draw_heads(shape: LayerShape, batch: int, device: torch.device, dtype: torch.dtype) -> Heads:
    """Draw random projections, laid out in memory as a layer gives them: (B, N, H, D), seen as (B, H, N, D)."""
    size = (3, batch, shape.geometry.num_tokens, shape.num_heads, shape.head_dim)
    q, k, v = torch.randn(size, device=device, dtype=dtype).transpose(2, 3).unbind(0)
    return Heads(q, k, v, None, shape.head_dim**-0.5, geometry=shape.geometry)


def operator_step(
    run: Callable[[Heads], Tensor], heads: Heads, backward: bool, parameters: Iterable[Tensor] = ()
) -> Step:
    """Return a step whose output is laid out as the next projection of a layer reads it, (B, N, H D)."""

    def by_token(heads: Heads) -> Tensor:
        return run(heads).transpose(1, 2).flatten(2)

    if not backward:
        return step_of(partial(by_token, heads))
    q, k, v = (x.detach().requires_grad_() for x in heads.qkv())
    ready = heads.with_qkv(q, k, v)
    upstream = torch.randn_like(v.transpose(1, 2).flatten(2))
    return step_of(partial(by_token, ready), [q, k, v, *parameters], upstream)
