"""`graftvit forget`: remove runs from the list that `graftvit jobs` shows."""

from __future__ import annotations

from ...models.errors import ConfigError
from ..flags import command_parser, run_folder
from ..say import say

EXAMPLES = (
    "graftvit forget /scratch/me/distill     # `graftvit jobs` no longer lists it",
    "graftvit forget --ended                 # all runs whose jobs have ended",
)


def run(argv: list[str]) -> int:
    """Forget runs."""
    from ..slurm.forgetting import forget_ended, forget_run

    parser = command_parser(
        "forget",
        "Remove runs from the list of `graftvit jobs`. Their folders do not change; `graftvit jobs RUN` shows them. "
        "A run returns to the list when it is submitted or resumed. A run that has a job cannot be removed.",
        EXAMPLES,
        usage="RUN ... | --ended",
    )
    parser.add_argument(
        "runs", type=run_folder, nargs="*", metavar="RUN", help="folder of a run or of a sweep"
    )
    parser.add_argument("--ended", action="store_true", help="all runs in the list that have no job")
    arguments = parser.parse_args(argv)
    if bool(arguments.runs) == arguments.ended:
        raise ConfigError("give either the runs to forget, or --ended for all runs that have no job")
    for folder in arguments.runs:
        forget_run(folder)
    forgotten = forget_ended() if arguments.ended else arguments.runs
    say("".join(f"forgotten: {folder}\n" for folder in forgotten) or "no run in the list has ended\n")
    return 0
