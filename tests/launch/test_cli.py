"""The command line: help, flags, errors, what a process loads, and how it ends."""

from __future__ import annotations

import ast
import logging
import os
import pwd
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from graftvit.launch import cli, commands
from graftvit.launch.cli import GROUPS, main
from graftvit.launch.fields import leaves, sections
from graftvit.launch.flags import command_parser, parse_command
from graftvit.launch.load_config import at_home, load_config
from graftvit.launch.say import PlainFormatter, hint, say, say_aside
from graftvit.models.errors import GraftError, RunFailedError
from graftvit.transfer.config import RunConfig
from graftvit.transfer.setting import rule_of
from support.runs.command_words import command_words
from support.runs.typed import Typed


def complaint(typed: Typed, *words: str, code: int = 2) -> str:
    """The one line on stderr that a mistake ends in."""
    captured = typed(*words, code=code)
    assert captured.out == ""
    assert captured.err.startswith("graftvit: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def resolved(typed: Typed, tmp_path: Path, line: str) -> RunConfig:
    path = tmp_path / "resolved.yaml"
    path.write_text(typed(line, "--print_config").out)
    return load_config(path)


def python(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter of its own."""
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)


def graftvit(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "graftvit.launch", *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_help_imports_no_torch_and_has_examples() -> None:
    lines = [" ".join(words) for words in command_words()]
    code = (
        "import sys; from graftvit.launch.cli import main;"
        "codes = {main([*line.split(), '--help']) for line in sys.argv[1:]};"
        "heavy = {'torch', 'timm', 'accelerate', 'numpy', 'matplotlib', 'sklearn'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else codes != {0})"
    )
    done = python(code, *lines)
    assert done.returncode == 0, done.stderr
    _, *examples = done.stdout.split("examples:")
    assert len(examples) == len(lines)
    assert all(f"graftvit {command}" in text for command, text in zip(lines, examples, strict=True))


def test_the_description_of_a_section_is_one_block(typed: Typed) -> None:
    blocks = re.findall(r"^\w+:\n((?:.+\n)+?)\n  --", typed("train", "--help").out, re.M)
    assert len(blocks) == len(sections()) + 1
    assert all(re.fullmatch(r"  \S.*", line) for block in blocks for line in block.splitlines())
    assert not any("Args:" in block for block in blocks), "each setting is described once, by its flag"


def test_every_setting_is_in_the_help(typed: Typed) -> None:
    flags = set(re.findall(r"--[a-z0-9_.-]+", typed("train", "--help").out))
    for key, leaf in leaves().items():
        names = (key, leaf.name, *rule_of(leaf.field).also)  # a name that two settings have is no flag
        assert flags & {f"--{no}{name}" for name in names for no in ("", "no-")}, key


def test_the_overview_has_every_command_in_one_group(typed: Typed) -> None:
    names = [name for group in GROUPS.values() for name in group]
    assert list(GROUPS) == ["start", "train", "models", "cluster", "analyze"]
    assert len(names) == len({*names})
    files = {path.stem for path in Path(commands.__path__[0]).glob("*.py")} - {"__init__"}
    assert files == {*names, "bench", "search"}, "the last two are actions of programs"
    shown = typed("--help").out.splitlines()
    assert [line.split()[0] for line in shown if line.startswith("  ") and "graftvit" not in line] == names
    typed(code=2)


def test_the_help_of_submit_has_the_flags_of_the_cluster_alone(typed: Typed) -> None:
    shown = typed("submit --help").out
    assert "--gpus_per_node" in shown
    assert "`graftvit train --help`" in shown
    assert "--blr" not in shown


def test_the_help_of_resume_states_no_default_that_is_not_used(typed: Typed) -> None:
    assert "(default:" not in typed("jobs resume --help").out


def test_the_version_is_the_installed_one(typed: Typed) -> None:
    assert typed("--version").out.startswith("graftvit 0.")


def test_flags_beat_the_recipe_in_the_order_given(typed: Typed, tmp_path: Path) -> None:
    config = resolved(
        typed, tmp_path, "train attention_distill_vit_large --blr 5e-4 optim.blr=6e-4 --optim.blr=7e-4 --batch-size 8 "
        "data.workers=0 --fsdp --no-progress --layers 2:5 --data_path=/a=b student.model_args.depth=6 "
        "--teacher local-dir:x --model vit_tiny_patch16_224",
    )  # fmt: skip
    assert (config.optim.blr, config.optim.epochs) == (7e-4, 200)
    assert (config.data.batch_size, config.data.workers, config.data.data_path) == (8, 0, "/a=b")
    assert (config.engine.fsdp, config.engine.progress) == (True, False)
    assert config.transfer.layers == "2:5"
    assert config.student.model_args == {"depth": 6}
    assert (config.teacher.source, config.student.model) == ("local-dir:x", "vit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("line", "on"),
    [
        ("--fsdp --no_fsdp", False), ("--no-fsdp --fsdp", True), ("--fsdp false", False), ("--fsdp true", True),
        ("--engine.fsdp", True), ("--fsdp=false", False), ("--fsdp node", "node"), ("--fsdp=node --seed 1", "node"),
    ],
)  # fmt: skip
def test_switches_go_both_ways(line: str, on: bool | str, typed: Typed, tmp_path: Path) -> None:
    assert resolved(typed, tmp_path, f"train {line}").engine.fsdp == on
    assert resolved(typed, tmp_path, "train --no-engine.progress").engine.progress is False


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["trian"], ["'trian'", "'train'"]),
        (["train", "--epoch", "3"], ["'--epoch'", "'--epochs'"]),
        (["train", "--optim.blrr", "3"], ["'--optim.blrr'", "'--optim.blr'"]),
        (["train", "--drop_pth=1"], ["'--drop_pth'", "'--drop_path'"]),
        (["train", "--dryrun"], ["'--dryrun'", "'--dry_run'"]),
        (["train", "--teacher.model_arg", "x"], ["--teacher.model_args"]),
        (["train", "--no-epochs"], ["--no-epochs"]),
        (["train", "--blr", "abc"], ["--blr", "'abc'", "a number above 0"]),
        (["train", "--blr"], ["--blr needs a value", "a number"]),
        (["train", "--blr", "--epochs", "3"], ["--blr needs a value"]),
        (["train", "--method", "distil"], ["--method", "'distil'", "copy_q", "attention_output"]),
        (["train", "--resume", "latest"], ["--resume", "'latest'", "auto, never"]),
        (["train", "--mixup", "-1"], ["--mixup", "-1", "at least 0"]),
        (["train", "--student.model_args", "7"], ["--student.model_args", "7", "mapping"]),
        (["train", "--layers", "{a: 1}", "--heads", "[x]"], ["--heads", "['x']"]),
        (["train", "nope"], ["'nope'", "attention_copy_vit_base"]),
        (["train", "attention_distil_vit_base"], ["did you mean 'attention_distill_vit_base'"]),
        (["train", "nope.yaml"], ["nope.yaml", "No such file"]),
        (["train", "cifar10_copy", "cifar10_distill"], ["cifar10_distill", "graftvit train --help"]),
        (["train", "--fsdp=perhaps"], ["--fsdp", "'perhaps'", "true or false"]),
        (["train", "blrr=3"], ["'blrr'", "'optim.blr'"]),
        (["train", "=3"], ["''"]),
        (["train", "--"], ["'--'"]),
        *(
            ([gone, "x"], [f"unknown command '{gone}'"])
            for gone in ("pretrain", "logs", "stop", "save", "search")
        ),
        (["list", "recipes", "nope"], ["'nope'", "cifar10_copy"]),
        (["checkpoint", "inf", "x"], ["inf", "info"]),
        (["checkpoint", "info"], ["SOURCE"]),
        (["checkpoint", "info", "x", "--blr", "1"], ["--blr", "`graftvit checkpoint info --help`"]),
        (["submit", "compare", "digits_compare"], ["`graftvit submit digits_compare`"]),
        (["submit", "visualize", "runs/x"], ["`graftvit visualize` cannot be submitted", "evaluate"]),
        (["demo", "--quik"], ["--quik"]),
    ],
)
def test_a_mistake_ends_in_one_sentence(words: list[str], parts: list[str], typed: Typed) -> None:
    found = complaint(typed, *words)
    for part in parts:
        assert part in found


def test_a_typo_in_a_real_process_has_no_traceback() -> None:
    done = graftvit("train", "--epoch", "3")
    assert done.returncode == 2
    assert done.stderr == "graftvit: error: unknown flag '--epoch', did you mean '--epochs'?\n"


def test_output_into_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m graftvit.launch train --help | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert result.stderr == ""


def fake_engine(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> list[RunConfig]:
    """Stand in for the engine: these tests are of what the command does with its outcome."""
    seen: list[RunConfig] = []

    def train(config: RunConfig) -> Any:
        seen.append(config)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setitem(sys.modules, "graftvit.transfer.engine.train", SimpleNamespace(train=train))
    for check in ("check_first", "check_places"):
        monkeypatch.setattr(f"graftvit.launch.commands.train.{check}", lambda config: None)
    return seen


def result(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{"signal": None, "steps": 7, "output_dir": Path("runs/x"), "metrics": {}} | changes
    )


def test_the_engine_gets_the_resolved_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fake_engine(monkeypatch, result())
    assert main(["train", "cifar10_copy", "--epochs", "2"]) == 0
    assert seen == [load_config("cifar10_copy", ["epochs=2"])]


@pytest.mark.parametrize(("signum", "name"), [(2, "SIGINT"), (12, "SIGUSR2"), (15, "SIGTERM")])
def test_a_signal_is_the_exit_code_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, typed: Typed, signum: int, name: str
) -> None:
    fake_engine(monkeypatch, result(signal=signum))
    shown = typed("train", code=128 + signum).err
    assert name in shown
    assert "step 7" in shown
    assert "the same command continues" in shown
    assert "with --resume auto continues" in typed("train", "--resume", "never", code=128 + signum).err


def test_errors_exit_with_their_own_code(monkeypatch: pytest.MonkeyPatch, typed: Typed) -> None:
    fake_engine(monkeypatch, GraftError("first\n second"))
    assert complaint(typed, "train") == "graftvit: error: first second\n"
    fake_engine(monkeypatch, RunFailedError("the disk is full"))
    complaint(typed, "train", code=1)
    fake_engine(monkeypatch, KeyboardInterrupt())
    assert typed("train", code=130).err == "graftvit: stopped by Ctrl-C\n"


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_engine(monkeypatch, ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError):
        main(["train"])


def test_the_rank_is_named_where_there_are_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    main(["train", "--epoch", "1"])
    assert "graftvit: rank 2: error:" in capsys.readouterr().err


def test_a_rank_that_only_lost_another_says_so_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:2245")
    fake_engine(monkeypatch, lost)
    with pytest.raises(RuntimeError, match="closed by peer"):  # one process has no other
        main(["train", "digits_scratch"])
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setattr(cli, "_run", lambda words: (_ for _ in ()).throw(lost))
    monkeypatch.setattr("graftvit.launch.launcher.prepare_process", lambda: None)
    assert main(["train", "digits_scratch"]) == 1
    assert "graftvit: rank 2: error: another process of this run has ended" in capsys.readouterr().err


def test_demo_hands_on_what_it_was_told(
    monkeypatch: pytest.MonkeyPatch, typed: Typed, tmp_path: Path
) -> None:
    seen: list[tuple[Path, bool, dict[str, Any]]] = []

    def run_demo(output_dir: Path, quick: bool, **more: Any) -> Path:
        seen.append((output_dir, quick, more))
        return output_dir / "report.html"

    monkeypatch.setitem(sys.modules, "graftvit.transfer.analysis.demo", SimpleNamespace(run_demo=run_demo))
    said = typed("demo", "--quick", "--output-dir", tmp_path)
    typed("demo --seeds 7 9 --processes 3 --threads 2")
    typed("demo --dataset fashion_mnist --data_path", tmp_path, "--download")
    plain = {
        "dataset": "digits",
        "data_path": None,
        "download": False,
        "seeds": None,
        "processes": None,
        "threads": 1,
    }
    photographs = {"dataset": "fashion_mnist", "data_path": tmp_path, "download": True}
    assert seen == [
        (tmp_path, True, plain),
        (Path("demo"), False, plain | {"seeds": [7, 9], "processes": 3, "threads": 2}),
        (Path("demo_fashion_mnist"), False, plain | photographs),
    ]
    assert str(tmp_path / "report.html") in said.out
    assert "--seeds" in complaint(typed, "demo", "--seeds", "7..9")
    (tmp_path / "file").write_text("")
    assert "file" in complaint(typed, "demo", "--output_dir", str(tmp_path / "file"))


STEERING = "\x1b[31mred\x07\u202e"


def test_names_steer_no_terminal(tmp_path: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(f"{STEERING}.yaml")
    mistakes = (["train", str(folder)], ["train", f"--{STEERING}", "1"], [STEERING], ["evaluate", STEERING])
    for words in mistakes:
        said = typed(*words, code=2)
        assert (said.out + said.err).replace("\n", "").isprintable()
        assert r"\x1b[31mred\x07\u202e" in said.err
        assert said.err.count("\n") == 1


def test_what_a_command_and_a_log_say_steers_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"{STEERING}\n\tx\n")
    say_aside(f"{STEERING}\n")
    record = logging.LogRecord("graftvit", logging.WARNING, "", 0, "skipped %s", (STEERING,), None)
    assert PlainFormatter("%(message)s").format(record) == "skipped \\x1b[31mred\\x07\\u202e"
    said = capsys.readouterr()
    assert said.out == "\\x1b[31mred\\x07\\u202e\n\tx\n"
    assert said.err == "\\x1b[31mred\\x07\\u202e\n"


def test_an_error_of_the_system_is_one_sentence(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(words: list[str]) -> int:
        Path("a" * 6_000).stat()
        return 0

    monkeypatch.setattr(cli, "_run", refused)
    said = typed("list", "recipes", code=1).err
    assert re.fullmatch(r"graftvit: error: a+\.\.\.\(6,001 characters\)\.\.\.a+: File name too long\n", said)


def test_a_current_folder_that_is_gone_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: Typed
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert "the current folder does not exist" in typed("jobs", code=2).err


INTERRUPTED = """
import builtins, runpy, sys
real = builtins.__import__
def load(name, *rest, **more):
    if name.endswith("{module}"):
        raise KeyboardInterrupt
    return real(name, *rest, **more)
builtins.__import__ = load
{start}
"""
AS_MODULE = "runpy.run_module('graftvit.launch', run_name='__main__')"
AS_SCRIPT = "from graftvit.launch.__main__ import main; sys.exit(main())"


@pytest.mark.parametrize("start", [AS_MODULE, AS_SCRIPT])
@pytest.mark.parametrize("module", ["cli", "submitted", "logging"])
def test_ctrl_c_while_the_command_is_loaded_is_no_traceback(start: str, module: str) -> None:
    done = python(INTERRUPTED.format(module=module, start=start))
    assert (done.returncode, done.stderr) == (130, "graftvit: stopped by Ctrl-C\n")


def test_a_loader_process_that_dies_while_this_one_computes_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, typed: Typed
) -> None:
    """torch's handler of SIGCHLD raises wherever the process is."""

    def run(_: list[str]) -> int:
        raise RuntimeError("DataLoader worker (pid 41) is killed by signal: Killed. ")

    monkeypatch.setattr("graftvit.launch.commands.list.run", run)
    said = typed("list", "recipes", code=2).err
    assert said.startswith("graftvit: error: a loader process died (DataLoader worker (pid 41) is killed")
    assert said.endswith("try a smaller data.workers\n")


def test_what_a_command_loads_is_hardly_searched_for_garbage() -> None:
    """By its own thresholds Python would search about 850 times."""
    program = (
        "import gc, sys; from graftvit.launch.__main__ import main; sys.argv[1:] = ['--version']; main(); "
        "import timm; print(gc.get_stats()[0]['collections'])"
    )
    done = python(program)
    assert int(done.stdout.split()[-1]) < 500


def test_before_ctrl_c_is_listened_to_next_to_nothing_is_loaded() -> None:
    loaded = (
        "import sys; old = set(sys.modules); import graftvit.launch.__main__; print(set(sys.modules) - old)"
    )
    done = python(loaded)
    names = ast.literal_eval(done.stdout)
    ours = {"graftvit", "graftvit.launch", "graftvit.launch.__main__"}
    assert {name for name in names if name.startswith("graftvit")} == ours
    assert "importlib.metadata" not in names


def test_a_command_that_loads_torch_says_nothing_beside_its_output() -> None:
    """A library may count at the end what was not cleared, and tell of it."""
    command = [sys.executable, "-m", "graftvit.launch", "list", "operators"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "performer" in done.stdout
    assert done.stderr == ""


ENDING = """
import gc, sys
from graftvit.launch.launcher import collect_seldom
{library}

class Cleared:
    def __del__(self):
        print("cleared")

collect_seldom()
one = Cleared()
one.itself = one
del one
"""


def test_nothing_is_cleared_at_the_end_unless_a_library_counts_it() -> None:
    for library, printed in (("", ""), ("class nb_type_0(type): pass", "cleared\n")):
        program = ENDING.format(library=library)
        done = python(program)
        assert done.stdout == printed


def test_output_that_cannot_be_written_is_told_at_the_end() -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        command = [sys.executable, "-m", "graftvit.launch", "list", "recipes"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode != 0
    assert b"No space left" in done.stderr


LAUNCH = Path(__file__).parents[2] / "launch"


def test_a_shell_takes_a_hint_as_it_was_meant() -> None:
    folder = Path("/a b/lr=1e-3,seed=0/it's $HOME;x")
    script = f'graftvit() {{ printf "%s\\n" "$@"; }}; {hint("jobs", folder, "--lines", 3)}'
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["jobs", str(folder), "--lines", "3"]


def test_a_plain_folder_stays_plain() -> None:
    assert (
        hint("jobs", "resume", Path("/scratch/me/cells/lr=1,seed=0"))
        == "graftvit jobs resume /scratch/me/cells/lr=1,seed=0"
    )


@pytest.mark.parametrize("path", sorted(LAUNCH.rglob("*.py")), ids=lambda path: str(path.relative_to(LAUNCH)))
def test_commands_with_values_in_them_are_hints(path: Path) -> None:
    """An f-string that puts a folder into `graftvit jobs FOLDER` by itself does not quote it."""
    unquoted = re.findall(
        r"graftvit [a-z]+ [^\"'`]*\{(?!shlex\.quote|hint\()[^}]*\}", path.read_text(encoding="utf-8")
    )
    assert not unquoted


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("word", ["--output_dir=~/x", "--output-dir=~/x", "output_dir=~/x"])
def test_flags_and_words(word: str, home: Path) -> None:
    settings = parse_command(command_parser("train", "", []), [word])[1]
    assert load_config(None, settings).output_dir == home / "x"


def test_every_setting_that_may_be_a_path(home: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("output_dir: ~/runs\ndata: {data_path: ~/images}\nstudent: {init: local-dir:~/mae}\n")
    config = load_config(recipe, ["teacher.source=~/teacher"])
    assert config.output_dir == home / "runs"
    assert (config.data.data_path, config.student.init) == (f"{home}/images", f"local-dir:{home}/mae")
    assert config.teacher.source == f"{home}/teacher"
    assert load_config(None, {"output_dir": Path("~/x")}).output_dir == home / "x"


def test_the_home_of_another_user() -> None:
    root = pwd.getpwuid(os.getuid())
    assert at_home(f"~{root.pw_name}/x") == f"{root.pw_dir}/x"


@pytest.mark.parametrize("text", ["~nobody-has-this-name/x", "a~/x", "./~/x", "*: linear", "hf-hub:a/~b"])
def test_what_names_no_home_stays(text: str) -> None:
    assert at_home(text) == text


def test_flags_of_a_command_of_its_own(home: Path, typed: Typed) -> None:
    typed("jobs", "--json")
    typed("jobs", "summary", home / "none", code=2)
    assert (
        f"--site {home}/mine.yaml does not exist"
        in typed("submit digits_distill '--site=~/mine.yaml'", code=2).err
    )


def test_a_whole_command(home: Path, typed: Typed) -> None:
    assert (
        str(home / "none")
        in typed("train digits_distill '--output_dir=~/run' 'teacher.source=~/none' --dry_run", code=2).err
    )
