"""`graftvit export SOURCE OUT`: write a model as an ONNX or torch.export file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ...models.errors import JsonDict
from ..flags import SOURCE_HELP, SOURCE_SETTINGS, command_parser, keywords_of, parse_command
from ..say import say
from ..submitted import Work, check_here

if TYPE_CHECKING:
    from ...checkpoints.export_graph import Dynamic

EXAMPLES = (
    "graftvit export runs/distill student.onnx",
    "graftvit export runs/distill#ema student.pt2 --normalize",
    "graftvit export vit_base_patch16_224.augreg_in1k vit.onnx --img_size 384 --opset 20",
    "graftvit export runs/detector maps.onnx --img_size 800,1344",
    "graftvit export vit_small_patch14_reg4_dinov2.lvd142m dino.onnx --dynamic batch resolution",
)


def run(argv: list[str]) -> int:
    """Export one model, and print the files and their error against the model."""
    arguments, how = _parse(argv)
    from ...checkpoints.export import export

    report = export(
        arguments.source,
        arguments.out,
        format=arguments.format,
        dynamic=_read_dynamic(arguments),
        opset=arguments.opset,
        normalize=arguments.normalize,
        tolerance=arguments.tolerance,
        overwrite=arguments.force,
        **how,
    )
    say("\n".join(report.lines()) + "\n")
    return 0


def check(argv: list[str], *, here: bool = True) -> Work:
    """Check the arguments and, with `here`, the source."""
    arguments, _ = _parse(argv)
    from ...checkpoints.export import check_export

    check_export(
        arguments.out,
        arguments.format,
        _read_dynamic(arguments),
        arguments.opset,
        arguments.tolerance,
        arguments.force,
    )
    if here:
        check_here(arguments.source)
    return Work(arguments.out)


def _read_dynamic(arguments: argparse.Namespace) -> tuple[Dynamic, ...]:
    return tuple(name for name in arguments.dynamic if name != "none")


def _parse(argv: list[str]) -> tuple[argparse.Namespace, JsonDict]:
    parser = command_parser(
        "export",
        "Write a model as one file that runs without this package. The file is checked against the model before it "
        "is put in place. Its input is normalized images (B, 3, H, W); its metadata describes the preprocessing.",
        EXAMPLES,
        usage="SOURCE OUT [--flag value ...]",
    )
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="the file: .onnx for ONNX, .pt2 for torch.export"
    )
    parser.flag("--format", "default: chosen by the suffix of OUT", choices=["onnx", "torch"])
    sizes = ["batch", "resolution", "none"]
    parser.flag("--dynamic", "dynamic sizes", nargs="+", choices=sizes, default=["batch"])
    parser.flag("--opset", "opset of ONNX (default: torch's choice)", type=int, metavar="N")
    parser.switch("--normalize", "make the file take images in 0..1 and normalize them itself")
    parser.flag(
        "--tolerance", "largest relative error against the model", type=float, default=1e-4, metavar="X"
    )
    parser.switch("--force", "replace OUT if it exists")
    arguments, settings = parse_command(parser, argv, only=SOURCE_SETTINGS)
    if "none" in arguments.dynamic and len(arguments.dynamic) > 1:
        parser.error("--dynamic none cannot be combined with other values")
    return arguments, keywords_of(settings)
