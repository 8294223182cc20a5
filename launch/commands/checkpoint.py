"""`graftvit checkpoint info | inspect | strip | convert | save`: handle weights of any origin."""

from __future__ import annotations

from pathlib import Path

from ...models.errors import ConfigError
from ..flags import (
    SOURCE_HELP,
    SOURCE_SETTINGS,
    Action,
    command_parser,
    keywords_of,
    parse_command,
    run_action,
)
from ..say import say

EXAMPLES = (
    "graftvit checkpoint info vit_large_patch16_224.mae",
    "graftvit checkpoint info mae_finetuned_vit_base.pth --model vit_base_patch16_224",
    "graftvit checkpoint info hf-hub:facebook/dinov2-base",
    "graftvit checkpoint info runs/pretrain#ema",
    "graftvit checkpoint inspect dino_vitsmall16_pretrain_full_checkpoint.pth",
    "graftvit checkpoint strip dino_full.pth backbone.pth --part teacher",
    "graftvit checkpoint convert mae_pretrain_vit_base.pth mae.safetensors",
    "graftvit checkpoint convert vit.onnx vit.safetensors",
    "graftvit checkpoint convert runs/distill/checkpoints/best.safetensors ema.safetensors --part ema",
    "graftvit checkpoint save runs/distill student",
    "graftvit checkpoint save runs/distill#ema student --dtype bfloat16",
    "graftvit checkpoint save runs/distill/checkpoints/best.safetensors#ema student --max_shard_size 2GB",
    "graftvit checkpoint save mae_finetuned_vit_base.pth mae_vit_base",
    "graftvit checkpoint save runs/copy student --bare",
    "graftvit checkpoint save converted student --standalone",
)
DTYPES = ("float32", "bfloat16", "float16", "float64")


def run(argv: list[str]) -> int:
    """Run one action."""
    return run_action("checkpoint", argv, ACTIONS, EXAMPLES)


def _info(argv: list[str]) -> int:
    """Load a source and print what is known about it."""
    parser = command_parser(
        "checkpoint info",
        "Describe a source: format, architecture, input, license, the weights that load and those that do not.",
        EXAMPLES,
        "SOURCE [--flag value ...]",
    )
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    arguments, settings = parse_command(parser, argv, only=SOURCE_SETTINGS)
    how = keywords_of(settings)
    from ...checkpoints.describe import describe_source

    text, error = describe_source(arguments.source, **how)
    say(text)
    if error is not None:
        raise error
    return 0


def _inspect(argv: list[str]) -> int:
    """Print what is in a file, without reading a tensor."""
    text = "List keys, shapes, dtypes, sizes and other content of the file."
    parser = command_parser("checkpoint inspect", text, EXAMPLES, "FILE")
    parser.add_argument(
        "file",
        metavar="FILE",
        type=Path,
        help="weights file of any container: .safetensors, torch, .npz, ONNX",
    )
    arguments = parser.parse_args(argv)
    from ...checkpoints.describe import describe_file

    say("\n".join(describe_file(arguments.file)) + "\n")
    return 0


def _strip(argv: list[str]) -> int:
    return _extract("strip", argv)


def _convert(argv: list[str]) -> int:
    return _extract("convert", argv)


def _extract(action: str, argv: list[str]) -> int:
    """Write one model of a file to another file."""
    text = f"{ACTIONS[action].does.capitalize()}."
    parser = command_parser(f"checkpoint {action}", text, EXAMPLES, "FILE OUT [--part PART] [--force]")
    parser.add_argument("file", metavar="FILE", type=Path, help="weights file, or the state of a run")
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="the file to write; its suffix chooses the container"
    )
    text = "model to write (default: the one that loads)"
    parser.flag("--part", text, choices=["student", "teacher", "ema"])
    parser.switch("--force", "replace OUT if it exists")
    arguments = parser.parse_args(argv)
    if action == "convert" and arguments.out.suffix != ".safetensors":
        raise ConfigError(
            f"OUT is {str(arguments.out)!r}: convert writes a .safetensors file; strip writes others"
        )
    from ...checkpoints.describe import extract
    from ...checkpoints.report import some
    from ...checkpoints.sources import FileSource

    done = extract(FileSource(arguments.file, arguments.part), arguments.out, overwrite=arguments.force)
    say(f"{done.path}  {done.tensors} tensors, {done.nbytes:,} bytes\n")
    if done.left_out:
        say(f"left out: {some(done.left_out, 8)}\n")
    return 0


def _save(argv: list[str]) -> int:
    """Write the model of any source to a folder, without teacher, optimizer, average or pickle."""
    parser = command_parser(
        "checkpoint save",
        "Write the model of a run, or of any other source, to its own folder: safetensors and config.json. Plain timm "
        "loads it as local-dir:DIR; graftvit.load loads models whose attention is converted or copied.",
        EXAMPLES,
        "SOURCE DIR [--flag value ...]",
    )
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("folder", metavar="DIR", type=Path, help="a new folder")
    parser.flag("--dtype", "dtype of the weights", choices=DTYPES, default="float32")
    parser.flag("--max_shard_size", "split larger weights into several files", default="5GB", metavar="SIZE")
    parser.switch(
        "--bare",
        "for a student that copies attention: write only its own weights; their own attention is untrained",
    )
    parser.switch(
        "--standalone",
        "also write modeling_graftvit.py, which loads the model where graftvit is not installed",
    )
    parser.switch("--force", "replace an existing model folder")
    arguments, settings = parse_command(parser, argv, only=SOURCE_SETTINGS)
    how = keywords_of(settings)
    import torch

    from ...checkpoints.student import save

    folder = save(
        arguments.source,
        arguments.folder,
        dtype=getattr(torch, arguments.dtype),
        max_shard_size=_parse_size(arguments.max_shard_size),
        overwrite=arguments.force,
        bare=arguments.bare,
        standalone=arguments.standalone,
        **how,
    )
    for path in sorted(folder.iterdir()):
        say(f"{path}  {path.stat().st_size:,} bytes\n")
    say(_describe_loading(folder))
    if arguments.standalone:
        say(f'without graftvit, in {folder}: from modeling_graftvit import load; load("{folder}")\n')
    if arguments.bare:
        from ...checkpoints.copying_students import BARE_WORDS

        say(f"{folder} is {BARE_WORDS}\n")
    return 0


def _parse_size(text: str) -> str:
    """Return the size as huggingface_hub takes it. Raises ConfigError for any other text."""
    number = text.upper().removesuffix("B").rstrip("KMGT")
    unit = text.upper()[len(number) :]
    if not number.isdigit() or unit not in ("KB", "MB", "GB", "TB") or int(number) == 0:
        raise ConfigError(f"--max_shard_size is {text!r}; write a number with KB, MB, GB or TB, such as 5GB")
    return number + unit


def _describe_loading(folder: Path) -> str:
    from ...checkpoints.dense_models import find_dense
    from ...checkpoints.model_folders import loads_in_plain_timm

    if find_dense(f"local-dir:{folder}") is None and loads_in_plain_timm(folder):
        return f'load it: timm.create_model("local-dir:{folder}", pretrained=True)\n'
    return f'load it: graftvit.load("{folder}")\n'


ACTIONS = {
    "info": Action("describe a source, and check whether its weights fit", _info),
    "inspect": Action("list keys, shapes, dtypes and other content of a file; no tensor is read", _inspect),
    "strip": Action("write one model of a file: no teacher, optimizer, average or settings", _strip),
    "convert": Action("write one model of a file as a .safetensors file", _convert),
    "save": Action("write one model, from a run or any other source, as a folder that timm loads", _save),
}
