"""`graftvit deploy MODEL --to TARGET`: write a classifier as a file of another runtime, if it is worth its model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ...models.errors import ConfigError
from ..flags import SOURCE_HELP, SOURCE_SETTINGS, command_parser, parse_command, source_keywords, whole
from ..load_config import load_config
from ..say import say
from ..submitted import Work
from .evaluate import DATA

if TYPE_CHECKING:
    from ..evaluation import Evaluation

EXAMPLES = (
    "graftvit deploy runs/distill --to onnx --data_path /data/imagenet --output_dir phone",
    "graftvit deploy runs/converted --to onnx-int8 --drop 0.3 --data_path /data/imagenet --output_dir phone",
    "graftvit deploy vit_base_patch16_224.augreg_in1k --to aoti --data_path /data/imagenet --output_dir server",
)
SETTINGS = (*(f"data.{name}" for name in DATA), *SOURCE_SETTINGS, "imports")
TARGETS = ("onnx", "onnx-int8", "aoti", "executorch")


def run(argv: list[str]) -> int:
    """Write the folder of a file that passed, and print what it is worth."""
    arguments, asked = _parse(argv)
    _check(arguments, asked, here=True)
    from ...checkpoints.pretrained import load_pretrained
    from ...transfer.deploy import deploy

    data = asked.config().data  # first, because it imports what the run did
    how = load_config(None, asked.section("teacher")).teacher
    known = load_pretrained(arguments.model, **source_keywords(how))
    images = {} if arguments.calibrate is None else {"calibrate": arguments.calibrate}
    report = deploy(
        known, arguments.output_dir, data, target=arguments.to, drop=arguments.drop, overwrite=arguments.force, **images
    )  # fmt: skip
    say("\n".join([f"wrote    {arguments.output_dir}", *report.lines()]) + "\n")
    return 0


def check(argv: list[str], *, here: bool = True) -> Work:
    """Check the arguments and, with `here`, the model and the images."""
    arguments, asked = _parse(argv)
    return Work(arguments.output_dir, _check(arguments, asked, here=here))


def _parse(argv: list[str]) -> tuple[argparse.Namespace, Evaluation]:
    parser = command_parser(
        "deploy",
        "Write a classifier as one file of another runtime, with a script that runs it and needs nothing of this "
        "package. The file, with the preprocessing that is written in it, is measured on the validation images beside "
        "the model; one that loses too much is not kept.",
        EXAMPLES,
        usage="MODEL --to TARGET --output_dir DIR [--flag value ...]",
    )
    parser.add_argument("model", metavar="MODEL", help=SOURCE_HELP)
    parser.flag("--to", "kind of file", choices=TARGETS, required=True)
    parser.output_dir("new folder of the file, its script load.py and its report", required=True)
    text = "points of top-1 that the file may lose against the model"
    parser.flag("--drop", text, type=_points, default=0.5, metavar="POINTS")
    text = "training images that int8 is calibrated on (default: 128)"
    parser.flag("--calibrate", text, type=whole(1), metavar="N")
    parser.switch("--force", "replace the folder of an earlier file")
    arguments, settings = parse_command(parser, argv, only=SETTINGS)
    from ..evaluation import Evaluation

    if arguments.calibrate is not None and arguments.to != "onnx-int8":
        raise ConfigError(f"--calibrate {arguments.calibrate} is for --to onnx-int8: leave it out")
    return arguments, Evaluation([arguments.model], settings, ())


def _points(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 100:
        raise argparse.ArgumentTypeError(f"{text!r}: give points of accuracy from 0 to 100, such as 0.5")
    return found


def _check(arguments: argparse.Namespace, asked: Evaluation, *, here: bool) -> int:
    """Raise what is wrong and needs no loaded model; return the number of loader processes."""
    from ...transfer.deploy import check_deployment

    check_deployment(arguments.output_dir, arguments.to, dense=asked.dense, overwrite=arguments.force)
    return asked.check(here=here).workers
