"""`graftvit visualize CHECKPOINT IMAGE ...`: show what a model attends to as pictures, numbers and a page."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...models.errors import ConfigError, JsonDict
from ..flags import SOURCE_HELP, SOURCE_SETTINGS, command_parser, keywords_of, parse_command
from ..load_config import Setting, load_config
from ..say import say, tell

EXAMPLES = (
    "graftvit visualize vit_base_patch16_224.mae cat.jpg dog.jpg",
    "graftvit visualize runs/linear/student photos/ --teacher vit_base_patch16_224.mae --output_dir seen",
    "graftvit visualize runs/linear/student cat.jpg --query cls,90 --layers 0,5,9-11",
    "graftvit visualize swin_tiny_patch4_window7_224.ms_in1k cat.jpg --query 112x60,20x200 --layers stage3,stage4",
    "graftvit visualize local-dir:student street.jpg --img_size 224,448",
    "graftvit visualize swin_tiny_patch4_window7_224.ms_in1k --average 1000 --data_path /data/imagenet",
    "graftvit visualize runs/detector --data_path /data/coco --output_dir found",
    "graftvit visualize local-dir:demo/quick/distill_0/student digits:3 digits:8",
)
DATA = tuple(
    f"data.{name}"
    for name in (
        "dataset", "data_path", "val_split", "download", "image_column", "label_column", "classes", "batch_size",
        "eval_batch_size", "workers", "interpolation", "crop_pct", "crop_mode", "max_bad_images",
    )
)  # fmt: skip
"""The settings of a data set that --average reads."""


def run(argv: list[str]) -> int:
    """Write the folder, and print the path of its page."""
    parser = command_parser(
        "visualize",
        "Show what a model attends to: attention of chosen queries over each image by layer and head, attention "
        "rollout, entropy and mean distance by layer, and the distance of a student from its teacher. Write PNGs, "
        "numbers.json and index.html, a page in which a click on a patch shows its row of the attention map. Of a "
        "detector or segmenter and no IMAGE, show what it finds in the first images of its data set.",
        EXAMPLES,
        usage="CHECKPOINT (IMAGE [IMAGE ...] | --average N --data_path DIR) [--flag value ...]",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=SOURCE_HELP)
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE", help="image files, folders of images, or digits:N; at most 16"
    )
    text = (
        "show the mean of the maps over N images of a data set (--data_path, --val_split), spread evenly over it, "
        "or over 'all', and write it as average.npz"
    )
    parser.flag("--average", text, metavar="N")
    text = "a model to put beside it: layers as the run paired them, or at the same relative depth"
    parser.flag("--teacher", text, metavar="SOURCE")
    text = (
        "queries, separated by commas: patches by number, row by row from 0, prefix tokens (cls, reg0), and places"
        " ROWxCOLUMN in pixels, the only ones in a pyramid (default: cls, or the middle)"
    )
    parser.flag("--query", text, default="", metavar="LIST")
    text = "layers to show: 0,5,9-11, -1, or stage3 of a pyramid, or * for all"
    parser.flag("--layers", text, default="*", metavar="LIST")
    parser.output_dir("folder to write", "attention")
    arguments, settings = parse_command(parser, argv, only=(*SOURCE_SETTINGS, *DATA))
    if not arguments.images and arguments.average is None and is_dense(arguments.checkpoint):
        say(f"{_visualize_detections(arguments, settings)}\n")
        return 0
    queries = [word.strip() for word in arguments.query.split(",") if word.strip()]
    how: JsonDict = {"teacher": arguments.teacher, "queries": queries, "layers": arguments.layers}
    how |= keywords_of([each for each in settings if not each.key.startswith("data.")])
    _check_images(arguments.average, arguments.images, settings)
    page: Path | None
    if arguments.average is not None:
        page = _visualize_average(arguments, settings, how)
    else:
        from ...checkpoints.pretrained import load_pretrained
        from ...transfer.analysis.visualize.visualize import visualize

        model = arguments.checkpoint
        if is_dense(model):  # an IMAGE shows what the backbone attends to
            named = {name: how.pop(name) for name in [*how] if name not in ("teacher", "queries", "layers")}
            model = load_pretrained(model, **named)
        seen = visualize(model, arguments.images, arguments.output_dir, **how)
        page = seen.page
    say(f"{page}\n")
    return 0


def is_dense(source: str) -> bool:
    """Return whether a source is a detector or segmenter."""
    from ...checkpoints.dense_models import find_dense

    return find_dense(source) is not None


def _visualize_detections(arguments: argparse.Namespace, settings: list[Setting]) -> Path:
    """Write what a detector or segmenter finds. Raises ConfigError for flags of attention."""
    flags = {
        "--teacher": arguments.teacher,
        "--query": arguments.query,
        "--layers": arguments.layers.strip("*"),
    }
    flags |= {each.origin: True for each in settings if not each.key.startswith("data.")}
    given = next((flag for flag, value in flags.items() if value), None)
    if given is not None:
        raise ConfigError(
            f"{given} is of attention: name an IMAGE to see that of the backbone, or leave it out"
        )
    from ...transfer.analysis.visualize.detections import visualize_detections
    from ..evaluation import Evaluation

    config = Evaluation([arguments.checkpoint], settings, ()).config()
    return visualize_detections(arguments.checkpoint, config, arguments.output_dir)


def _check_images(average: str | None, images: list[str], settings: list[Setting]) -> None:
    """Raise ConfigError where images are given in both ways, or settings of a data set without --average."""
    if average is not None and images:
        raise ConfigError(
            f"--average shows a data set, and the image {images[0]!r} is given; name its folder by --data_path instead"
        )
    given = next((each for each in settings if each.key.startswith("data.")), None)
    if average is None and given is not None:
        raise ConfigError(
            f"{given.origin} has an effect with --average only: add it, or leave the setting out"
        )
    if average is None and not images:
        raise ConfigError("no IMAGE is given: name files, folders of images, or digits:0, or give --average")


def _visualize_average(arguments: argparse.Namespace, settings: list[Setting], how: JsonDict) -> Path:
    count = _parse_count(arguments.average)
    from ...transfer.analysis.visualize.average import visualize_average

    data = load_config(None, [each for each in settings if each.key.startswith("data.")]).data

    return visualize_average(arguments.checkpoint, data, arguments.output_dir, count=count, tell=tell, **how)


def _parse_count(word: str) -> int | None:
    """Return the number of images; None for all."""
    if word == "all":
        return None
    if not word.isdecimal() or int(word) == 0:
        raise ConfigError(f"--average {word!r}: valid are a number of images from 1, and 'all'")
    return int(word)
