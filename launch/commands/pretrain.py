"""`graftvit pretrain`: pretrain a teacher by masked autoencoding."""

from __future__ import annotations

from ..load_config import Setting
from .train import run_parsed, train_parser

EXAMPLES = (
    "graftvit pretrain --dataset torch/cifar10 --data_path /data/cifar --model vit_small_patch16_224 "
    "--img_size 32 student.model_args.patch_size=4 --epochs 400",
    "graftvit pretrain mine.yaml --mask_ratio 0.6 --dry_run",
)


def run(argv: list[str]) -> int:
    """Run `graftvit train --mode pretrain`, with its own help and examples."""
    parser = train_parser(
        "pretrain",
        "Pretrain a vision transformer by masked autoencoding (MAE), without labels. To use it as a teacher, pass "
        "--teacher local-dir:RUN/student.",
        EXAMPLES,
    )
    return run_parsed(parser, argv, [Setting("mode", "pretrain", "graftvit pretrain")])
