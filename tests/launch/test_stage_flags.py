"""Settings of one stage, by its name on the command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from graftvit.launch.flags import Parser, parse_command
from graftvit.launch.load_config import load_config, load_stages
from graftvit.models.errors import ConfigError
from graftvit.transfer.engine.stages import Stage
from support.runs.typed import Typed


def stages(*words: str, recipe: str = "recover_vit_base") -> dict[str, Stage]:
    """The stages of a recipe with words as a user types them."""
    _, settings = parse_command(Parser(prog="graftvit train"), list(words))
    return {stage.name: stage for stage in load_stages(recipe, settings)}


@pytest.mark.parametrize(
    "words",
    [["--align.epochs", "1"], ["--align.optim.epochs=1"], ["align.epochs=1"], ["align.optim.epochs=1"]],
)
def test_a_setting_reaches_its_stage_alone(words: list[str]) -> None:
    before, after = stages(), stages(*words)
    assert after["align"].config.optim.epochs == 1
    assert before["align"].config.optim.epochs == 2
    assert all(after[name].config == before[name].config for name in ("features", "task"))


def test_a_switch_and_a_setting_of_a_section_with_the_same_name() -> None:
    assert not any(
        stage.config.engine.progress for stage in stages("--no-progress", "--no-task.progress").values()
    )
    off = stages("--no-features.engine.progress")
    assert [off[name].config.engine.progress for name in off] == [True, False, True]
    found = stages("--features.student.compile", "--task.blr", "2e-4", "--align.match", "map")
    assert [found[name].config.student.compile for name in found] == [False, True, False]
    assert found["task"].config.optim.blr == 2e-4
    assert found["align"].config.align.match == "map"  # the setting align.match


def test_a_later_word_for_all_stages_replaces_it() -> None:
    found = stages("--align.batch_size", "4", "--batch_size", "8", "--task.batch_size", "2")
    assert [stage.config.data.batch_size for stage in found.values()] == [8, 8, 2]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--aling.epochs=1", r"--aling.epochs: there is no stage 'aling'; did you mean 'align'"),
        ("--align.epoch=1", r"unknown flag '--align.epoch'"),
        ("--align.epochs=x", r"--align.epochs is 'x', but must be a whole number"),
    ],
)
def test_a_wrong_word_is_named(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stages(word)


def test_a_recipe_without_stages_has_no_such_flag() -> None:
    with pytest.raises(ConfigError, match=re.escape("unknown flag '--align.epochs', did you mean")):
        load_config("digits_distill", parse_command(Parser(prog="train"), ["--align.epochs", "1"])[1])
    with pytest.raises(ConfigError, match=re.escape("unknown key 'align.epochs', did you mean")):
        load_config("digits_distill", ["align.epochs=1"])


def test_the_command_prints_it(typed: Typed, tmp_path: Path) -> None:
    words = ["train", "recover_vit_base", "--align.epochs", "1", f"--output_dir={tmp_path}", "--print_config"]
    printed = typed(*words).out.split("# stage ")
    assert [re.findall(r"\n  epochs: (\d+)", text) for text in printed[1:]] == [["1"], ["10"], ["30"]]
