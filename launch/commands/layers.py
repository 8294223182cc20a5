"""`graftvit layers STUDENT`: find the layers of a converted student to keep as softmax, and what each choice costs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ...models.errors import ConfigError
from ...transfer.analysis.report.tables import aligned
from ..flags import SOURCE_HELP, command_parser, parse_command, whole
from ..load_config import load_config
from ..say import say
from ..submitted import Work, check_here

if TYPE_CHECKING:
    from torch import nn

    from ...transfer.config import RunConfig
    from ...transfer.layer_search import LayerSearch

EXAMPLES = (
    "graftvit layers runs/linear/1-align/student --teacher vit_base_patch16_224.mae --data_path /data/imagenet",
    "graftvit layers local-dir:converted --teacher runs/teacher/student --keep 2 --dataset digits --batches 4",
)


def run(argv: list[str]) -> int:
    """Search, and print each choice with its layer plan."""
    arguments, config = _parse(argv)
    from ...transfer.align import calibration_batches
    from ...transfer.engine.fit_operators import stage_together
    from ...transfer.layer_search import search_layers

    config = config.model_copy(update={"data": stage_together(config.data, None)})
    teacher, student, batches = calibration_batches(config, arguments.student, arguments.batches)
    say(_format_table(search_layers(teacher, student, batches, arguments.keep), teacher, student))
    return 0


def check(argv: list[str], *, here: bool = True) -> Work:
    """Check the arguments and, with `here`, the models and the images."""
    arguments, config = _parse(argv)
    if here:
        check_here(arguments.student, str(config.teacher.source), data=config.data)
    return Work(workers=config.data.workers)


def _parse(argv: list[str]) -> tuple[argparse.Namespace, RunConfig]:
    parser = command_parser(
        "layers",
        "Find the layers of a converted student that should be the teacher's again. The search is greedy: each "
        "step takes the layer that brings the final tokens nearest to the teacher's on training images. Nothing is "
        "trained.",
        EXAMPLES,
        usage="STUDENT --teacher SOURCE [--flag value ...]",
    )
    parser.add_argument("student", metavar="STUDENT", help=SOURCE_HELP)
    parser.flag("--keep", "how many layers", type=whole(1), default=3, metavar="K")
    parser.flag("--batches", "batches of images", type=whole(1), default=2, metavar="N")
    arguments, settings = parse_command(parser, argv, only=("teacher", "data", "seed"))
    config = load_config(None, settings)
    if config.teacher.source is None:
        raise ConfigError("--teacher is missing: give the model that the student was converted from")
    return arguments, config


def _format_table(found: LayerSearch, teacher: nn.Module, student: nn.Module) -> str:
    from ...models.cost import attention_macs

    before, after = attention_macs(teacher), attention_macs(student)
    total = sum(after)
    rows = [["kept", "error", "attention MACs", "plan"]]
    rows += [["none", f"{found.error:.4f}", f"{total:,}", found.plan_keeping(0)]]
    for count, choice in enumerate(found.kept, start=1):
        total += before[choice.layer] - after[choice.layer]
        rows.append([str(choice.layer), f"{choice.error:.4f}", f"{total:,}", found.plan_keeping(count)])
    note = (
        "error: of the final tokens, relative to the teacher's; MACs: for the attention maps of one image\n"
    )
    return aligned(rows, right=(0, 1, 2)) + note
