"""The `graftvit` command: which subcommand, and how its errors and signals end."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from ..models.errors import ConfigError, GraftError, did_you_mean
from .say import log_plainly
from .submitted import SUBMITTED, Interrupted, ended_by_signals

COMMANDS = {
    "demo": "pretrain a small teacher on digits, transfer its attention, write a report; minutes on a CPU",
    "train": "train a student: transfer a teacher's attention, fine-tune, or start from scratch",
    "submit": "give a run, a sweep, a comparison or another long command to a SLURM cluster, where it survives",
    "jobs": "how the runs on a cluster are: state, restarts and why, nodes, progress, time left, errors",
    "logs": "`graftvit logs RUN --follow`: what the processes of a run write",
    "stop": "`graftvit stop RUN`: a running job saves and ends, a waiting one is cancelled",
    "resume": "`graftvit resume RUN`: submit a run again from where it stands, on other nodes if you like",
    "forget": "`graftvit forget RUN`: take a run out of the list of `graftvit jobs`; its folder stays",
    "pretrain": "make a teacher by masked autoencoding, without labels",
    "evaluate": "top-1, top-5 and loss of one or more checkpoints, and of their ensemble",
    "data": "what a data set holds, and a picture of training images as the model sees them",
    "teacher": "`graftvit teacher info SOURCE`: what a teacher is, and whether its weights fit",
    "push": "publish a student on the Hugging Face hub, with its card and its licence",
    "convert": "give a model other attention by a plan, and write the folder that recovery starts from",
    "operators": "what a plan can name: the attention operators, their options, what they are and cost",
    "save": "one model alone, from a run or any other source, as a folder that timm loads",
    "checkpoint": "`graftvit checkpoint inspect | strip | convert FILE`: other people's files of weights",
    "export": "a model as an ONNX or torch.export file, checked against the model",
    "layers": "which layers of a converted student to keep as softmax, and what each choice costs",
    "benchmark": "`graftvit benchmark operators | models`: speed, memory and cost against fused softmax",
    "compare": "one teacher, many attention operators, the same budget: accuracy and cost in tables and plots",
    "summary": "what a sweep came to: mean ± std over seeds as CSV, Markdown and a plot",
    "visualize": "look inside: attention over images, rollout, numbers by layer, a page to click through",
    "recipes": "list the recipes that come with the package, or print one",
}
DISTRIBUTED = ("train", "pretrain", "evaluate")
"""Commands that several processes run together."""
ALONE = ("compare", "demo", *(command for command in SUBMITTED if command not in DISTRIBUTED))
"""Commands that are one process, and would be several side by side in several."""
SAVING = ("train", "pretrain")
"""Commands that a signal stops after a save."""


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 when done; 1 for a failure while running; 2 for a mistake in what was asked; 128 + the number of the
        signal that stopped it.
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
            # the reader of our output has left (`graftvit recipes | head`); python must not flush into it at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        if error.filename is None:
            raise
        sentence = GraftError(f"{error.filename}: {error.strerror or error}")
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
            f"the current folder is not there ({error.strerror}): change to one that is"
        ) from error


def dispatch(words: list[str]) -> int:
    """One command, as `main` runs it; its errors are raised."""
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
        from .slurm.environment import prepare_process

        prepare_process()
    elif words[0] in ALONE:
        from .slurm.environment import refuse_several

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
        return run(words[1:])
    except SystemExit as leaving:  # argparse leaves this way after --help
        return int(leaving.code or 0)


def _log(command: str) -> None:
    """Messages go to stderr: what a long command tells, from its first process, and all warnings."""
    log_plainly(logging.WARNING)
    tells = command in ("train", "pretrain", "data", "export") and os.environ.get("RANK", "0") == "0"
    logging.getLogger("graftvit").setLevel(logging.INFO if tells else logging.WARNING)
    # a hub that cannot be reached ends in one error; its client would warn at each of its ten tries
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: graftvit COMMAND ...",
            "",
            "Make one vision transformer attend like another.",
            "",
            *lines,
            "",
            "`graftvit COMMAND --help` explains one. To begin with:",
            "  graftvit demo --quick",
            "  graftvit train attention_distill_vit_large --data_path /data/imagenet --dry_run",
            "",
        ]
    )


def _rank() -> str:
    """Which process speaks, where there are several."""
    return f"rank {os.environ.get('RANK', '0')}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""


def _version() -> str:
    from importlib.metadata import version

    return version("graftvit")


if __name__ == "__main__":
    sys.exit(main())
