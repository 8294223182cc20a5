"""Submit a batch, from the checks to the job numbers: what cannot run is refused, as far as it can be known.

Whether the cluster can give what is asked for, Slurm says: `sbatch --test-only` before the submission, and the reason
for which the job waits, some seconds after it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from submitit.core.utils import DelayedSubmission

from ...checkpoints.atomic import write_text
from ...models.errors import ConfigError, DataError, GraftError, counted
from ...transfer.config import RunConfig
from ...transfer.engine.resume_check import changes, describe_changes, settings
from ...transfer.first_checks import check_first
from ..load_config import load_config
from ..progress import current_stage, read_progress
from ..say import hint, say_aside
from ..sweep import check_sweep
from .batch import Batch, copy_package, executor_of, make_packs, on_node, origin, script, start, unpack_script
from .environment import outside_of_a_job, start_script
from .folder import Job, JobFolder, newest_state, remember, write_number
from .jobs import UNSURE, active_jobs, home
from .lock import InterruptedSubmissionError, ordered, submitting, unbroken
from .request import MEMORY, Request, memory_of, option_name
from .scheduler import NoAnswerError, ask, flags_beyond, job_states, number_by_name, waiting
from .site_file import check_commands, check_folder

ANSWER = 120.0
"""Seconds that sbatch may take to answer."""
FIRST_WORD = 6.0
"""Seconds that Slurm is given after a submission to say why the job waits."""
FIRST_REASONS = ("Priority", "PartitionConfig")
"""What Slurm says before it has looked closely, and seldom to the end."""
START = 60
"""Seconds that a run needs before it can save anything."""
UNCLEAR = ("Requested node configuration is not available", "Requested nodes are busy")
"""What `--test-only` says of nodes that do not exist, and of those that are drained, down or reserved: sbatch knows."""
LOST = ("timed out", "send/recv", "zero bytes", "gave no answer", "exit code 0", "exit code -")
"""What sbatch says where the request may have reached the controller, and the answer was lost."""
ALL_THE_SAME = "`--unchecked` submits it all the same"
_FLAG_OF = {
    "partition": "partition", "feature": "constraint", "node name": "nodelist", "reservation": "reservation",
    "account": "account", "qos": "qos", "time limit": "time", "memory": "mem", "node count": "nodes", "gres": "gres",
    "generic resource": "gres", "dependency": "dependency", "cpu count": "cpus_per_task",
}  # fmt: skip
"""Words of sbatch's refusals, and the resource that they are about."""
_SIZES = ("partition", "nodes", "gpus_per_node", "gres", "tasks_per_node", "cpus_per_task", *MEMORY)
_NUMBER = re.compile(r"^(?:Submitted batch job )?([0-9]+)(?:;.*| on .*)?$", re.MULTILINE)
"""The job number in sbatch's output, among a site's own lines; a wrapper of sbatch may not know `--parsable`."""


def check(batch: Batch, *, unchecked: bool = False) -> list[str]:
    """Return the plan of each run in words, and a note of Slurm's on the request, if any.

    Raises ConfigError, DataError or another GraftError for what cannot run as it is asked for.
    """
    note = check_quickly(batch, unchecked=unchecked)
    return [*([] if unchecked else describe_plans(batch)), *([f"{note}\n"] if note else [])]


def check_early(request: Request) -> None:
    """Raise ConfigError for what the cluster cannot give, as far as that is known before the runs are."""
    if request.cluster == "slurm":
        check_commands()
        _check_time(request)


def check_quickly(batch: Batch, *, unchecked: bool = False) -> str:
    """Run the part of `check` that needs no torch."""
    request = batch.request
    _check_machine(batch)
    if request.cluster == "slurm":
        check_commands()
    _refuse_second(batch)
    if unchecked:
        return ""
    for run in batch.configs:
        check_first(run)
    _refuse_finished(batch)
    if request.cluster != "slurm":
        return ""
    check_folder(batch.folder, request)
    _check_time(request)
    with outside_of_a_job(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.sh"
        path.write_text(script(batch), encoding="utf-8")
        return _ask_sbatch(path, request)


def _check_time(request: Request) -> None:
    """Raise ConfigError if a run would be asked to save before it has done anything."""
    least = (request.signal_delay + START) // 60 + 1
    if request.minutes < least:
        raise ConfigError(
            f"{request.said('time')}: a run needs a minute to start, and is told to save {request.signal_delay} "
            f"seconds before its limit ({request.origin('signal_delay')}): give {least} minutes or more; {ALL_THE_SAME}"
        )


def _ask_sbatch(path: Path, request: Request) -> str:
    """Return what `sbatch --test-only` says of a job that may have to wait; nothing is queued.

    Raises ConfigError in Slurm's words where sbatch would refuse the script; NoAnswerError.
    """
    try:
        ask("sbatch", "--test-only", str(path))
    except NoAnswerError:
        raise
    except GraftError as error:
        words = re.sub(r"(sbatch failed|allocation failure|error): *", "", str(error))
        if words in UNCLEAR:
            return f"sbatch --test-only says: {words}, which is also said of nodes that are down, drained or reserved"
        raise _refusal(words, request) from error
    return ""


def _refusal(words: str, request: Request) -> ConfigError:
    """Return Slurm's words with the resource that they are about, or what was asked for where they name none."""
    flag_of = _FLAG_OF | {"memory": memory_of(dict(request))}
    limits = [name for word in words.split() for name in flags_beyond(word, dict(request))]
    limits += [
        name for word in re.findall("--([a-z-]+)", words) if (name := option_name(word)) in flag_of.values()
    ]
    parts = [name for part, name in flag_of.items() if re.search(rf"\b{part}\b", words.lower())]
    named = [name for name in limits or parts if getattr(request, name) is not None]
    if named:
        return ConfigError(f"{request.said(named[0])}: sbatch refuses the job: {words}")
    sizes = [request.said(name) for name in _SIZES if getattr(request, name) is not None]
    return ConfigError(f"sbatch refuses the job: {words}" + f" ({', '.join(sizes)})" * (words in UNCLEAR))


def describe_plans(batch: Batch) -> list[str]:
    """Run the slow part of `check`: return the plan of each run in words."""
    if not batch.configs:
        return []
    say_aside("graftvit: checking the run: its settings, teacher, data and plan ...\n")
    from ...transfer.data.loading import followed
    from ..plan_text import describe_plan

    plans = []
    for run in followed(batch.configs, len(batch.configs), "checks of the runs"):
        needs_data = not run.data.download and not batch.again
        if needs_data:
            _check_data(run, batch.request)
        plans.append(describe_plan(run, batch.request.world_size, needs_data=needs_data))
    warnings = (line.partition("warning: ")[2] for text in plans for line in text.splitlines())
    for warning in filter(None, dict.fromkeys(warnings)):
        say_aside(f"graftvit: warning: {warning}\n")
    return plans


def preview(batch: Batch, *, unchecked: bool = False) -> tuple[str, GraftError | None]:
    """Return the plan, the cells and the script as sbatch would get it, and why it would be refused. Queue nothing.

    Raises ConfigError: there is no Slurm here to make a script for.
    """
    request, parts, problem = batch.request, list[str](), None
    if request.cluster == "slurm":
        check_commands()
    try:
        parts += check(batch, unchecked=unchecked)
    except GraftError as error:
        problem = error
    if batch.first is not None:
        parts.append(f"a job of its own makes the teacher first, in {batch.first.output_dir}\n")
    cells = len(batch.tasks) if batch.sweep is None else len(batch.sweep.cells)
    if left_out := cells - len(batch.tasks):
        parts.append(f"left out: {left_out} of {cells} cells, which have finished\n")
    if batch.again:
        parts.append("".join(f"again: {run}\n" for run in batch.runs))
    elif batch.is_array:
        names = "".join(f"  {one.output_dir.name}\n" for one in batch.tasks)
        parts.append(f"{len(batch.tasks)} cells, {request.array_parallelism} at a time:\n{names}")
    local = f"--cluster {request.cluster}: {counted(request.tasks, 'process')} on this machine"
    parts.append((script(batch).rstrip() if request.cluster == "slurm" else local) + "\n")
    return "\n".join(parts), problem


def send(batch: Batch) -> str:
    """Submit, after a job for the first task where there is one, and say which jobs these are and what to do next.

    Raises GraftError as `check` and `submit`.
    """
    with submitting(home(batch.folder)):
        _refuse_second(batch)  # another shell may have been quicker
        if batch.sweep is not None:
            check_sweep(batch.sweep)
        if words := _describe_again(batch):
            say_aside(f"graftvit: {words}\n")
        batch.write()
        said = _submit_all(batch)
    if batch.comparison:
        said += f"  {hint('compare', next(iter(batch.frozen)), '--report')}    # when all cells are through\n"
    return said


def _submit_all(batch: Batch) -> str:
    remember(batch.folder)  # before: an interrupted submission may have made a job
    after = ""
    if batch.first is not None:
        made = submit(replace(batch, tasks=[batch.first], first=None, identity=f"{batch.identity}-first"))[0]
        batch = replace(batch, after=made if batch.request.cluster == "slurm" else None)
        after = f", after job {made} for the teacher,"
    try:
        jobs = submit(replace(batch, first=None))
    except GraftError as error:
        if not after:
            raise
        raise type(error)(f"{error}; job {made} for the teacher was submitted, and continues") from error
    cells = batch.is_array or batch.folder != batch.tasks[0].output_dir
    count = f" ({counted(len(jobs), 'cell')})" if cells else ""
    word = first_word(jobs, batch.request) if batch.request.cluster == "slurm" else ""
    return (
        f"submitted job {jobs[0].partition('_')[0]}{count}{after} in {batch.folder}\n"
        f"  {hint('jobs', batch.folder)}\n  {hint('jobs', 'logs', batch.tasks[0].output_dir, '--follow')}\n"
        + (f"  it {word}\n" if word else "")
    )


def first_word(jobs: Sequence[str], request: Request, patience: float = FIRST_WORD) -> str:
    """Return why a job waits, some seconds after its submission, as Slurm says it; empty where it starts.

    A limit of a partition, an account or a QOS may not allow the job: that is said by this reason alone.
    """
    until, several = time.monotonic() + patience, "," in (request.partition or "")
    word = ""
    while time.monotonic() < until:
        try:
            seen = job_states(jobs[:1], tries=1)[jobs[0]]
        except GraftError:
            return ""
        if seen.state != "PENDING":
            return ""
        word = waiting(seen.reason, dict(request), seen.start)
        of_one = several and seen.reason.startswith("Partition")  # and another one may take it
        if word and seen.reason not in FIRST_REASONS and not of_one:
            return word
        time.sleep(0.3)
    return word


def _check_machine(batch: Batch) -> None:
    """Raise ConfigError where more is asked for than one machine or process is."""
    request, local = batch.request, batch.request.cluster != "slurm"
    one, teacher = f"--cluster {request.cluster} is this", batch.comparison and batch.first is not None
    at_once = request.cluster == "local" and len(batch.tasks) > request.array_parallelism and not batch.again
    wrong = {
        f"{request.said('nodes')}: {one} machine alone; give --nodes 1": local and request.nodes > 1,
        f"{request.said('pack')}: {one} machine alone": local and request.pack != "no",
        f"{one} process alone, and {request.tasks} are asked for: give one GPU or task": (
            request.cluster == "debug" and request.tasks > 1
        ),
        f"{request.said('array_parallelism')}: --cluster local starts all {len(batch.tasks)} cells at once: "
        "allow more of them, or take fewer values": at_once,
        f"a cell of a comparison is one process, and {request.nodes} x {request.tasks} are asked for: "
        "give --nodes 1 --gpus_per_node 1 --tasks_per_node 1": batch.comparison and request.world_size > 1,
        "--cluster local does not wait for the teacher, which is not there yet: make it first by "
        "`graftvit compare ... --only teacher`, or run all cells one after another without --only": (
            teacher and request.cluster == "local"
        ),
    }
    for sentence, found in wrong.items():
        if found:
            raise ConfigError(sentence)


def _refuse_second(batch: Batch) -> None:
    """Raise ConfigError where one of the runs, or what was submitted to the same folder before, has a job."""
    runs = list(dict.fromkeys([batch.folder, *batch.runs]))
    for run in runs:
        JobFolder(run).job()  # of a damaged record nobody knows the job
    for one in active_jobs(runs):
        raise ConfigError(
            f"{one.run} is {one.words} already: `{hint('jobs', batch.folder)}` shows it, "
            f"`{hint('jobs', 'stop', batch.folder)}` ends it"
        )


def _check_data(run: RunConfig, request: Request) -> None:
    from ...transfer.data.datasets import check_dataset

    try:
        check_dataset(run.data)
    except DataError as error:
        if request.cluster != "slurm":
            raise
        raise DataError(f"{error}; where data are on the nodes alone, `--unchecked` does not look") from error


def _is_single(batch: Batch) -> bool:
    return len(batch.configs) == 1 and not batch.comparison and batch.sweep is None and not batch.again


def _refuse_finished(batch: Batch) -> None:
    """Raise ConfigError if a single run has nothing left to train."""
    folder = batch.folder
    if not _is_single(batch) or not JobFolder(folder).finished:
        return
    done, optim = read_progress(folder), batch.configs[0].optim
    whole = done.step >= optim.max_steps if optim.max_steps else done.epoch >= optim.epochs
    if whole and batch.configs[0].output_dir == folder:
        raise ConfigError(
            f"{folder} has finished: there is nothing left to train; give more --epochs or another --output_dir, "
            "or --unchecked, which submits it all the same"
        )


def _describe_again(batch: Batch) -> str:
    """Return what a run resumes from, and which settings change; empty where all runs are new."""
    if batch.sweep is not None:
        begun = sum(bool(newest_state(one.output_dir)) for one in batch.tasks)
        return f"{begun} of {len(batch.tasks)} cells resume from what they have saved" if begun else ""
    stage = current_stage(batch.folder)
    if not _is_single(batch) or not (stage / "config.yaml").is_file():
        return ""
    if not newest_state(stage):
        return "starts again, because nothing was saved"
    run, done = batch.configs[0], read_progress(stage)
    if stage != run.output_dir:
        return f"resumes in stage {stage.name} at epoch {done.epoch + 1}"
    changed = ""
    with contextlib.suppress(GraftError):  # of another version
        changed = describe_changes(changes({"config": settings(load_config(stage)), "origins": {}}, run))
    length = f"a run of {run.optim.max_steps} steps" if run.optim.max_steps else run.optim.epochs
    return f"resumes at epoch {done.epoch + 1} of {length}; {changed or 'nothing changed'}"


def submit(batch: Batch) -> list[str]:
    """Submit, and return the job of each request. Each run folder records what was submitted.

    Raises:
        ConfigError: if the cluster refused.
        GraftError: if it is not known whether the cluster took the job.
        InterruptedSubmissionError: if it did, and this command was told to end meanwhile.
    """
    code, made = copy_package(batch.folder / "jobs"), origin()
    if batch.request.cluster == "debug":
        return _run(batch, code, made)
    if batch.request.cluster == "local":
        # a cell that is started alone has its own folder for all files of its job
        alone = (Batch(task.output_dir, [task], batch.request, batch.cores) for task in batch.tasks)
        return [_order(one, code, made) for one in alone]
    number = _order(batch, code, made)
    return [f"{number}_{index}" for index in range(len(batch.tasks))] if batch.is_array else [number]


def _order(batch: Batch, code: Path, made: dict[str, Any]) -> str:
    """Return the number of the job. Slow work comes first; the part that a signal must not cut is short."""
    _prepare(batch, code)
    with outside_of_a_job(), unbroken() as held:
        _record(batch, code, made)
        try:
            number = _sbatch(batch) if batch.request.cluster == "slurm" else start(batch)
        except ConfigError:
            for task in batch.tasks:
                JobFolder(task.output_dir).withdraw_job(str(batch.place))
            raise
        with contextlib.suppress(OSError):  # without it the job is found by its name
            write_number(batch.place, number)
    if held:
        raise InterruptedSubmissionError(held[0], number, batch.folder)
    return number


def _prepare(batch: Batch, code: Path) -> None:
    """Write all that the job reads: a job finds it even if its number never reached us."""
    batch.logs.mkdir(parents=True, exist_ok=True)
    words = {"code": shlex.quote(str(code))}
    if batch.request.pack != "no":
        packs = make_packs(code, batch.request.pack_folder or batch.folder / "jobs", batch.request.pack)
        write_text(batch.place / "unpack.sh", unpack_script(packs))
        words = {"code": on_node(packs, "code"), "python": f"{on_node(packs, 'env')}/bin/python"}
    write_text(batch.place / "start.sh", start_script(launch=batch.place, **words))
    write_text(batch.place / "runs.json", json.dumps([str(task.output_dir) for task in batch.tasks]))
    if batch.request.cluster == "slurm":
        write_text(batch.place / "submit.sh", script(batch))
    for index, task in enumerate(batch.tasks):
        delayed = DelayedSubmission(task)
        delayed.set_timeout(batch.request.minutes, 0)
        delayed.dump(batch.place / f"{index}.pkl")


def _record(batch: Batch, code: Path, made: dict[str, Any], job_id: str = "") -> None:
    """Record the intention, in each run folder."""
    for index, task in enumerate(batch.tasks):
        folder = JobFolder(task.output_dir)
        task.output_dir.mkdir(parents=True, exist_ok=True)
        for one in folder.jobs():
            if not one.job_id:  # an interrupted one, of which no job has come: the caller has asked
                folder.withdraw_job(one.launch)
        folder.write_job(
            Job(
                job_id=job_id,
                cluster=batch.request.cluster,
                submitted=time.time(),
                command=task.words,
                logs=str(batch.logs),
                resources=batch.request.model_dump(mode="json"),
                code=str(code),
                directory=os.getcwd(),  # noqa: PTH109
                cpus_per_task=batch.cores,
                origin=made,
                name=batch.name,
                index=index if batch.is_array else None,
                launch=str(batch.place),
                output_dir=str(task.output_dir.absolute()),
                host=socket.gethostname(),
                pid=os.getpid(),
            )
        )


def _sbatch(batch: Batch) -> str:
    """Order the job.

    Raises ConfigError: it is refused; GraftError: neither sbatch nor the queue tells whether it is.
    """
    script_path = batch.place / "submit.sh"
    words = ["sbatch", "--parsable", str(script_path)]
    said = f"gave no answer within {ANSWER:.0f} seconds"
    with contextlib.suppress(subprocess.TimeoutExpired):
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
        # in its own session it receives no Ctrl-C
        done = subprocess.run(words, **pipes, timeout=ANSWER, start_new_session=True)
        numbers = _NUMBER.findall(done.stdout)
        if done.returncode == 0 and len(numbers) == 1:
            return str(numbers[0])
        said = " ".join(done.stderr.split() if done.returncode else ()) or f"exit code {done.returncode}"
    # Slurm keeps a record of a job that it has refused, too
    if not any(words in said.lower() for words in LOST):
        raise _refusal(re.sub(r"sbatch: error: (Batch job submission failed: )?", "", said), batch.request)
    shown = f"`{hint('jobs', batch.folder)}` tells"
    try:
        if number := number_by_name(batch.name, script_path):
            return number
    except GraftError as error:
        raise GraftError(
            f"sbatch: {said}; whether the job is queued is not known: {shown} when Slurm answers again"
        ) from error
    (batch.place / UNSURE).touch()
    raise GraftError(f"sbatch: {said}; the job may be queued all the same: {shown} in some minutes")


def _run(batch: Batch, code: Path, made: dict[str, Any]) -> list[str]:
    """Run each in this process."""
    ordered.set()
    jobs = []
    for task in batch.tasks:
        one = replace(batch, tasks=[task])
        with outside_of_a_job():
            job = executor_of(one).submit(task)
            _record(one, code, made, str(job.job_id))
        jobs.append(job)
    for job in jobs:
        job.results()
    return [str(job.job_id) for job in jobs]
