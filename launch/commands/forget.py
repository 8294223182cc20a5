"""`graftvit forget`: take runs out of the list that `graftvit jobs` shows."""

from __future__ import annotations

from ...models.errors import ConfigError
from ..flags import command_parser, run_folder
from ..say import say

EXAMPLES = (
    "graftvit forget /scratch/me/distill     # not shown by `graftvit jobs` any more",
    "graftvit forget --ended                 # all whose jobs have ended",
)


def run(argv: list[str]) -> int:
    """Forget runs."""
    from ..slurm.forgetting import forget_ended, forget_run

    parser = command_parser(
        "forget",
        "Take runs out of the list of `graftvit jobs`. Their folders stay as they are, and `graftvit jobs RUN` shows "
        "them; submitted or resumed again, they are back in the list. A run with a job stays.",
        EXAMPLES,
        usage="RUN ... | --ended",
    )
    parser.add_argument(
        "runs", type=run_folder, nargs="*", metavar="RUN", help="folder of a run or of a sweep"
    )
    parser.add_argument("--ended", action="store_true", help="all runs in the list that have no job")
    arguments = parser.parse_args(argv)
    if bool(arguments.runs) == arguments.ended:
        raise ConfigError(
            "which runs to forget is not clear: name runs, or give --ended for all that have no job"
        )
    for folder in arguments.runs:
        forget_run(folder)
    forgotten = forget_ended() if arguments.ended else arguments.runs
    say("".join(f"forgotten: {folder}\n" for folder in forgotten) or "no run in the list has ended\n")
    return 0
