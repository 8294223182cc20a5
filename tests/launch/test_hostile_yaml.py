"""YAML that would fill the memory, never ends, or says numbers that are none: one sentence each."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from graftvit.launch import cli
from graftvit.launch.load_config import load_config, parse_override, read_recipe
from graftvit.launch.slurm.site_file import ask
from graftvit.models.errors import ConfigError
from graftvit.models.plain_yaml import MAX_DEPTH, MAX_NODES, YamlError, parse_yaml
from graftvit.models.plan_syntax import parse_plan

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {
    "levels": ("[" * 20_000, "nests more than"),
    "block levels": ("\n".join("  " * n + "a:" for n in range(200)), "nests more than"),
    "bomb": (BOMB, "has more than"),
    "aliases": ("a: &a [1, 2]\nb: [" + "*a, " * MAX_NODES + "]", "has more than"),
    "self": ("&a [*a]", "holds itself"),
    "self, deep": ("a: &a {b: {c: *a}}", "holds itself"),
    "digits": ("a: " + "9" * 5_000, "a whole number of more than"),
    "base 60": ("a: !!int " + ":".join(["1"] * 400_000), "a whole number of more than"),
    "tag": ("a: !!bool x", "has an invalid value"),
    "time": ("a: !!timestamp x", "has an invalid value"),
    "int": ("a: !!int ''", "has an invalid value"),
    "key": ("? [1]\n: 2", "a key is not text"),
    "merge": ("a: !!merge x\n", "could not determine a constructor"),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_text_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    text, sentence = HOSTILE[name]
    with pytest.raises(YamlError, match=sentence):
        parse_yaml(text)
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=sentence):
        ask({}, path)


def test_an_alias_of_a_reasonable_size_is_what_it_stands_for() -> None:
    assert parse_yaml("a: &a [1, 2]\nb: *a\nc: {d: *a}") == {"a": [1, 2], "b": [1, 2], "c": {"d": [1, 2]}}
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_yaml(deep) is not None
    with pytest.raises(YamlError):
        parse_yaml(f"[{deep}]")


@pytest.mark.parametrize("word", ["student.model_args={a: " + "[" * 20_000, "student.model_args=&a {b: *a}"])
def test_a_word_of_the_command_line_is_refused_too(word: str) -> None:
    with pytest.raises(ConfigError, match=r"student\.model_args"):
        load_config(None, [word])


@pytest.mark.parametrize(
    "word", ["*: linear(feature=" + "[" * 20_000 + ")", "*: linear(a=!!int x)", "*: linear(a=.nan)"]
)
def test_an_option_of_a_plan_is_refused_too(word: str) -> None:
    with pytest.raises(ConfigError, match="a value is a"):
        parse_plan(word, 2)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(5 << 30)


@pytest.mark.parametrize("make", [pipe, device, folder, large])
def test_only_regular_files_of_a_bounded_size_are_read(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "it.yaml")
    with pytest.raises(ConfigError, match=r"it\.yaml"):
        load_config(tmp_path / "it.yaml")
    (tmp_path / "mine.yaml").write_text("base: it.yaml")
    with pytest.raises(ConfigError, match=r"it\.yaml"):
        read_recipe(tmp_path / "mine.yaml")
    with pytest.raises(ConfigError, match=r"it\.yaml"):
        ask({}, tmp_path / "it.yaml")


@pytest.mark.parametrize("base", ["/dev/zero", "[1, 2]", "5", '"a\\0b"', "a" * 6_000])
def test_a_base_that_is_no_file_is_refused(base: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"base: {base}")
    with pytest.raises(ConfigError):
        read_recipe(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "optim: {blr: .inf}", "optim: {blr: .nan}", "optim: {lr: -.inf}", "transfer: {weight: .inf}",
        "optim: {betas: [0.9, .nan]}", "data: {crop_scale: [.nan, 1.0]}", "optim: {clip_grad: .inf}",
        "student: {model_args: {init_values: .nan}}", "student: {model_args: {a: [1, {b: .inf}]}}",
        "engine: {stop_grace: .inf}", "seed: 1" + "0" * 30, "optim: {epochs: 1" + "0" * 400 + "}",
        "student: {model_args: {depth: 1" + "0" * 30 + "}}",
    ],
)  # fmt: skip
def test_a_number_is_finite(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    key = text.partition(":")[0]
    with pytest.raises(ConfigError, match=rf"mine\.yaml: {key}.*(finite|below 2\^63)"):
        load_config(path)


@pytest.mark.parametrize(
    "text",
    [
        'output_dir: "a\\0b"', 'data: {data_path: "a\\0b"}', 'teacher: {source: "a\\0b"}',
        'student: {model_args: {"a\\0b": 1}}', 'student: {model_args: {a: ["\\0"]}}', 'data: {classes: ["a\\0"]}',
        'transfer: {layers: "0\\0"}',
    ],
)  # fmt: skip
def test_text_has_no_nul(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="NUL"):
        load_config(path)


def test_the_site_file_says_numbers_and_text_that_can_be(tmp_path: Path) -> None:
    for text in (
        "nodes: .inf",
        "nodes: .nan",
        'partition: "a\\0b"',
        'setup: ["a\\0b"]',
        "sbatch: {nice: .nan}",
    ):
        (tmp_path / "site.yaml").write_text(text)
        with pytest.raises(ConfigError):
            ask({}, tmp_path / "site.yaml").config()


@pytest.mark.parametrize(
    "words",
    [
        ["train", "a" * 6_000, "--print_config"],
        ["train", "a" * 6_000 + ".yaml", "--print_config"],
        ["train", "/" + "a/" * 3_000 + "x=1", "--print_config"],
        ["submit", "--site", "a" * 6_000],
        ["evaluate", "a" * 6_000],
        ["evaluate", "local-dir:" + "a" * 6_000],
        ["evaluate", "a" * 6_000 + ".pth"],
        ["jobs", "a" * 6_000],
    ],
)
def test_a_path_that_no_file_can_have_is_one_sentence(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) in (1, 2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert len(said) < 2_000


def test_an_override_keeps_the_text_that_it_is() -> None:
    assert parse_override("output_dir=[[").value == "[["
