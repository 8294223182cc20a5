"""What a user meets before anything is queued, what is sent, and what is made of the answer of sbatch."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from graftvit.launch.load_config import dump_config
from graftvit.launch.plan_text import describe_plan
from graftvit.launch.slurm import lock, scheduler, submit
from graftvit.launch.slurm.attempt import Task
from graftvit.launch.slurm.batch import Batch
from graftvit.launch.slurm.jobs import UNSURE
from graftvit.launch.slurm.lock import is_submitting, submitting
from graftvit.launch.slurm.request import Request
from graftvit.launch.slurm.scheduler import State
from graftvit.launch.slurm.site_file import ask
from graftvit.launch.slurm.submit import check_quickly, describe_plans, first_word
from graftvit.models.errors import ConfigError, GraftError
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine.train import train
from support.runs.engine_runs import config, make_teacher
from support.runs.typed import Typed
from support.slurm.cluster_users import planned, user_with_recipe, write_program, write_site
from support.slurm.slurm_folders import SILENT, FakeSlurm, attempted, failing, submitted
from support.slurm.sweep_folders import make_sweep

PARTITION = "allocation failure: Invalid partition name specified"
SLURM = {
    "scontrol": "",
    "sinfo": "",
    "sbatch": f"""case "$*" in
*--test-only*) grep -q hihg "$2" && echo '{PARTITION}' >&2 && exit 1; exit 0;;
*) touch "$0.called"; echo 77;;
esac
""",
    "squeue": "",
    "sacct": "exit 1\n",
    "srun": "",
}


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user with a recipe `run.yaml` on a login node, whose Slurm is made of shell scripts."""
    for name, lines in SLURM.items():
        write_program(tmp_path / "bin", name, lines)
    path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    monkeypatch.setattr(scheduler, "_silent", {})
    monkeypatch.setattr(scheduler, "PAUSE", 0.0)
    return user_with_recipe(tmp_path, monkeypatch, path, gpus_per_node=0)


def python(program: str, *words: str) -> subprocess.Popen[str]:
    """A process that submits; what `program` does comes before. Ctrl-C stops it also below a shell that ignores it."""
    heard = "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    text = f"{heard}\nfrom graftvit.launch.cli import main\n{program}\nsys.exit(main({list(words)!r}))"
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", text], **pipes)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(
    ("values", "least"), [({"time": "0:02:00"}, 3), ({"time": 6, "signal_delay": 300}, 7)]
)
def test_a_limit_that_leaves_no_time_to_train_is_refused(values: dict[str, object], least: int) -> None:
    why = rf"^--time is {values['time']}: .*--signal_delay.*give {least} minutes or"
    with pytest.raises(ConfigError, match=why):
        submit._check_time(Request.model_validate(values))
    submit._check_time(Request.model_validate({**values, "time": least}))


MEMORY = "sbatch: error: Invalid --mem specification"
QOS = "QOSMaxWallDurationPerJobLimit{}Job violates accounting/QOS policy"


@pytest.mark.parametrize(
    ("surroundings", "content", "told", "sentence"),
    [
        ({"SBATCH_PARTITION": "x"}, {}, PARTITION, "SBATCH_PARTITION is x: sbatch refuses the job: Invalid partition"),
        ({}, {"profile": "big", "profiles": {"big": {"nodes": 9}}}, "sbatch: error: Node count specification invalid",
         "{site}: profiles.big.nodes is 9: sbatch refuses the job: Node count"),
        ({}, {"mem": "1.5G"}, MEMORY, "{site}: mem is 1.5G: sbatch refuses the job: Invalid --mem"),
        ({}, {"mem_per_gpu": "9T"}, "sbatch: error: Memory specification can not be satisfied",
         "{site}: mem_per_gpu is 9T: sbatch refuses the job: Memory"),
        ({}, {"mem_per_cpu": "1.5G"}, MEMORY.replace("mem", "mem-per-cpu"), "{site}: mem_per_cpu is 1.5G: sbatch"),
        ({}, {"account": "a"}, QOS.format("\\n"), "sbatch refuses the job: Job violates"),
        ({}, {"account": "a"}, QOS.format(" "), "--time is 24:00:00 by default: sbatch refuses the job"),
        ({}, {}, "sbatch: error: a wish of the site\nUnspecified error", "sbatch refuses the job: Unspecified error"),
        ({}, {}, MEMORY, "sbatch refuses the job: Invalid --mem"),  # which was not given
    ],
)  # fmt: skip
def test_a_refusal_of_slurm_names_where_a_value_is_from(
    surroundings: dict[str, str], content: dict[str, object], told: str, sentence: str,
    user: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = write_site(**content)
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    write_program(user / "bin", "sbatch", f"echo '{told}' >&2; exit 1\n")
    with pytest.raises(ConfigError) as raised:
        submit._ask_sbatch(user / "job.sh", ask({}))
    assert str(raised.value).startswith(sentence.format(site=path))


def test_without_slurm_or_its_answer_nothing_is_written(
    user: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = "Unable to contact slurm controller (connect failure)"
    write_program(user / "bin", "sbatch", f"echo 'sbatch: error: {why}' >&2; exit 1\n")
    before = sorted(user.rglob("*"))
    told = typed("submit run.yaml", code=2).err
    assert told.splitlines()[-1].startswith("graftvit: error: Slurm does not answer: ")
    assert why in told
    assert sorted(user.rglob("*")) == before
    write_program(user / "elsewhere", "scontrol", "")
    monkeypatch.setenv("PATH", str(user / "elsewhere"))
    told = typed("submit run.yaml", code=2).err
    assert told.startswith(
        "graftvit: error: --cluster slurm: no sbatch, sinfo, srun here; submit from a login node"
    )
    assert told.count("\n") == 1
    assert not (user / "run").exists()


BEYOND = "a limit does not allow it, see --time: QOSMaxWallDurationPerJobLimit"


@pytest.mark.parametrize(
    ("answers", "word"),
    [
        ([State("RUNNING")], ""),
        ([SILENT], ""),
        ([State("PENDING"), State("PENDING", reason="PartitionConfig"), State("PENDING", reason="Resources")],
         "waits for nodes: Resources"),
        ([State("PENDING", reason="Priority"), State("CONFIGURING")], ""),
        ([State("PENDING", reason="QOSMaxWallDurationPerJobLimit")], f"waits: {BEYOND}"),
    ],
)  # fmt: skip
def test_why_a_job_waits_is_said_after_its_submission(
    answers: list[State | Exception], word: str, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.says(*answers)
    monkeypatch.setattr(submit.time, "sleep", lambda seconds: None)
    assert first_word(["7_0", "7_1"], Request(), patience=60.0) == word
    assert first_word(["7"], Request(), patience=0.0) == ""


@pytest.mark.slow
@pytest.mark.parametrize("line", ["--partition hihg", "--output_dir /tmp/nobody --dry_run", "--help"])
def test_what_needs_no_torch_is_told_before_it_is_loaded(user: Path, line: str) -> None:
    program = "import atexit\natexit.register(lambda: print('torch loaded:', 'torch' in sys.modules))"
    out, err = python(program, "submit", "run.yaml", *line.split()).communicate(timeout=600)
    assert "torch loaded: False" in out, err
    assert err.startswith("graftvit: error: ") == (line != "--help")
    assert ("#SBATCH" in out) == ("--dry_run" in line)


def test_what_is_slow_is_announced_and_what_the_plan_warns_of_is_said(
    user: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = "length  9 steps\n        warning: it ends in its warm-up\n"
    monkeypatch.setattr("graftvit.launch.plan_text.describe_plan", lambda *_, **__: plans)
    describe_plans(planned("run.yaml"))
    assert capsys.readouterr().err.splitlines() == [
        "graftvit: checking the run: its settings, teacher, data and plan ...",
        "graftvit: warning: it ends in its warm-up",
    ]


def test_settings_that_no_run_can_have_are_refused_before_what_is_slow(user: Path) -> None:
    with pytest.raises(ConfigError, match=r"optim.warmup_epochs=5.0 is not below optim.epochs=3"):
        check_quickly(planned("run.yaml", "optim.max_steps=none", "epochs=3", "warmup_epochs=5"))


def test_data_that_the_run_downloads_are_not_looked_for(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftvit.launch.plan_text.describe_plan", lambda *_, **__: "")
    looked: list[bool] = []
    monkeypatch.setattr(
        "graftvit.transfer.data.datasets.check_dataset", lambda data: looked.append(data.download)
    )
    for download in ("true", "false"):
        words = ("data.dataset=torch/cifar10", "data.data_path=none", f"data.download={download}")
        describe_plans(planned("run.yaml", *words))
    assert looked == [False]


BEFORE = """
from graftvit.launch.slurm import submit
submit.check_commands = lambda: (sys.stderr.write('here\\n'), sys.stderr.flush(), __import__('time').sleep(60))
"""
BETWEEN = """
from graftvit.launch.slurm import submit
order = submit.submit
def ordered(batch):
    order(batch)
    sys.stderr.write('here\\n'), sys.stderr.flush(), __import__('time').sleep(60)
submit.submit = ordered
"""


@pytest.mark.slow
@pytest.mark.parametrize("called", [False, True])
def test_who_stops_a_submission_in_time_is_told_that_nothing_was_submitted(called: bool, user: Path) -> None:
    """Once sbatch was called, nothing is said of it."""
    process = python(BETWEEN if called else BEFORE, "submit", "run.yaml", "--unchecked")
    assert process.stderr is not None
    assert process.stderr.readline() == "here\n"
    assert (user / "bin" / "sbatch.called").exists() == called
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert (user / "bin" / "sbatch.called").exists() == called
    assert process.returncode == 130
    if called:
        assert "nothing" not in err
    else:
        assert err == "graftvit: error: stopped by Ctrl-C: nothing was submitted\n"


def finished(folder: Path) -> RunConfig:
    """A run of one epoch that was submitted as job 12 and is through."""
    run = config(folder, optim={"epochs": 1})
    train(run)
    submitted(folder)
    return run


def again(run: RunConfig, *words: str) -> str:
    """What a submission into the folder of a run says before it is sent."""
    recipe = run.output_dir.with_name("again.yaml")
    recipe.write_text(dump_config(run))
    return submit._describe_again(planned(recipe, *words))


def test_what_is_resumed_and_what_differs_is_said(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    assert again(run, "optim.epochs=3") == "resumes at epoch 2 of 3; changed: optim.epochs 1 -> 3"
    assert again(run, "optim.max_steps=40", "data.workers=1") == (
        "resumes at epoch 2 of a run of 40 steps; changed: data.workers 0 -> 1, optim.max_steps none -> 40"
    )
    longer = run.model_copy(update={"optim": run.optim.model_copy(update={"epochs": 3})})
    assert "changed: optim.epochs 1 -> 3\n" in describe_plan(longer)
    batch = planned(tmp_path / "run")
    submit._refuse_finished(batch)  # no attempt says that it finished: its student may be missing
    attempted(tmp_path / "run", "finished")
    with pytest.raises(ConfigError, match="has finished: there is nothing left to train; give more --epochs"):
        submit._refuse_finished(batch)
    submit._refuse_finished(planned(tmp_path / "run", "optim.epochs=3"))


def test_what_begins_anew_and_what_goes_on(tmp_path: Path) -> None:
    run = config(tmp_path / "run", make_teacher(tmp_path / "teacher"))
    assert again(run) == ""
    run.output_dir.mkdir()
    (run.output_dir / "config.yaml").write_text(dump_config(run))
    assert again(run, "seed=3") == "starts again, because nothing was saved"
    stage = run.output_dir / "2-task"
    for folder in (stage, make_sweep(tmp_path / "sweep", "seed=0..1")[1]):
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints" / "last.safetensors").touch()
    (run.output_dir / "config.yaml").rename(stage / "config.yaml")
    assert again(run) == "resumes in stage 2-task at epoch 1"
    cells = planned("digits_scratch", f"output_dir={tmp_path / 'sweep'}", sweep=("seed=0..1",))
    assert submit._describe_again(cells) == "1 of 2 cells resume from what they have saved"


def test_it_is_said_before_the_job_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: Typed
) -> None:
    run = config(tmp_path / "run")
    run.output_dir.mkdir()
    for name in ("config.yaml", "../run.yaml"):
        (run.output_dir / name).write_text(dump_config(run))
    heard: list[str] = []

    def send(batch: Batch) -> list[str]:
        heard.append(capsys.readouterr().err)
        return ["77"]

    monkeypatch.setattr(submit, "submit", send)
    line = f"submit {tmp_path}/run.yaml --cluster local --gpus_per_node 0 --unchecked"
    assert typed(line).out.startswith("submitted job 77 in")
    assert "graftvit: starts again, because nothing was saved\n" in heard[0]


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    made = Batch(tmp_path, [Task(["train"], tmp_path)], Request(), 1)
    made.place.mkdir(parents=True)
    return made


def answer(folder: Path, monkeypatch: pytest.MonkeyPatch, said: str, lines: str = "") -> None:
    """An sbatch that says so."""
    write_program(folder / "bin", "sbatch", f"cat <<'END'\n{said}\nEND\n{lines}\n")
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=":")


@pytest.mark.parametrize(
    ("said", "queued"),
    [
        ("123", ""),
        ("Welcome to the cluster!\n5 jobs are waiting\n123", ""),
        ("123;cluster\nbudget left: 77 %", ""),
        ("sbatch: lua: default partition set\nSubmitted batch job 123 on cluster x\ngood luck", ""),
        ("123\n500", "123"),  # where it could be another number, the queue is asked
    ],
)
def test_the_number_of_the_job_is_found(
    said: str, queued: str, batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm: FakeSlurm
) -> None:
    """Also where a site has put a program of its own in front of sbatch."""
    answer(tmp_path, monkeypatch, said)
    slurm.numbers(queued)
    assert submit._sbatch(batch) == "123"


LOST = "slurm_submit_batch_job: Zero Bytes were transmitted or received"


@pytest.mark.parametrize(
    ("lines", "away", "said", "unsure"),
    [
        ("", None, "may be queued all the same", True),
        (f"echo {LOST} >&2; exit 1", None, "may be queued all the same", True),
        (f"echo {LOST} >&2; exit 1", SILENT, "whether the job is queued is not known", False),
        ("echo no such account >&2; exit 1", None, "sbatch refuses the job: no such account", False),
        (f"echo {submit.UNCLEAR[0]} >&2; exit 1", None, r"not available \(--nodes is 1 by default\)", False),
    ],
)
def test_a_job_that_was_taken_is_not_called_refused(
    lines: str, away: Exception | None, said: str, unsure: bool, batch: Batch, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, slurm: FakeSlurm,
) -> None:  # fmt: skip
    slurm.numbers(error=away)
    answer(tmp_path, monkeypatch, "" if "exit" in lines else "it is done", lines)
    with pytest.raises(GraftError, match=said) as raised:
        submit._sbatch(batch)
    assert isinstance(raised.value, ConfigError) == (lines.endswith("exit 1") and LOST not in lines)
    assert (batch.place / UNSURE).exists() == unsure


HOLD = """
import sys
from pathlib import Path
from graftvit.launch.slurm.lock import submitting
with submitting(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another command, which submits until its input ends."""
    words = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def refuse_submitting(folder: Path, why: str) -> None:
    with pytest.raises(ConfigError, match=why), submitting(folder, wait=0.1):
        pass


def test_a_second_submission_waits_and_then_gives_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    assert not is_submitting(folder)
    other = holder(folder)
    assert is_submitting(folder)
    refuse_submitting(folder, f"{folder} is being submitted by another command")
    assert "waiting for another command that submits to" in caplog.text
    other.communicate("")
    with submitting(folder, wait=0.0):
        assert not is_submitting(folder)  # no other command does
    assert not is_submitting(folder)
    other = holder(folder)
    other.kill()  # what is killed holds nothing
    other.communicate()
    with submitting(folder, wait=0.0):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_file_system_without_locks(number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(OSError(number, os.strerror(number))))
    with submitting(tmp_path):
        lock._mine.clear()  # as another process sees it
        assert is_submitting(tmp_path)
        refuse_submitting(tmp_path, "is being submitted by another command")
    assert not is_submitting(tmp_path)


def test_a_folder_that_cannot_be_written_takes_no_submission(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refuse_submitting(tmp_path / "file" / "run", "run cannot be written: Not a directory")
