"""`graftvit benchmark operators | models`: measure latency, memory and cost against what they replace."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ...models.errors import ConfigError, did_you_mean
from .. import benchmark_energy
from ..flags import SOURCE_HELP, Parser, command_parser
from ..say import say, say_aside
from ..submitted import Work

if TYPE_CHECKING:
    from ...transfer.analysis.benchmark.cases import Case, Kind, Row, Ways

    Measure = Callable[[Case], Row]

ACTIONS = {
    "operators": "single attention operators on random projections, over the number of tokens",
    "models": "whole models, converted by one plan or several, over the image size",
}
ENERGY = ("energy", "--energy")
"""The action that counts and measures nothing, which has a parser of its own."""
EXAMPLES = (
    "graftvit benchmark operators",
    "graftvit benchmark operators --operators linear monarch 'kernel(feature=relu)' --tokens 196 1024 4096 --backward",
    "graftvit benchmark operators --peers --tokens 196 1024 4096 --batch 1 --backward",
    "graftvit benchmark operators --device cuda --dtype float32 bfloat16 --batch 1 8 --compile",
    "graftvit benchmark models vit_small_patch16_224 --plan '*: linear' '*: linear; 9-11: softmax'",
    "graftvit benchmark models swin_tiny_patch4_window7_224 --plan 'stage1: none; stage3: linear' --without bias",
    "graftvit benchmark models runs/distill --plan '*: monarch' --img_size 224 448 896 --batch 1 16",
)
METHOD = (
    "After a warm-up, each case is timed in turn with fused softmax attention, or with the model before its "
    "conversion: median, quartiles, and the speed-up. "
    "Peak memory comes from torch's allocator on a GPU, and from the allocations in torch's profiler on a CPU. "
    "Results are written after each case; repeat the command to continue a stopped benchmark."
)


def run(argv: list[str]) -> int:
    """Measure operators or models."""
    if not argv or argv[0] in ("-h", "--help"):
        energy_words = "energy: multiplications, additions, energy and area of whole models; nothing is timed"
        text = "\n".join([*(f"{name}: {words}" for name, words in ACTIONS.items()), energy_words, "", METHOD])
        command_parser("benchmark", text, EXAMPLES, usage="ACTION [--flag value ...]").print_help(sys.stdout)
        return 0 if argv else 2
    if argv[0] in ENERGY:
        return benchmark_energy.run(argv[1:])
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler writes each start and stop to stderr
    action, arguments = _parse(argv)
    if action == "operators":
        cases, measure = _operators(arguments)
    else:
        cases, measure = _models(arguments)
    return _run(action, cases, measure, arguments.out, arguments.device, arguments.force)


def check(argv: list[str], *, here: bool = True) -> Work:
    """Check the arguments and, with `here`, the models."""
    if argv[:1] and argv[0] in ENERGY:
        benchmark_energy.parse(argv[1:])
        return Work()
    action, arguments = _parse(argv)
    if action == "operators":
        _operators(arguments)
    elif here:
        _models(arguments)
    return Work(arguments.out)


def _parse(argv: list[str]) -> tuple[Kind, argparse.Namespace]:
    action, *rest = argv or [""]
    if action not in ACTIONS:
        raise ConfigError(f"unknown action {action!r}; {did_you_mean(action, (*ACTIONS, 'energy'))}")
    parser = _operators_parser() if action == "operators" else _models_parser()
    return cast("Kind", action), parser.parse_args(rest)


def _operators_parser() -> Parser:
    parser = _parser("operators", "[--operators NAME ...] [--flag value ...]")
    parser.add_argument(
        "--operators", nargs="+", metavar="NAME",
        help="operators, with options as in a plan (default: all except softmax)",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", nargs="+", type=_whole, default=[64, 196, 576, 1024, 2304, 4096], metavar="N",
        help="patches of the image (default: 64 196 576 1024 2304 4096)",
    )  # fmt: skip
    parser.add_argument(
        "--heads", type=_whole, default=6, metavar="H", help="heads of the layer (default: 6)"
    )
    parser.add_argument(
        "--head_dim", type=_whole, default=64, metavar="D", help="width of a head (default: 64)"
    )
    parser.add_argument(
        "--prefix", type=_count, default=0, metavar="P", help="prefix tokens before the patches (default: 0)"
    )
    parser.add_argument(
        "--peers", action="store_true",
        help="also time each operator's straight-line form and its public implementation (the extra peers)",
    )  # fmt: skip
    _add_common(parser, [1, 8])
    return parser


def _operators(arguments: argparse.Namespace) -> tuple[list[Case], Measure]:
    from ...models.layer_plan import OPERATORS
    from ...transfer.analysis.benchmark.benchmark import Layer, measure_operator, operator_cases
    from ...transfer.analysis.benchmark.cases import SOFTMAX

    layer = Layer(arguments.heads, arguments.head_dim, arguments.prefix)
    names = arguments.operators or [name for name in OPERATORS if name != SOFTMAX]
    ways = replace(_ways(arguments), peers=arguments.peers)
    cases = operator_cases(names, arguments.tokens, layer, ways)
    return cases, lambda case: measure_operator(case, layer, arguments.repeats)


def _models_parser() -> Parser:
    parser = _parser("models", "SOURCE [SOURCE ...] --plan PLAN [PLAN ...] [--flag value ...]")
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help=f"{SOURCE_HELP}; timm names get random weights"
    )
    parser.add_argument("--plan", nargs="+", required=True, help="layer plans to measure, e.g. '*: linear'")
    parser.add_argument(
        "--img_size", nargs="+", type=_whole, default=[224, 448], metavar="PIXELS",
        help="sides of square images (default: 224 448)",
    )  # fmt: skip
    parser.add_argument(
        "--without", nargs="+", choices=["bias"], default=[], metavar="PART",
        help="parts of a pyramid's layers to give up where an operator does not take them: bias, the relative position "
        "bias (Swin)",
    )  # fmt: skip
    _add_common(parser, [1, 16])
    return parser


def _models(arguments: argparse.Namespace) -> tuple[list[Case], Measure]:
    from ...transfer.analysis.benchmark.benchmark import measure_model, model_cases

    ways = replace(_ways(arguments), without=tuple(arguments.without))
    cases = model_cases(arguments.sources, arguments.plan, arguments.img_size, ways)
    return cases, lambda case: measure_model(case, arguments.repeats)


def _ways(arguments: argparse.Namespace) -> Ways:
    from ...transfer.analysis.benchmark.cases import Ways

    return Ways(arguments.batch, arguments.dtype, arguments.device, arguments.backward, arguments.compile)


def _parser(action: str, usage: str) -> Parser:
    examples = [example for example in EXAMPLES if f" {action}" in example]
    return command_parser(f"benchmark {action}", f"{ACTIONS[action]}. {METHOD}", examples, usage=usage)


def _add_common(parser: Parser, batches: list[int]) -> None:
    shown = " ".join(map(str, batches))
    parser.add_argument(
        "--batch",
        nargs="+",
        type=_whole,
        default=batches,
        metavar="B",
        help=f"batch sizes (default: {shown})",
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32"],
        help="dtypes of weights and inputs: float32, bfloat16, float16 (default: float32)",
    )  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--compile", action="store_true", help="also measure with torch.compile")
    parser.add_argument("--backward", action="store_true", help="also measure forward with backward")
    parser.add_argument(
        "--repeats", type=_whole, default=15, metavar="R", help="rounds, at least two (default: 15)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmark"), metavar="DIR",
        help="folder for results.json, results.csv, table.md and latency.png (default: benchmark)",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="delete the results in DIR and measure again")


def _run(kind: Kind, cases: list[Case], measure: Measure, out: Path, device: str, force: bool) -> int:
    from ...transfer.analysis.benchmark.benchmark import check_device, render, run_cases

    check_device(device)
    results = run_cases(kind, cases, measure, out, force=force, tell=_tell)
    say(render(results))
    say(f"\n{out / 'table.md'}, latency.png, results.csv, results.json\n")
    return 0


def _tell(line: str) -> None:
    say_aside(f"{line}\n")
    sys.stderr.flush()


def _whole(text: str) -> int:
    return _at_least(text, 1)


def _count(text: str) -> int:
    return _at_least(text, 0)


def _at_least(text: str, least: int) -> int:
    value = int(text)
    if value < least:
        raise ValueError
    return value


_whole.__name__ = _count.__name__ = "whole number"
