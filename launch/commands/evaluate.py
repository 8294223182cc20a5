"""`graftvit evaluate`: accuracy of checkpoints, one by one and together."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ...models.errors import ConfigError
from ..flags import command_parser, parse_command
from ..sources import SOURCE_SETTINGS

EXAMPLES = (
    "graftvit evaluate runs/distill --data_path /data/imagenet",
    "graftvit evaluate runs/distill runs/finetune --data_path /data/imagenet --json ensemble.json",
    "graftvit evaluate runs/distill#ema --data_path /data/imagenet-a --subset imagenet-a",
    "graftvit evaluate vit_base_patch16_224.augreg_in1k --data_path /data/imagenet --real",
    "graftvit evaluate mae_finetuned_vit_base.pth --data_path /data/imagenet --batch_size 128",
)
DATA = (
    "dataset", "data_path", "val_split", "download", "num_classes", "batch_size", "eval_batch_size", "workers",
    "interpolation", "crop_pct", "crop_mode", "max_bad_images",
)  # fmt: skip
SETTINGS = (
    *(f"data.{name}" for name in DATA),
    *SOURCE_SETTINGS,
    "engine.device",
    "engine.precision",
)
"""What makes a difference to an evaluation."""


def run(argv: list[str]) -> int:
    """Evaluate each checkpoint and, where there are several, their ensemble."""
    parser = command_parser(
        "evaluate",
        "Top-1, top-5 and loss, exact over processes. Several checkpoints also give their ensemble, the mean "
        "of their probabilities. A run folder brings its own data settings; flags change them.",
        EXAMPLES,
        usage="CHECKPOINT [CHECKPOINT ...] [--flag value ...]",
    )
    parser.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT", help="run folder, student folder or teacher source"
    )
    parser.add_argument("--subset", choices=["imagenet-a", "imagenet-r"], help="classes of a variant")
    parser.add_argument("--real", action="store_true", help="score against the ReaL labels of ImageNet")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to a file")
    arguments, settings = parse_command(parser, argv, only=SETTINGS)
    if arguments.json is not None and not arguments.json.resolve().parent.is_dir():
        raise ConfigError(f"--json is {str(arguments.json)!r}, but its folder does not exist; make it first")
    from ...transfer.evaluate import evaluate_to_table, to_json
    from ..evaluation import evaluate_sources

    results = evaluate_sources(arguments.checkpoints, settings, subset=arguments.subset, real=arguments.real)
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(evaluate_to_table(results) + "\n")
        if arguments.json is not None:
            _write(arguments.json, to_json(results) + "\n")
    return 0


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json is {str(path)!r}, which cannot be written: {error.strerror}") from error
