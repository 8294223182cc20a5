"""The command: what it writes, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from graftvit.launch.cli import main

TINY = ["--heads", "1", "--head_dim", "8", "--repeats", "2"]


def test_operators_are_measured_and_the_second_time_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["benchmark", "operators", "--operators", "kernel(feature=relu)", "ttt", "--tokens", "16", "36"]
    words += [*TINY, "--batch", "1", "2", "--output_dir", str(tmp_path / "new")]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "| kernel(feature=relu) |" in shown.out
    assert "[8/8] ttt, 36 tokens, batch 2" in shown.err
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "latency.png", "results.csv", "results.json", "table.md",
    ]  # fmt: skip
    assert main(words) == 0
    assert "8 of 8 cells are done" in capsys.readouterr().err


def test_models_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["benchmark", "models", "vit_tiny_patch16_224", "--plan", "*: linear", "0: kernel(feature=relu)"]
    assert (
        main([*words, "--img_size", "32", "--batch", "2", "--repeats", "2", "--output_dir", str(tmp_path)])
        == 0
    )
    assert "| 0: kernel(feature=relu) |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["operator"], "did you mean 'operators'"),
        (["operators", "--operators", "liner"], "did you mean 'linear'"),
        (["operators", "--tokens", "197"], "take 196 (14 x 14)"),
        (["operators", "--batch", "0"], "--batch"),
        (["operators", "--tokens", "x"], "--tokens"),
        (["operators", "--dtype", "float8"], "float8"),
        (["models", "--plan", "*: linear"], "SOURCE"),
        (["models", "vit_tiny_patch16_224"], "--plan"),
        (["models", "vit_tiny_patch16_224", "--plan", "linear"], "colon"),
        (["models", "vit_tiny_patch16_224", "--plan", "*: linear", "--img_size", "100"], "100"),
    ],
)
def test_mistakes_end_in_one_sentence(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            ["benchmark", *words, "--output_dir", str(tmp_path)] if len(words) > 1 else ["benchmark", *words]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_neither_batch_one_nor_224_pixels_alone_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "models", "--help"]) == 0
    assert "batch sizes (default: 1 16)" in " ".join(capsys.readouterr().out.split())
    assert main(["benchmark", "operators", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "batch sizes (default: 1 8)" in shown
    assert "(default: 64 196 576 1024 2304 4096)" in shown
    assert "examples: graftvit benchmark operators" in shown


def test_help_needs_no_torch() -> None:
    code = "import sys; from graftvit.launch.cli import main; main(['benchmark', '--help'])"
    code += "; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "graftvit benchmark models" in done.stdout
