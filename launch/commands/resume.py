"""`graftvit resume`: submit a run again from where it stands, or the cells of a sweep that did not finish."""

from __future__ import annotations

from pathlib import Path

from ..flags import command_parser
from ..say import say

EXAMPLES = (
    "graftvit resume /scratch/me/distill",
    "graftvit resume /scratch/me/distill --nodes 4 --time 1-00:00:00    # on fewer nodes, the same global batch",
    "graftvit resume /scratch/me/distill --nodes 2 --dry_run            # how the batch would be shared",
    "graftvit resume /scratch/me/sweep                                  # the cells that failed or were stopped",
)


def run(argv: list[str]) -> int:
    """Submit again what was submitted."""
    from ..slurm.flags import add_cluster_flags, cluster_of
    from ..slurm.resume import find_unfinished, resume

    parser = command_parser(
        "resume",
        "Submit a run again with the settings that it has, from its last state. Of a sweep, those cells that have "
        "neither finished nor a job. What is asked of the cluster is as before where no flag says otherwise; the code "
        "is the one that is installed now.",
        EXAMPLES,
        usage="RUN [--flag value ...]",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, or the folder of a sweep")
    parser.add_argument(
        "--dry_run", action="store_true", help="print the plan and the sbatch script and stop"
    )
    add_cluster_flags(parser)
    arguments = parser.parse_args(argv)
    unfinished = find_unfinished(arguments.run)
    config = cluster_of(arguments, unfinished.resources)
    say(resume(unfinished, config, unchecked=arguments.unchecked, dry_run=arguments.dry_run))
    return 0
