"""`graftvit submit`: check a run, a sweep or a comparison, show it, or give it to the cluster."""

from __future__ import annotations

from ..flags import command_parser, parse_command
from ..say import say

EXAMPLES = (
    "graftvit submit attention_distill_vit_large --data_path /data/imagenet --output_dir /scratch/me/distill "
    "--nodes 8 --gpus_per_node 8 --time 3-00:00:00",
    "graftvit submit mine.yaml --nodes 2 --gpus_per_node 4 --partition gpu --dry_run",
    "graftvit submit mine.yaml --sweep 'transfer.layers=first:6,first:12,last:12' --sweep 'seed=0..4'",
    "graftvit submit digits_compare --gpus_per_node 0 --output_dir /scratch/me/compare",
    "graftvit submit mine.yaml --cluster local --gpus_per_node 2",
)
DESCRIPTION = (
    "Submit a run to SLURM. It saves and is requeued when it is preempted, at its time limit and when a node dies, and "
    "its result is that of a run which nothing disturbed. `graftvit jobs`, `logs`, `stop` and `resume` go on from here."
)


def run(argv: list[str]) -> int:
    """Check, show or submit."""
    from ..slurm.flags import add_cluster_flags, asked_by
    from ..slurm.layers import describe

    usage = "[RECIPE_OR_YAML] [--flag value ...] [section.key=value ...]"
    parser = command_parser("submit", DESCRIPTION, EXAMPLES, usage)
    parser.add_argument("recipe", nargs="?", metavar="RECIPE_OR_YAML", help="as for `graftvit train`")
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="KEY=VALUES",
        help="run a setting with each value, as an array of jobs: a,b,c or 0..4; several make all combinations",
    )  # fmt: skip
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print the plan, what is asked of the cluster and the sbatch script, then what is wrong with it, and stop",
    )
    add_cluster_flags(parser)
    arguments, settings = parse_command(parser, argv)
    from ..slurm.requests import plan_run

    asked = asked_by(arguments)
    config = asked.config()
    plan = plan_run(arguments.recipe, settings, arguments.sweep)
    from ..slurm.preview import preview
    from ..slurm.submission import check, send

    if arguments.dry_run:
        shown = preview(plan, config, unchecked=arguments.unchecked)
        say(f"{describe(asked)}\n{shown.text}")
        if shown.problem is not None:
            raise shown.problem
        return 0
    check(plan, config, unchecked=arguments.unchecked)
    say(send(plan, config, unchecked=arguments.unchecked))
    return 0
