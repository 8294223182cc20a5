"""`graftvit submit`: check a run, a sweep or a comparison, and show it or submit it to the cluster."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ...checkpoints.files import is_there
from ...models.errors import ConfigError
from ..flags import command_parser, output_folder, parse_command, split_words
from ..say import hint, say
from ..submitted import SUBMITTED, command_name

if TYPE_CHECKING:
    from ..slurm.batch import Batch
    from ..slurm.request import Request

EXAMPLES = (
    "graftvit submit attention_distill_vit_large --data_path /data/imagenet --output_dir /scratch/me/distill "
    "--nodes 8 --gpus_per_node 8 --time 3-00:00:00",
    "graftvit submit mine.yaml --nodes 2 --gpus_per_node 4 --partition gpu --dry_run",
    "graftvit submit mine.yaml --sweep 'transfer.layers=first:6,first:12,last:12' --sweep 'seed=0..4'",
    "graftvit submit digits_compare --gpus_per_node 0 --output_dir /scratch/me/compare",
    "graftvit submit mine.yaml --cluster local --gpus_per_node 2",
    "graftvit submit evaluate runs/distill --data_path /data/imagenet --gpus_per_node 8",
    "graftvit submit convert runs/teacher --plan '*: linear' --calibrate 64 --dataset digits "
    "--output_dir /scratch/linear",
    "graftvit submit programs search runs/teacher --dataset digits --output_dir found --shares 4 --gpus_per_node 0",
)
DESCRIPTION = (
    "Submit a run to SLURM. It saves its state and is requeued when it is preempted, when its time limit is reached or "
    "when a node fails; its result is that of an undisturbed run. Afterwards use `graftvit jobs` and its actions.\n\n"
    "A run takes the settings of `graftvit train`; `graftvit train --help` explains them. Other commands are submitted "
    f"with their own flags, as in `graftvit submit evaluate --help`: {', '.join(SUBMITTED)}."
)
DRY_RUN = "print the plan, the requested resources, the sbatch script and any error, and stop"


def run(argv: list[str]) -> int:
    """Check the run, then show it or submit it."""
    if argv and argv[0] in SUBMITTED:
        return _submit_work(argv)
    _refuse_command(argv)
    from ..slurm.lock import stoppable
    from ..slurm.site_file import add_cluster_flags, asked_by

    usage = "[RECIPE_OR_YAML] [--flag value ...] [section.key=value ...]"
    parser = command_parser("submit", DESCRIPTION, EXAMPLES, usage)
    parser.add_argument("recipe", nargs="?", metavar="RECIPE_OR_YAML", help="as for `graftvit train`")
    text = "run each value of a setting as an array of jobs: a,b,c or 0..4; repeat it for all combinations"
    parser.add_argument("--sweep", action="append", default=[], metavar="KEY=VALUES", help=text)
    parser.switch("--dry_run", DRY_RUN)
    add_cluster_flags(parser)
    arguments, settings = parse_command(parser, argv, explain=False)
    from ..slurm.plan import plan_run

    request = asked_by(arguments)
    with stoppable():
        _check_early(arguments, request)
        batch = plan_run(arguments.recipe, settings, arguments.sweep, request)
        return show_or_send(arguments, batch)


def _refuse_command(argv: list[str]) -> None:
    """Raise ConfigError if the first word is a command that cannot be submitted, and no recipe or run of that name."""
    from ..cli import COMMANDS

    if not argv or argv[0] not in COMMANDS or is_there(argv[0]):
        return
    name = argv[0]
    if name in ("train", "compare"):
        raise ConfigError(
            f"{name} is no recipe: leave the word out, `{hint('submit', *(argv[1:] or ['RECIPE_OR_YAML']))}`"
        )
    raise ConfigError(f"`graftvit {name}` cannot be submitted; a recipe can, and {', '.join(SUBMITTED)}")


def _submit_work(argv: list[str]) -> int:
    """Submit a command that is not a run. Flags that do not belong to the cluster belong to the command."""
    from ..slurm.lock import stoppable
    from ..slurm.site_file import add_cluster_flags, asked_by

    command = command_name(argv)
    parser = command_parser(
        f"submit {command}",
        f"Submit `graftvit {command}` to SLURM, with its own flags (`graftvit {command} --help`). They are checked "
        "before the job is submitted; relative paths start from the current folder. A restarted job starts from "
        "the beginning, except for the layers and cells that `convert` and `programs search` keep.",
        EXAMPLES,
        usage=f"ARGUMENTS OF `graftvit {command}` [--flag of the cluster ...]",
    )
    text = f"folder of the job for `graftvit jobs` (default: runs/{command.split()[-1]}-NAME)"
    parser.flag("--job_dir", text, type=output_folder, metavar="DIR")
    text = "divide the work among N jobs of an array, of `programs search` or `hybrid`"
    parser.flag("--shares", text, type=int, default=1, metavar="N")
    parser.switch("--dry_run", "print the sbatch script and stop")
    add_cluster_flags(parser)
    own, words = split_words(parser, argv)
    arguments = parser.parse_args(own)
    from ..slurm.plan import describe_work, plan_work

    request = asked_by(arguments)
    with stoppable():
        _check_early(arguments, request)
        shares, unchecked = arguments.shares, arguments.unchecked
        batch = plan_work(words, arguments.job_dir, request, shares=shares, unchecked=unchecked)
        return show_or_send(arguments, batch, describe_work(batch))


def _check_early(arguments: argparse.Namespace, request: Request) -> None:
    """Refuse before what is slow; a dry run shows the script even if this check would fail."""
    from ..slurm.submit import check_early

    if not arguments.dry_run and not arguments.unchecked:
        check_early(request)


def show_or_send(arguments: argparse.Namespace, batch: Batch, before: str = "") -> int:
    """Show or submit the batch, after printing `before`."""
    from ..slurm.site_file import describe
    from ..slurm.submit import check, preview, send

    if arguments.dry_run:
        text, problem = preview(batch, unchecked=arguments.unchecked)
        say(f"{describe(batch.request)}\n{before}{text}")
        if problem is not None:
            raise problem
        return 0
    check(batch, unchecked=arguments.unchecked)
    say(before + send(batch))
    return 0
