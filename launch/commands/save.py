"""`graftvit save SOURCE DIR`: write one model as a folder that timm loads."""

from __future__ import annotations

from pathlib import Path

from ...models.errors import ConfigError
from ..flags import SOURCE_HELP, SOURCE_SETTINGS, command_parser, keywords_of, parse_command
from ..say import say

DTYPES = ("float32", "bfloat16", "float16", "float64")


def run(argv: list[str]) -> int:
    """Write the model of any source to a folder, without teacher, optimizer, average or pickle."""
    parser = command_parser(
        "save",
        "Write the model of a run, or of any other source, to its own folder: safetensors and config.json. Plain timm "
        "loads it as local-dir:DIR; graftvit.load loads models whose attention is converted or copied.",
        [
            "graftvit save runs/distill student",
            "graftvit save runs/distill#ema student --dtype bfloat16",
            "graftvit save runs/distill/checkpoints/best.safetensors#ema student --max_shard_size 2GB",
            "graftvit save mae_finetuned_vit_base.pth mae_vit_base",
            "graftvit save runs/copy student --bare",
        ],
        usage="SOURCE DIR [--flag value ...]",
    )
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("folder", metavar="DIR", type=Path, help="a new folder")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="dtype of the weights (default: float32)"
    )
    parser.add_argument(
        "--max_shard_size",
        default="5GB",
        metavar="SIZE",
        help="split larger weights into several files (default: 5GB)",
    )
    parser.add_argument(
        "--bare",
        action="store_true",
        help="for a student that copies attention: write only its own weights; their own attention is untrained",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing model folder")
    arguments, settings = parse_command(parser, argv, only=SOURCE_SETTINGS)
    how = keywords_of(settings)
    import torch

    from ...checkpoints.student import save_student

    folder = save_student(
        arguments.source,
        arguments.folder,
        dtype=getattr(torch, arguments.dtype),
        max_shard_size=_size(arguments.max_shard_size),
        overwrite=arguments.force,
        bare=arguments.bare,
        **how,
    )
    for path in sorted(folder.iterdir()):
        say(f"{path}  {path.stat().st_size:,} bytes\n")
    say(_how_to_load(folder))
    if arguments.bare:
        from ...checkpoints.copying_students import BARE_WORDS

        say(f"{folder} is {BARE_WORDS}\n")
    return 0


def _size(text: str) -> str:
    """Return the size as huggingface_hub takes it. Raises ConfigError for any other text."""
    number = text.upper().removesuffix("B").rstrip("KMGT")
    unit = text.upper()[len(number) :]
    if not number.isdigit() or unit not in ("KB", "MB", "GB", "TB") or int(number) == 0:
        raise ConfigError(f"--max_shard_size is {text!r}; write a number with KB, MB, GB or TB, such as 5GB")
    return number + unit


def _how_to_load(folder: Path) -> str:
    from ...checkpoints.model_folders import loads_in_plain_timm

    if loads_in_plain_timm(folder):
        return f'load it: timm.create_model("local-dir:{folder}", pretrained=True)\n'
    return f'load it: graftvit.load("{folder}")\n'
