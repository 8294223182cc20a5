"""`graftvit stop`: end a run early, so that it can be resumed later."""

from __future__ import annotations

from pathlib import Path

from ...models.errors import GraftError
from ..flags import command_parser, run_folder
from ..say import say, say_aside

EXAMPLES = (
    "graftvit stop /scratch/me/distill          # save after the next step, then end; not requeued",
    "graftvit stop /scratch/me/distill --now    # end at once; the last saved state remains",
    "graftvit stop /scratch/me/sweep            # stop all cells that wait or run",
    "graftvit stop /scratch/me/a /scratch/me/b  # stop several runs",
)


def run(argv: list[str]) -> int:
    """Stop the waiting and running jobs of each folder."""
    parser = command_parser(
        "stop",
        "Tell a running job to save and end, and cancel a waiting one. `graftvit resume` continues from its state.",
        EXAMPLES,
        usage="RUN ... [--now]",
    )
    parser.add_argument(
        "runs", type=run_folder, nargs="+", metavar="RUN", help="folder of a run or of a sweep"
    )
    parser.add_argument("--now", action="store_true", help="do not wait for a save")
    arguments = parser.parse_args(argv)
    return max(_stop(folder, arguments.now) for folder in arguments.runs)


def _stop(folder: Path, now: bool) -> int:
    """Stop one folder and return the exit code. An error is printed, so that the other folders are still stopped."""
    from ..slurm.jobs import describe_runs, run_folders
    from ..slurm.stopping import stop

    try:
        stopped = stop(folder, now=now)
        if not stopped.done + stopped.failed:
            states = sorted({status.state for status in describe_runs(run_folders(folder))})
            say(f"{folder} has no waiting or running job: it is {', '.join(states)}\n")
    except (GraftError, OSError) as error:
        say_aside(f"graftvit: error: {error}\n")
        return error.exit_code if isinstance(error, GraftError) else 1
    for sentence in stopped.done:
        say(f"{sentence}\n")
    for sentence in stopped.failed:
        say_aside(f"graftvit: error: {sentence}\n")
    return 1 if stopped.failed else 0
