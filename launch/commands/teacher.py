"""`graftvit teacher info SOURCE`: describe a teacher, and check whether its weights fit."""

from __future__ import annotations

from ..flags import SOURCE_HELP, SOURCE_SETTINGS, command_parser, keywords_of, parse_command
from ..say import say


def run(argv: list[str]) -> int:
    """Load a teacher and print what is known about it."""
    parser = command_parser(
        "teacher",
        "Describe a source: format, architecture, input, license, the weights that load and those that do not.",
        [
            "graftvit teacher info vit_large_patch16_224.mae",
            "graftvit teacher info mae_finetuned_vit_base.pth --teacher.model vit_base_patch16_224",
            "graftvit teacher info hf-hub:facebook/dinov2-base",
            "graftvit teacher info runs/pretrain#ema",
        ],
        usage="info SOURCE [--teacher.key value ...]",
    )
    parser.add_argument("action", choices=["info"], metavar="info", help="print what the teacher is")
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    arguments, settings = parse_command(parser, argv, only=SOURCE_SETTINGS)
    how = keywords_of(settings)
    from ...checkpoints.describe import describe_source

    text, error = describe_source(arguments.source, **how)
    say(text)
    if error is not None:
        raise error
    return 0
