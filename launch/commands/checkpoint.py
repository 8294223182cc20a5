"""`graftvit checkpoint inspect | strip | convert`: handle weights files of any origin."""

from __future__ import annotations

from pathlib import Path

from ...models.errors import ConfigError
from ..flags import Parser, command_parser, run_action
from ..say import say

ACTIONS = {
    "inspect": "list keys, shapes, dtypes, sizes and other content of the file; no tensor is read",
    "strip": "write the weights of one model only: no teacher, optimizer, average or settings",
    "convert": "do the same, and write a .safetensors file",
}
EXAMPLES = (
    "graftvit checkpoint inspect dino_vitsmall16_pretrain_full_checkpoint.pth",
    "graftvit checkpoint strip dino_full.pth backbone.pth --part teacher",
    "graftvit checkpoint convert mae_pretrain_vit_base.pth mae.safetensors",
    "graftvit checkpoint convert vit.onnx vit.safetensors",
    "graftvit checkpoint convert runs/distill/checkpoints/best.safetensors ema.safetensors --part ema",
)


def run(argv: list[str]) -> int:
    """Inspect, strip or convert one file."""
    return run_action(argv, ACTIONS, _parser, _run_one)


def _run_one(action: str, argv: list[str]) -> int:
    return _inspect(argv) if action == "inspect" else _extract(action, argv)


def _parser(action: str, description: str) -> Parser:
    usage = {"inspect": "FILE", "": "ACTION FILE …"}.get(action, "FILE OUT [--part PART] [--force]")
    examples = [example for example in EXAMPLES if f" {action}" in example]
    return command_parser(f"checkpoint {action}".strip(), description, examples, usage=usage)


def _inspect(argv: list[str]) -> int:
    parser = _parser("inspect", ACTIONS["inspect"])
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


def _extract(action: str, argv: list[str]) -> int:
    parser = _parser(action, ACTIONS[action])
    parser.add_argument("file", metavar="FILE", type=Path, help="weights file, or the state of a run")
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="the file to write; its suffix chooses the container"
    )
    parser.add_argument(
        "--part", choices=["student", "teacher", "ema"], help="model to write (default: the one that loads)"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
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
