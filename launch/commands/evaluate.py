"""`graftvit evaluate`: measure checkpoints, one by one and as an ensemble."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, cast

from ...models.errors import ConfigError, did_you_mean
from ..flags import SOURCE_SETTINGS, command_parser, output_file, parse_command
from ..say import say
from ..submitted import Work

if TYPE_CHECKING:
    from ...transfer.metrics.measure import Family
    from ..evaluation import Evaluation

EXAMPLES = (
    "graftvit evaluate runs/distill --data_path /data/imagenet",
    "graftvit evaluate runs/distill runs/finetune --data_path /data/imagenet --json ensemble.json",
    "graftvit evaluate runs/distill#ema --data_path /data/imagenet-a --subset imagenet-a",
    "graftvit evaluate vit_base_patch16_224.augreg_in1k --data_path /data/imagenet --real",
    "graftvit evaluate mae_finetuned_vit_base.pth --data_path /data/imagenet --batch_size 128",
    "graftvit evaluate vit_base_patch16_224.mae --data_path /data/imagenet --metrics knn,probe",
    "graftvit evaluate vit_small_patch14_dinov2 runs/linear --dataset ade20k --data_path /data/ade --metrics seg_knn",
    "graftvit evaluate runs/detector runs/linear --data_path /data/coco",
    "graftvit evaluate runs/align --against deit_base_patch16_224.fb_in1k --data_path /data/photographs",
)
DATA = (
    "dataset", "data_path", "stage", "train_split", "val_split", "download", "num_classes", "train_samples",
    "label_seed", "val_samples", "batch_size", "eval_batch_size", "workers", "interpolation", "crop_pct", "crop_mode",
    "max_bad_images",
)  # fmt: skip
SETTINGS = (
    *(f"data.{name}" for name in DATA),
    *SOURCE_SETTINGS,
    "dense.short",
    "dense.long",
    "imports",
    "engine.device",
    "engine.precision",
)
"""The settings that an evaluation uses."""


def run(argv: list[str]) -> int:
    """Evaluate each checkpoint and the ensemble of several."""
    arguments, asked = _parse(argv)
    from ...checkpoints.atomic import write_text
    from ...transfer.metrics.measure import to_json, to_table
    from ..evaluation import RANDOM, evaluate

    notes: list[str] = []
    results = evaluate(asked, notes.append)
    if os.environ.get("RANK", "0") == "0":
        say("\n".join([to_table(results), *notes]) + "\n")
        if asked.against is not None:
            say(f"\n{RANDOM}: random weights of {asked.against}'s architecture, which learned nothing\n")
        if arguments.json is not None:
            write_text(arguments.json, to_json(results) + "\n")
    return 0


def check(argv: list[str], *, here: bool = True) -> Work:
    """Check the arguments and, with `here`, the data, without loading a model."""
    arguments, asked = _parse(argv)
    return Work(arguments.json, asked.check(here=here).workers)


def _parse(argv: list[str]) -> tuple[argparse.Namespace, Evaluation]:
    parser = command_parser(
        "evaluate",
        "Measure top-1, top-5 and loss of a model's head, weighted nearest neighbors and a linear probe on its "
        "features, and distances from a teacher; exact for any number of processes. Several checkpoints also give an "
        "ensemble: the mean of their heads' probabilities. A detector is measured by average precision, a segmenter "
        "by the mean intersection over union. The data settings of a run folder are used; flags replace them.",
        EXAMPLES,
        usage="CHECKPOINT [CHECKPOINT ...] [--flag value ...]",
    )
    parser.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT", help="run folder, student folder or teacher source"
    )
    text = (
        "any of top1, knn, probe, distance, joined by commas (default: top1 for a model with a head, else knn; "
        "distance with --against); of a data set with labeled pixels, seg_knn and seg_probe"
    )
    parser.flag("--metrics", text, metavar="NAMES")
    parser.flag("--against", "the model to measure distances from", metavar="TEACHER")
    parser.flag("--subset", "score only the classes of this variant", choices=["imagenet-a", "imagenet-r"])
    parser.switch("--real", "score against the ReaL labels of ImageNet")
    parser.flag("--json", "also write the numbers to a file", type=output_file, metavar="FILE")
    arguments, settings = parse_command(parser, argv, only=SETTINGS)
    from ..evaluation import Evaluation

    metrics = _parse_metrics(arguments.metrics)
    more = (arguments.against, arguments.subset, arguments.real)
    return arguments, Evaluation(arguments.checkpoints, settings, metrics, *more)


def _parse_metrics(text: str | None) -> list[Family]:
    from ...transfer.metrics.measure import FAMILIES

    names = [] if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in FAMILIES:
            raise ConfigError(
                f"--metrics is {text!r}, and {name!r} is not a metric; {did_you_mean(name, FAMILIES)}"
            )
    return cast("list[Family]", names)
