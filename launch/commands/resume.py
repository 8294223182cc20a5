"""`graftvit resume`: submit a run again from its last state, or the unfinished cells of a sweep."""

from __future__ import annotations

from ..flags import command_parser, run_folder
from ..say import say

EXAMPLES = (
    "graftvit resume /scratch/me/distill",
    "graftvit resume /scratch/me/distill --nodes 4 --time 1-00:00:00    # on fewer nodes, the same global batch",
    "graftvit resume /scratch/me/distill --nodes 2 --dry_run            # how the batch would be shared",
    "graftvit resume /scratch/me/sweep                                  # the cells that failed or were stopped",
)


def run(argv: list[str]) -> int:
    """Submit the unfinished runs of a folder again."""
    from ..slurm.lock import stoppable
    from ..slurm.preview import preview_again
    from ..slurm.setting_layers import add_cluster_flags, asked_by, describe
    from ..slurm.stopping import find_unfinished, resume, wait_for_stops

    parser = command_parser(
        "resume",
        "Submit a run again with its own settings, from its last state. For a sweep, submit the cells that are not "
        "finished and have no job. The resources are those of the last submission, except those that flags change; "
        "the code is the one that is installed now.",
        EXAMPLES,
        usage="RUN [--flag value ...]",
    )
    parser.add_argument("run", type=run_folder, metavar="RUN", help="a run folder, or the folder of a sweep")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print the plan, the requested resources, the sbatch script and any error, and stop",
    )
    add_cluster_flags(parser)
    arguments = parser.parse_args(argv)
    with stoppable():
        if not arguments.dry_run:
            wait_for_stops(arguments.run)
        unfinished = find_unfinished(arguments.run)
        asked = asked_by(arguments, unfinished.resources)
        config = asked.config()
        if arguments.dry_run:
            shown = preview_again(unfinished, config, unchecked=arguments.unchecked)
            say(f"{describe(asked)}\n{shown.text}")
            if shown.problem is not None:
                raise shown.problem
            return 0
        say(resume(unfinished, config, unchecked=arguments.unchecked))
    return 0
