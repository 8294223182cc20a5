"""`graftvit benchmark operators | models | energy`: measure latency, memory and cost against what is replaced."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ...models.errors import ConfigError
from ..flags import SOURCE_HELP, Action, Parser, command_parser, find_action, run_action, whole
from ..say import say, tell
from ..submitted import Work

if TYPE_CHECKING:
    from ...transfer.analysis.benchmark_cases import Case, Kind, Row, Ways

    Measure = Callable[[Case], Row]

EXAMPLES = (
    "graftvit benchmark operators",
    "graftvit benchmark operators --operators linear monarch 'kernel(feature=relu)' --tokens 196 1024 4096 --backward",
    "graftvit benchmark operators --device cuda --dtype float32 bfloat16 --batch 1 8 --compile",
    "graftvit benchmark models vit_small_patch16_224 --plan '*: linear' '*: linear; 9-11: softmax'",
    "graftvit benchmark models swin_tiny_patch4_window7_224 --plan 'stage1: none; stage3: linear' --without bias",
    "graftvit benchmark models runs/distill --plan '*: monarch' --img_size 224 448 896 --batch 1 16",
    "graftvit benchmark energy vit_base_patch16_224 --plan '*: linear' '*: hash'",
    "graftvit benchmark energy pvt_v2_b0 --plan '*: softmax' '0-5: hash' --accounting published",
    "graftvit benchmark energy runs/student --multiplication_pj 1.1 --addition_pj 0.4",
)
METHOD = (
    "After a warm-up, each case is timed in turn with fused softmax attention, or with the model before its "
    "conversion: median, quartiles, and the speed-up. "
    "Peak memory comes from torch's allocator on a GPU, and from the allocations in torch's profiler on a CPU. "
    "Results are written after each case; repeat the command to continue a stopped benchmark."
)
ENERGY = (
    "Count the multiplications and additions of one image while the model runs on the meta device, and what they "
    "cost in energy and chip area: by default those of 32-bit floats at 45 nm. Products with the codes of hashed "
    "attention are additions. Accounting 'true' counts what is computed, 'published' follows the rules of EcoFormer's "
    "tables."
)


def run(argv: list[str]) -> int:
    """Run one action."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler writes each start and stop to stderr
    return run_action("benchmark", argv, ACTIONS, EXAMPLES)


def check(argv: list[str], *, here: bool = True) -> Work:
    """Check the arguments and, with `here`, the models."""
    action, words = find_action(argv, ACTIONS)
    if action == "energy":
        _parse_energy(words)
        return Work()
    if action == "operators":
        arguments = _parse_operators(words)
        _list_operators(arguments)
    else:
        arguments = _parse_models(words)
        if here:
            _list_models(arguments)
    return Work(arguments.output_dir)


def _measure_operators(argv: list[str]) -> int:
    arguments = _parse_operators(argv)
    return _measure("operators", *_list_operators(arguments), arguments)


def _parse_operators(argv: list[str]) -> argparse.Namespace:
    text = f"Measure single attention operators on random projections, over the number of tokens. {METHOD}"
    parser = command_parser(
        "benchmark operators", text, EXAMPLES, "[--operators NAME ...] [--flag value ...]"
    )
    text = "operators, with options as in a plan (default: all except softmax)"
    parser.flag("--operators", text, nargs="+", metavar="NAME")
    tokens = [64, 196, 576, 1024, 2304, 4096]
    parser.flag("--tokens", "patches of the image", type=whole(1), nargs="+", default=tokens, metavar="N")
    parser.flag("--heads", "heads of the layer", type=whole(1), default=6, metavar="H")
    parser.flag("--head_dim", "width of a head", type=whole(1), default=64, metavar="D")
    parser.flag("--prefix", "prefix tokens before the patches", type=whole(0), default=0, metavar="P")
    _add_common(parser, "operators", [1, 8])
    return parser.parse_args(argv)


def _list_operators(arguments: argparse.Namespace) -> tuple[list[Case], Measure]:
    from ...models.layer_plan import OPERATORS
    from ...transfer.analysis.benchmark import Layer, measure_operator, operator_cases
    from ...transfer.analysis.benchmark_cases import SOFTMAX

    layer = Layer(arguments.heads, arguments.head_dim, arguments.prefix)
    names = arguments.operators or [name for name in OPERATORS if name != SOFTMAX]
    cases = operator_cases(names, arguments.tokens, layer, _read_ways(arguments))
    return cases, lambda case: measure_operator(case, layer, arguments.repeats)


def _measure_models(argv: list[str]) -> int:
    arguments = _parse_models(argv)
    return _measure("models", *_list_models(arguments), arguments)


def _parse_models(argv: list[str]) -> argparse.Namespace:
    text = f"Measure whole models, converted by one plan or several, over the image size. {METHOD}"
    parser = command_parser(
        "benchmark models", text, EXAMPLES, "SOURCE [SOURCE ...] --plan PLAN [PLAN ...] [--flag value ...]"
    )
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help=f"{SOURCE_HELP}; timm names get random weights"
    )
    parser.flag("--plan", "layer plans to measure, e.g. '*: linear'", nargs="+", required=True)
    sizes = [224, 448]
    parser.flag(
        "--img_size", "sides of square images", type=whole(1), nargs="+", default=sizes, metavar="PIXELS"
    )
    parser.add_argument(
        "--without", nargs="+", choices=["bias"], default=[], metavar="PART",
        help="parts of a pyramid's layers to give up where an operator does not take them: bias, the relative position "
        "bias (Swin)",
    )  # fmt: skip
    _add_common(parser, "models", [1, 16])
    return parser.parse_args(argv)


def _list_models(arguments: argparse.Namespace) -> tuple[list[Case], Measure]:
    from ...transfer.analysis.benchmark import measure_model, model_cases

    ways = replace(_read_ways(arguments), without=tuple(arguments.without))
    cases = model_cases(arguments.sources, arguments.plan, arguments.img_size, ways)
    return cases, lambda case: measure_model(case, arguments.repeats)


def _read_ways(arguments: argparse.Namespace) -> Ways:
    from ...transfer.analysis.benchmark_cases import Ways

    return Ways(arguments.batch, arguments.dtype, arguments.device, arguments.backward, arguments.compile)


def _add_common(parser: Parser, kind: Kind, batches: list[int]) -> None:
    parser.flag("--batch", "batch sizes", type=whole(1), nargs="+", default=batches, metavar="B")
    dtypes = ["float32", "bfloat16", "float16"]
    parser.flag("--dtype", "dtypes of weights and inputs", nargs="+", choices=dtypes, default=dtypes[:1])
    parser.flag("--device", "cpu or cuda", choices=["cpu", "cuda"], default="cpu")
    parser.switch("--compile", "also measure with torch.compile")
    parser.switch("--backward", "also measure forward with backward")
    parser.flag("--repeats", "rounds, at least two", type=whole(1), default=15, metavar="R")
    parser.output_dir("folder for results.json, results.csv, table.md and latency.png", f"benchmark/{kind}")
    parser.switch("--force", "delete the results in DIR and measure again")


def _measure(kind: Kind, cases: list[Case], measure: Measure, arguments: argparse.Namespace) -> int:
    from ...transfer.analysis.benchmark import check_device, make_report, run_cases

    check_device(arguments.device)
    results = run_cases(kind, cases, measure, arguments.output_dir, force=arguments.force, tell=tell)
    say(make_report(results).to_markdown())
    say(f"\n{arguments.output_dir / 'table.md'}, latency.png, results.csv, results.json\n")
    return 0


def _count_energy(argv: list[str]) -> int:
    """Print the table."""
    arguments = _parse_energy(argv)
    from ...transfer.analysis.benchmark_cases import Prices, energy_rows, energy_table

    prices = Prices(
        arguments.multiplication_pj,
        arguments.addition_pj,
        arguments.multiplication_area,
        arguments.addition_area,
    )
    rows = energy_rows(arguments.sources, arguments.plan, arguments.img_size, arguments.accounting)
    say(energy_table(rows, prices).to_markdown() + "\n")
    return 0


def _parse_energy(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments. Raises ConfigError: one is invalid."""
    parser = command_parser("benchmark energy", ENERGY, EXAMPLES, "SOURCE [SOURCE ...] [--flag value ...]")
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help=f"{SOURCE_HELP}; timm names are built without weights"
    )
    text = "layer plans to count beside the model as it is, e.g. '*: linear'"
    parser.flag("--plan", text, nargs="+", default=[])
    parser.flag("--img_size", "side of the image (default: the model's)", type=whole(1), metavar="PIXELS")
    parser.flag(
        "--accounting", "count what is computed (true), or by the rules of EcoFormer's tables (published)",
        choices=["true", "published"], default="true",
    )  # fmt: skip
    for operation, energy, area in (("multiplication", 3.7, 7700), ("addition", 0.9, 4184)):
        parser.flag(
            f"--{operation}_pj", f"energy of one {operation} in pJ", type=float, default=energy, metavar="PJ"
        )
        text = f"area of a unit for one {operation} in µm²"
        parser.flag(f"--{operation}_area", text, type=float, default=area, metavar="UM2")
    arguments = parser.parse_args(argv)
    for name in ("multiplication_pj", "addition_pj", "multiplication_area", "addition_area"):
        value = getattr(arguments, name)
        if not 0 <= value < float("inf"):
            raise ConfigError(f"--{name} {value}: give a number, 0 or more")
    return arguments


ACTIONS = {
    "operators": Action("measure single attention operators, over the number of tokens", _measure_operators),
    "models": Action("measure whole models, converted by plans, over the image size", _measure_models),
    "energy": Action(
        "count multiplications, additions, energy and area of whole models; no timing", _count_energy
    ),
}
