"""`graftvit deploy MODEL --to TARGET`: write a classifier as a file of another runtime, if it is worth its model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ...checkpoints.report import some
from ...models.errors import CheckpointError, ConfigError
from ..flags import SOURCE_HELP, SOURCE_SETTINGS, command_parser, parse_command, whole
from ..say import say
from ..submitted import Work
from .evaluate import DATA

if TYPE_CHECKING:
    from ..deployment import Deployment

EXAMPLES = (
    "graftvit deploy runs/distill --to onnx --data_path /data/imagenet --output_dir phone",
    "graftvit deploy runs/converted --to onnx-int8 --drop 0.3 --data_path /data/imagenet --output_dir phone",
    "graftvit deploy vit_base_patch16_224.augreg_in1k --to aoti --data_path /data/imagenet --output_dir server",
)
SETTINGS = (*(f"data.{name}" for name in DATA), *SOURCE_SETTINGS, "imports")
CALIBRATE = 128
TARGETS = ("onnx", "onnx-int8", "aoti", "executorch")


def run(argv: list[str]) -> int:
    """Write the folder of a file that passed, and print what it is worth."""
    arguments, asked = _parse(argv)
    _check(arguments, asked, here=True)
    report = asked.write(arguments.output_dir)
    say("\n".join([f"wrote    {arguments.output_dir}", *report.lines()]) + "\n")
    return 0


def check(argv: list[str], *, here: bool = True) -> Work:
    """Check the arguments and, with `here`, the model and the images."""
    arguments, asked = _parse(argv)
    return Work(arguments.output_dir, _check(arguments, asked, here=here))


def _parse(argv: list[str]) -> tuple[argparse.Namespace, Deployment]:
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
    text = f"training images that int8 is calibrated on (default: {CALIBRATE})"
    parser.flag("--calibrate", text, type=whole(1), metavar="N")
    parser.switch("--force", "replace the folder of an earlier file")
    arguments, settings = parse_command(parser, argv, only=SETTINGS)
    from ..deployment import Deployment
    from ..evaluation import Evaluation

    if arguments.calibrate is not None and arguments.to != "onnx-int8":
        raise ConfigError(f"--calibrate {arguments.calibrate} is for --to onnx-int8: leave it out")
    asked = Evaluation([arguments.model], settings, ())
    return arguments, Deployment(asked, arguments.to, arguments.drop, arguments.calibrate or CALIBRATE)


def _points(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 100:
        raise argparse.ArgumentTypeError(f"{text!r}: give points of accuracy from 0 to 100, such as 0.5")
    return found


def _check(arguments: argparse.Namespace, asked: Deployment, *, here: bool) -> int:
    """Raise what is wrong and needs no loaded model; return the number of loader processes."""
    from ..deployment import REPORT, WRITTEN

    folder = arguments.output_dir
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names and REPORT not in names:
        raise CheckpointError(f"--output_dir {folder} has other files: give a new folder")
    if names and not arguments.force:
        raise CheckpointError(
            f"--output_dir {folder} has a deployed model: give another folder, or --force to replace it"
        )
    if other := sorted(names - WRITTEN):
        raise CheckpointError(
            f"--output_dir {folder} also has {some(other)}, which would be lost: move that elsewhere"
        )
    return asked.check(here=here)
