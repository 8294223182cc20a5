"""`graftvit teacher info SOURCE`: what a teacher is, and whether its weights fit."""

from __future__ import annotations

import sys

from ..config import load_config
from ..flags import command_parser, parse_command

SETTINGS = ("teacher.model", "teacher.model_args", "teacher.img_size", "teacher.position_embedding")


def run(argv: list[str]) -> int:
    """Load a teacher and print what is known of it."""
    parser = command_parser(
        "teacher",
        "Load a teacher and print its architecture, input, licence, and which keys of its weights fit.",
        [
            "graftvit teacher info vit_large_patch16_224.mae",
            "graftvit teacher info mae_finetuned_vit_base.pth --teacher.model vit_base_patch16_224",
            "graftvit teacher info local-dir:runs/pretrain/student",
        ],
        usage="info SOURCE [--teacher.key value ...]",
    )
    parser.add_argument("action", choices=["info"], metavar="info", help="print what the teacher is")
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="timm name, hf-hub:org/name[@revision], local-dir:path, .safetensors or .pth",
    )
    arguments, settings = parse_command(parser, argv, only=SETTINGS)
    config = load_config(None, settings).teacher
    from ...checkpoints.teacher import load_teacher

    teacher = load_teacher(
        arguments.source,
        model=config.model,
        model_args=config.model_args,
        img_size=config.img_size,
        position_embedding=config.position_embedding,
    )
    from ..describe import describe_teacher

    sys.stdout.write(describe_teacher(teacher))
    return 0
