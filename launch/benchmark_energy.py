"""`graftvit benchmark energy SOURCE ...`: multiplications, additions, energy and area of models."""

from __future__ import annotations

import argparse

from ..models.errors import ConfigError
from .flags import SOURCE_HELP, command_parser
from .say import say

EXAMPLES = (
    "graftvit benchmark energy vit_base_patch16_224 --plan '*: linear' '*: hash'",
    "graftvit benchmark energy pvt_v2_b0 --plan '*: softmax' '0-5: hash' --accounting published",
    "graftvit benchmark energy runs/student --multiplication_pj 1.1 --addition_pj 0.4",
)
TEXT = (
    "Count the multiplications and additions of one image while the model runs on the meta device, and what they "
    "cost in energy and chip area: by default those of 32-bit floats at 45 nm. Products with the codes of hashed "
    "attention are additions. Accounting 'true' counts what is computed, 'published' follows the rules of EcoFormer's "
    "tables."
)


def run(argv: list[str]) -> int:
    """Print the table."""
    arguments = parse(argv)
    from ..transfer.analysis.benchmark.cases import Prices, energy_rows, energy_table

    prices = Prices(
        arguments.multiplication_pj,
        arguments.addition_pj,
        arguments.multiplication_area,
        arguments.addition_area,
    )
    rows = energy_rows(arguments.sources, arguments.plan, arguments.img_size, arguments.accounting)
    say(energy_table(rows, prices) + "\n")
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments. Raises ConfigError: one is invalid."""
    parser = command_parser(
        "benchmark energy", TEXT, EXAMPLES, usage="SOURCE [SOURCE ...] [--flag value ...]"
    )
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help=f"{SOURCE_HELP}; timm names are built without weights"
    )
    parser.add_argument(
        "--plan",
        nargs="+",
        default=[],
        help="layer plans to count beside the model as it is, e.g. '*: linear'",
    )
    parser.add_argument(
        "--img_size",
        type=int,
        default=None,
        metavar="PIXELS",
        help="side of the image (default: the model's)",
    )
    parser.add_argument(
        "--accounting", choices=["true", "published"], default="true",
        help="count what is computed (true), or by the rules of EcoFormer's tables (published) (default: true)",
    )  # fmt: skip
    for operation, energy, area in (("multiplication", 3.7, 7700), ("addition", 0.9, 4184)):
        parser.add_argument(
            f"--{operation}_pj", type=float, default=energy, metavar="PJ",
            help=f"energy of one {operation} in pJ (default: {energy})",
        )  # fmt: skip
        parser.add_argument(
            f"--{operation}_area", type=float, default=area, metavar="UM2",
            help=f"area of a unit for one {operation} in µm² (default: {area})",
        )  # fmt: skip
    arguments = parser.parse_args(argv)
    if arguments.img_size is not None and arguments.img_size < 1:
        raise ConfigError(f"--img_size {arguments.img_size}: give a number of pixels, 1 or more")
    for name in ("multiplication_pj", "addition_pj", "multiplication_area", "addition_area"):
        value = getattr(arguments, name)
        if not 0 <= value < float("inf"):
            raise ConfigError(f"--{name} {value}: give a number, 0 or more")
    return arguments
