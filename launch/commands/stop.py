"""`graftvit stop`: end a run early, so that it can be resumed later."""

from __future__ import annotations

from ..flags import command_parser, run_folder
from ..say import say, say_aside

EXAMPLES = (
    "graftvit stop /scratch/me/distill          # save after the next step, then end; not requeued",
    "graftvit stop /scratch/me/distill --now    # end at once; the last saved state remains",
    "graftvit stop /scratch/me/sweep            # stop all cells that wait or run",
)


def run(argv: list[str]) -> int:
    """Stop the waiting and running jobs of a folder."""
    from ..slurm.jobs import describe_runs, run_folders
    from ..slurm.stopping import stop

    parser = command_parser(
        "stop",
        "Tell a running job to save and end, and cancel a waiting one. `graftvit resume` continues from its state.",
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
        say(f"{arguments.run} has no waiting or running job: it is {', '.join(states)}\n")
    return 0
