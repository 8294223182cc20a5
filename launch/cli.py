"""The `graftvit` command: choose the subcommand, and turn its errors and signals into exit codes."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from ..models.errors import ConfigError, GraftError, did_you_mean, loader_deaths
from .say import log_plainly
from .submitted import SUBMITTED, Interrupted, ended_by_signals

GROUPS = {
    "start": {
        "demo": "pretrain a small teacher on digits, transfer its attention, write a report; minutes on a CPU",
        "list": "list the recipes, the operators that a plan can name, and the schema of YAML files",
        "completion": "print a script with which bash, zsh or fish completes commands, flags and recipes",
        "data": "describe a data set, and draw training images as the model sees them",
    },
    "train": {
        "train": "train a student: transfer a teacher's attention, fine-tune, pretrain, or start from scratch",
        "convert": "replace the attention of a model by a plan, and write the folder that recovery starts from",
        "hybrid": "choose the attention of each layer of a teacher, so that it errs least at the cost that you allow",
        "compare": "compare many attention operators on one teacher and one budget: accuracy, cost, tables, plots",
        "reproduce": "published numbers: their recipes and cost, small surrogates, and rows of runs to verify",
    },
    "models": {
        "checkpoint": "describe a source of weights; inspect, strip, convert and save weights",
        "programs": "draw and check attention programs, search for them, and benchmark them",
        "export": "write a model as an ONNX or torch.export file, checked against the model",
        "deploy": "write a classifier as a file of another runtime, and refuse one that loses accuracy",
        "push": "publish a student on the Hugging Face hub, with its card and its license",
    },
    "cluster": {
        "submit": "run a training, a sweep, a comparison or another long command on a SLURM cluster",
        "jobs": "show the runs on a cluster; print their logs, stop, resume and summarize them",
    },
    "analyze": {
        "evaluate": "measure top-1, top-5 and loss of one or more checkpoints, and of their ensemble",
        "visualize": "draw attention over images, rollout and numbers by layer, in a page to click through",
        "benchmark": "measure speed, memory and cost of operators and models against fused softmax",
    },
}
COMMANDS = {name: what for group in GROUPS.values() for name, what in group.items()}
DISTRIBUTED = ("train", "evaluate")
"""Commands that several processes can run together."""
ALONE = ("compare", "demo", "reproduce", *(command for command in SUBMITTED if command not in DISTRIBUTED))
"""Commands that run in one process. Several processes would each run the whole command."""
HARMLESS = (
    r"torch\.searchsorted\(\): input value tensor is non-contiguous",
    "Using a non-tuple sequence for multi",
    r"FSDP2-wrapped module \(\w+\) returned a view tensor",
    "torch.distributed is disabled, unavailable or uninitialized",
)
"""Beginnings of torch's warnings: timm resamples a relative position bias; a sharded block of Swin returns a view,
which nothing changes in place; and one process reads the state of several."""
SAVING = ("train",)
"""Commands that save their state before a signal stops them."""


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 on success; 1 if the command fails while it runs; 2 for a mistake of the user; 128 + the number of the
        signal that stopped the command.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        _check_here()
        return dispatch(words)
    except GraftError as error:
        sys.stderr.write(f"graftvit: {_rank()}error: {error}\n")
        return error.exit_code
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            # the reader of the output closed the pipe (`graftvit list recipes | head`): Python must not flush into it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        if error.filename is None:
            raise
        sentence = GraftError(f"{error.filename}: {error.strerror or error}")
        sys.stderr.write(f"graftvit: {_rank()}error: {sentence}\n")
        return 1
    except RuntimeError as error:
        from .slurm.failures import classify

        if not _rank() or classify(error, saved=False)[0] != "consequence":
            raise
        said = "another process of this run has ended or does not answer: see its log; torch says"
        sentence = GraftError(f"{said}: {error}")
        sys.stderr.write(f"graftvit: {_rank()}error: {sentence}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("graftvit: stopped by Ctrl-C\n")
        return 130


def _check_here() -> None:
    try:
        Path.cwd()
    except OSError as error:
        raise ConfigError(
            f"the current folder does not exist ({error.strerror}): change to one that does"
        ) from error


def dispatch(words: list[str]) -> int:
    """Run one command as `main` does, but raise its errors."""
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(_overview())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        sys.stdout.write(f"graftvit {_version()}\n")
        return 0
    if words[0] not in COMMANDS:
        raise ConfigError(f"unknown command {words[0]!r}; {did_you_mean(words[0], COMMANDS)}")
    _log(words[0])
    if words[0] in DISTRIBUTED:
        from .launcher import prepare_process

        prepare_process()
    elif words[0] in ALONE:
        from .launcher import refuse_several

        refuse_several(words[0])
    if words[0] in SAVING:
        from ..transfer.engine.early_signals import remembering

        with remembering():  # before torch is loaded
            return _run(words)
    if words[0] in SUBMITTED:
        try:
            with ended_by_signals():
                return _run(words)
        except Interrupted as told:
            return 128 + int(told.args[0])
    return _run(words)


def _run(words: list[str]) -> int:
    run: Callable[[list[str]], int] = importlib.import_module(f".commands.{words[0]}", __package__).run
    try:
        with loader_deaths():
            return run(words[1:])
    except SystemExit as leaving:  # argparse leaves this way after --help
        return int(leaving.code or 0)


def _log(command: str) -> None:
    """Write log messages to stderr: progress of long commands from the first process, warnings from all."""
    log_plainly(logging.WARNING)
    for words in HARMLESS:
        warnings.filterwarnings("ignore", words, UserWarning)
    reports = command in ("train", "data", "export") and os.environ.get("RANK", "0") == "0"
    logging.getLogger("graftvit").setLevel(logging.INFO if reports else logging.WARNING)
    # if the hub cannot be reached, one error is enough; its client would warn at each of its ten attempts
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = []
    for group, commands in GROUPS.items():
        lines += [f"{group}:", *(f"  {name:<{width}}  {what}" for name, what in commands.items()), ""]
    return "\n".join(
        [
            "usage: graftvit COMMAND ...",
            "",
            "Make one vision transformer attend like another.",
            "",
            *lines,
            "`graftvit COMMAND --help` explains a command. Start with:",
            "  graftvit demo --quick",
            "  graftvit train attention_distill_vit_large --data_path /data/imagenet --dry_run",
            "",
        ]
    )


def _rank() -> str:
    """Return a prefix that names this process, or an empty text for a single process."""
    return f"rank {os.environ.get('RANK', '0')}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""


def _version() -> str:
    from importlib.metadata import version

    return version("graftvit")


if __name__ == "__main__":
    sys.exit(main())
