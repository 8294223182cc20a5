from __future__ import annotations

import ast
import logging
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from graftvit.launch import cli, commands
from graftvit.launch.cli import GROUPS, main
from graftvit.launch.fields import leaves
from graftvit.launch.load_config import load_config
from graftvit.launch.say import PlainFormatter, say, say_aside
from graftvit.models.errors import GraftError, RunFailedError
from graftvit.transfer.config import RunConfig
from support.runs.command_words import command_words


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "graftvit.launch", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def complaint(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    """The one line on stderr that a mistake ends in."""
    assert main(list(words)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("graftvit: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def resolved(capsys: pytest.CaptureFixture[str], tmp_path: Path, *words: str) -> RunConfig:
    assert main([*words, "--print_config"]) == 0
    path = tmp_path / "resolved.yaml"
    path.write_text(capsys.readouterr().out)
    return load_config(path)


def test_help_imports_no_torch_and_has_examples() -> None:
    lines = [" ".join(words) for words in command_words()]
    code = (
        "import sys; from graftvit.launch.cli import main;"
        "codes = {main([*line.split(), '--help']) for line in sys.argv[1:]};"
        "heavy = {'torch', 'timm', 'accelerate', 'numpy', 'matplotlib', 'sklearn'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else codes != {0})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *lines], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    _, *examples = result.stdout.split("examples:")
    assert len(examples) == len(lines)
    assert all(f"graftvit {command}" in text for command, text in zip(lines, examples, strict=True))


def test_every_setting_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    flags = set(re.findall(r"--[a-z0-9_.-]+", capsys.readouterr().out))
    for key, leaf in leaves().items():
        assert flags & {f"--{key}", f"--{leaf.name}", f"--no-{leaf.name}", f"--no-{key}"}, key


def test_the_overview_has_every_command_in_one_group(capsys: pytest.CaptureFixture[str]) -> None:
    names = [name for group in GROUPS.values() for name in group]
    assert list(GROUPS) == ["start", "train", "models", "cluster", "analyze"]
    assert len(names) == len({*names})
    files = {path.stem for path in Path(commands.__path__[0]).glob("*.py")} - {"__init__"}
    assert files == {*names, "bench", "search"}, "the last two are actions of programs"
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown if line.startswith("  ") and "graftvit" not in line] == names
    assert main([]) == 2


def test_the_help_of_submit_has_the_flags_of_the_cluster_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--gpus_per_node" in shown
    assert "`graftvit train --help`" in shown
    assert "--blr" not in shown


def test_the_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("graftvit 0.")


def test_flags_beat_the_recipe_in_the_order_given(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = resolved(
        capsys, tmp_path, "train", "attention_distill_vit_large", "--blr", "5e-4", "optim.blr=6e-4",
        "--optim.blr=7e-4", "--batch-size", "8", "data.workers=0", "--fsdp", "--no-progress",
        "--layers", "2:5", "--data_path=/a=b",
        "student.model_args.depth=6", "--teacher", "local-dir:x", "--model", "vit_tiny_patch16_224",
    )  # fmt: skip
    assert config.optim.blr == 7e-4
    assert config.optim.epochs == 200
    assert (config.data.batch_size, config.data.workers, config.data.data_path) == (8, 0, "/a=b")
    assert config.engine.fsdp is True
    assert config.engine.progress is False
    assert config.transfer.layers == "2:5"
    assert config.student.model_args == {"depth": 6}
    assert (config.teacher.source, config.student.model) == ("local-dir:x", "vit_tiny_patch16_224")


def test_switches_go_both_ways(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert resolved(capsys, tmp_path, "train", "--fsdp", "--no_fsdp").engine.fsdp is False
    assert resolved(capsys, tmp_path, "train", "--no-fsdp", "--fsdp").engine.fsdp is True
    assert resolved(capsys, tmp_path, "train", "--fsdp", "false").engine.fsdp is False
    assert resolved(capsys, tmp_path, "train", "--fsdp", "true").engine.fsdp is True
    assert resolved(capsys, tmp_path, "train", "--engine.fsdp").engine.fsdp is True
    assert resolved(capsys, tmp_path, "train", "--fsdp=false").engine.fsdp is False
    assert resolved(capsys, tmp_path, "train", "--no-engine.progress").engine.progress is False


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
        (["checkpoint", "info", "x", "--blr", "1"], ["--blr", "teacher"]),
        (["demo", "--quik"], ["--quik"]),
    ],
)
def test_a_mistake_ends_in_one_sentence(
    words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = complaint(capsys, *words)
    for part in parts:
        assert part in found


def test_a_typo_in_a_real_process_has_no_traceback() -> None:
    result = run("train", "--epoch", "3")
    assert result.returncode == 2
    assert result.stderr == "graftvit: error: unknown flag '--epoch', did you mean '--epochs'?\n"


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
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], signum: int, name: str
) -> None:
    fake_engine(monkeypatch, result(signal=signum))
    assert main(["train"]) == 128 + signum
    shown = capsys.readouterr().err
    assert name in shown
    assert "step 7" in shown
    assert "the same command continues" in shown
    assert main(["train", "--resume", "never"]) == 128 + signum
    assert "with --resume auto continues" in capsys.readouterr().err


def test_errors_exit_with_their_own_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_engine(monkeypatch, GraftError("first\n second"))
    assert complaint(capsys, "train") == "graftvit: error: first second\n"
    fake_engine(monkeypatch, RunFailedError("the disk is full"))
    complaint(capsys, "train", code=1)
    fake_engine(monkeypatch, KeyboardInterrupt())
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "graftvit: stopped by Ctrl-C\n"


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


def test_demo_hands_on_what_it_was_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen: list[tuple[Path, bool, dict[str, Any]]] = []

    def run_demo(output_dir: Path, quick: bool, **more: Any) -> Path:
        seen.append((output_dir, quick, more))
        return output_dir / "report.html"

    monkeypatch.setitem(
        sys.modules, "graftvit.transfer.analysis.demo.demo", SimpleNamespace(run_demo=run_demo)
    )
    assert main(["demo", "--quick", "--output-dir", str(tmp_path)]) == 0
    assert main(["demo", "--seeds", "7", "9", "--processes", "3", "--threads", "2"]) == 0
    assert seen == [
        (tmp_path, True, {"seeds": None, "processes": None, "threads": 1}),
        (Path("demo"), False, {"seeds": [7, 9], "processes": 3, "threads": 2}),
    ]
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    assert "--seeds" in complaint(capsys, "demo", "--seeds", "7..9")
    (tmp_path / "file").write_text("")
    assert "file" in complaint(capsys, "demo", "--output_dir", str(tmp_path / "file"))


STEERING = "\x1b[31mred\x07\u202e"


def test_names_steer_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(f"{STEERING}.yaml")
    mistakes = (["train", str(folder)], ["train", f"--{STEERING}", "1"], [STEERING], ["evaluate", STEERING])
    for words in mistakes:
        assert cli.main(words) == 2
        said = capsys.readouterr()
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


def test_an_error_of_the_system_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(words: list[str]) -> int:
        Path("a" * 6_000).stat()
        return 0

    monkeypatch.setattr(cli, "_run", refused)
    assert cli.main(["list", "recipes"]) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(r"graftvit: error: a+\.\.\.\(6,001 characters\)\.\.\.a+: File name too long\n", said)


def test_a_current_folder_that_is_gone_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert main(["jobs"]) == 2
    assert "the current folder does not exist" in capsys.readouterr().err


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
    program = INTERRUPTED.format(module=module, start=start)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "graftvit: stopped by Ctrl-C\n")


def test_a_loader_process_that_dies_while_this_one_computes_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch's handler of SIGCHLD raises wherever the process is."""

    def run(_: list[str]) -> int:
        raise RuntimeError("DataLoader worker (pid 41) is killed by signal: Killed. ")

    monkeypatch.setattr("graftvit.launch.commands.list.run", run)
    assert main(["list", "recipes"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("graftvit: error: a loader process died (DataLoader worker (pid 41) is killed")
    assert said.endswith("try a smaller data.workers\n")


def test_what_a_command_loads_is_hardly_searched_for_garbage() -> None:
    """By its own thresholds Python would search about 850 times."""
    program = (
        "import gc, sys; from graftvit.launch.__main__ import main; sys.argv[1:] = ['--version']; main(); "
        "import timm; print(gc.get_stats()[0]['collections'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 500


def test_before_ctrl_c_is_listened_to_next_to_nothing_is_loaded() -> None:
    loaded = (
        "import sys; old = set(sys.modules); import graftvit.launch.__main__; print(set(sys.modules) - old)"
    )
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    names = ast.literal_eval(done.stdout)
    ours = {"graftvit", "graftvit.launch", "graftvit.launch.__main__"}
    assert {name for name in names if name.startswith("graftvit")} == ours
    assert "importlib.metadata" not in names
