"""`graftvit stop`: end a run early, so that it can go on later."""

from __future__ import annotations

from ..flags import command_parser, run_folder
from ..say import say, say_aside

EXAMPLES = (
    "graftvit stop /scratch/me/distill          # saves at the next step, then ends; not requeued",
    "graftvit stop /scratch/me/distill --now    # ends at once, with what was saved before",
    "graftvit stop /scratch/me/sweep            # all cells that wait or run",
)


def run(argv: list[str]) -> int:
    """Stop what waits or runs."""
    from ..slurm.jobs import describe_runs, run_folders
    from ..slurm.stopping import stop

    parser = command_parser(
        "stop",
        "Tell a running job to save and end, and cancel a waiting one. `graftvit resume` goes on from there.",
        EXAMPLES,
        usage="RUN [--now]",
    )
    parser.add_argument("run", type=run_folder, metavar="RUN", help="folder of a run or of a sweep")
    parser.add_argument("--now", action="store_true", help="do not wait for a save")
    arguments = parser.parse_args(argv)
    stopped = stop(arguments.run, now=arguments.now)
    for sentence in stopped.done:
        say(f"{sentence}\n")
    for sentence in stopped.failed:
        say_aside(f"graftvit: error: {sentence}\n")
    if stopped.failed:
        return 1
    if not stopped.done:
        states = sorted({status.state for status in describe_runs(run_folders(arguments.run))})
        say(f"{arguments.run} has no job that waits or runs: it is {', '.join(states)}\n")
    return 0
