"""`graftvit visualize CHECKPOINT IMAGE ...`: show what a model attends to as pictures, numbers and a page."""

from __future__ import annotations

from pathlib import Path

from ...models.errors import ConfigError
from ..flags import command_parser, parse_command
from ..say import say
from ..source_flags import SOURCE_HELP, SOURCE_SETTINGS, keywords_of

EXAMPLES = (
    "graftvit visualize vit_base_patch16_224.mae cat.jpg dog.jpg",
    "graftvit visualize runs/linear/student photos/ --teacher vit_base_patch16_224.mae --out seen",
    "graftvit visualize runs/linear/student cat.jpg --query cls,90 --layers 0,5,9-11",
    "graftvit visualize swin_tiny_patch4_window7_224.ms_in1k cat.jpg --query 112x60,20x200 --layers stage3,stage4",
    "graftvit visualize local-dir:student street.jpg --img_size 224,448",
    "graftvit visualize local-dir:demo/quick/distill_0/student digits:3 digits:8",
)


def run(argv: list[str]) -> int:
    """Write the folder, and print the path of its page."""
    parser = command_parser(
        "visualize",
        "Show what a model attends to: attention of chosen queries over each image by layer and head, attention "
        "rollout, entropy and mean distance by layer, and the distance of a student from its teacher. Write PNGs, "
        "numbers.json and index.html, a page in which a click on a patch shows its row of the attention map.",
        EXAMPLES,
        usage="CHECKPOINT IMAGE [IMAGE ...] [--flag value ...]",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=SOURCE_HELP)
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image files, folders of images, or digits:N; at most 16"
    )
    parser.add_argument("--teacher", metavar="SOURCE", help="a model to compare with, at the same image size")
    parser.add_argument(
        "--query",
        default="",
        metavar="LIST",
        help="who asks, separated by commas: patches by number, row by row from 0, prefix tokens (cls, reg0), and "
        "places ROWxCOLUMN in pixels, the only ones in a pyramid (default: cls, or the middle)",
    )
    parser.add_argument(
        "--layers",
        default="*",
        metavar="LIST",
        help="layers to show: 0,5,9-11, -1, or stage3 of a pyramid (default: all)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("attention"),
        metavar="DIR",
        help="folder to write (default: attention)",
    )
    arguments, settings = parse_command(parser, argv, only=SOURCE_SETTINGS)
    if arguments.out.exists() and not arguments.out.is_dir():
        raise ConfigError(f"--out is {str(arguments.out)!r}, which is a file; give a folder")
    how = keywords_of(settings)
    queries = [word.strip() for word in arguments.query.split(",") if word.strip()]
    from ...transfer.analysis.visualize.visualize import visualize

    page = visualize(
        arguments.checkpoint,
        arguments.images,
        arguments.out,
        teacher=arguments.teacher,
        queries=queries,
        layers=arguments.layers,
        **how,
    )
    say(f"{page}\n")
    return 0
