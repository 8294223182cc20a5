"""A URL is refused by name wherever a path on this machine is meant: nothing is written into a folder named `s3:`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest
from graftvit.checkpoints.atomic import WriteFailedError, write_folder, write_text
from graftvit.checkpoints.files import is_url
from graftvit.checkpoints.sources import parse_source
from graftvit.launch.cli import dispatch
from graftvit.launch.fields import leaves
from graftvit.launch.flags import Parser
from graftvit.launch.load_config import load_config
from graftvit.models.errors import CheckpointError, ConfigError
from graftvit.transfer.config import DataConfig
from support.runs.command_words import command_words
from support.runs.typed import Typed

URLS = ("s3://bucket/run", "gs://bucket/run", "hf://org/name", "file:///tmp/run", "https://host/x.tar")
NAMES = {
    "teacher.source", "teacher.revision", "teacher.model", "student.model", "student.plan", "student.init",
    "transfer.layers", "transfer.heads", "data.dataset", "data.train_split", "data.val_split",
    "data.image_column", "data.label_column", "data.classes", "data.aa", "optim.opt", "optim.trainable",
    "transfer.cache",
}  # fmt: skip
"""Settings of text that are no path, any source of weights, or a place that may be in a bucket."""
WRITTEN = ("DIR", "FILE", "FOLDER", "OUT", "PNG", "ROWS", "RUN")
"""What help calls a path of this machine."""
COMMANDS_WITH_PATHS = {
    "benchmark operators", "benchmark models", "checkpoint inspect", "checkpoint strip", "checkpoint convert",
    "checkpoint save", "convert", "data", "demo", "deploy", "evaluate", "export", "hybrid", "jobs", "jobs logs",
    "jobs resume", "jobs stop", "jobs summary", "programs bench run", "programs bench extend", "programs bench merge",
    "programs bench query", "programs bench verify", "programs search", "programs search report", "push", "reproduce",
    "submit", "visualize",
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.glob("*:")), "a folder named like a scheme"


@pytest.mark.parametrize("url", URLS)
def test_urls_are_known(url: str) -> None:
    assert is_url(url)
    assert is_url(Path(url))


@pytest.mark.parametrize(
    "path", ["runs/a", "/runs/a", "C:/runs", "a:b", "run:1/x", "~/x", "", "./s3://bucket"]
)
def test_paths_are_no_urls(path: str) -> None:
    assert not is_url(path)


@pytest.mark.parametrize("url", URLS)
def test_each_setting_of_a_path_refuses_it_by_name(url: str) -> None:
    texts = {key for key, leaf in leaves().items() if {str, Path} & {*leaf.kinds}}
    assert texts > NAMES
    for key in texts - NAMES:
        with pytest.raises(
            ConfigError, match=rf"^{key} is '{url}': give a path on this machine, .* not a URL"
        ):
            load_config(None, [f"{key}={url}"])


@pytest.mark.parametrize("dataset", ["wds/shards", "tfds/mnist"])
def test_a_stream_is_read_from_a_url(dataset: str) -> None:
    assert DataConfig(dataset=dataset, data_path="https://host/shards").data_path == "https://host/shards"


def test_a_variable_of_a_node_may_not_hide_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from graftvit.transfer.staging import stage_folder

    monkeypatch.setenv("DISK", "s3://bucket")
    with pytest.raises(ConfigError, match=r"data\.stage=\$DISK is 's3://bucket' on .*not a URL"):
        stage_folder(DataConfig(stage="$DISK"))


class _SeenError(Exception):
    """The parser of a command, before it would parse."""


def parsers() -> Iterator[argparse.ArgumentParser]:
    """Return the parser of every command and of each of its actions."""
    with pytest.MonkeyPatch.context() as patch:

        def seen(parser: Parser, *arguments: object) -> None:
            raise _SeenError(parser)

        patch.setattr(Parser, "parse_args", seen)
        for words in command_words():
            try:
                dispatch([*words, "x"])
            except _SeenError as found:
                yield found.args[0]
            except ConfigError as error:
                if "unknown action 'x'" not in str(error):
                    raise


def test_each_argument_of_a_path_refuses_it_by_name() -> None:
    checked = set()
    for parser in parsers():
        for action in parser._actions:
            is_written = action.metavar in WRITTEN or action.dest in ("out", "output_dir")
            is_setting = action.dest in leaves() and action.type is None
            if action.dest == "source" or is_setting or not is_written:
                continue
            with pytest.raises(argparse.ArgumentError, match="not a URL"):
                parser._get_values(action, ["s3://bucket/x"])
            checked.add(parser.prog.removeprefix("graftvit "))
    assert checked == COMMANDS_WITH_PATHS


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "digits_distill", "--output_dir", "s3://bucket/run"], "--output_dir is 's3://bucket/run'"),
        (["train", "digits_distill", "--stage=s3://bucket/data"], "--stage is 's3://bucket/data'"),
        (
            ["train", "s3://bucket/mine.yaml"],
            "configuration: s3://bucket/mine.yaml: give a path on this machine",
        ),
        (["demo", "--output_dir", "s3://bucket/demo"], "argument --output_dir: 's3://bucket/demo'"),
        (["export", "x", "s3://bucket/x.onnx"], "argument OUT: 's3://bucket/x.onnx'"),
        (["push", "https://host/run", "me/vit"], "argument DIR: 'https://host/run'"),
        (["jobs", "s3://bucket/run"], "argument RUN: 's3://bucket/run'"),
    ],
)
def test_commands_say_so(words: list[str], told: str, typed: Typed) -> None:
    error = typed(*words, code=2).err
    assert told in error
    assert "not a URL" in error


@pytest.mark.parametrize("source", ["s3://bucket/x.pth", "hf://org/name", "local-dir:s3://bucket/run"])
def test_a_source_says_what_to_write(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"is a URL, .*hf-hub:org/name"):
        parse_source(source)


def test_nothing_is_written_there_from_python() -> None:
    with pytest.raises(WriteFailedError, match="not a URL"):
        write_text(Path("s3://bucket/x.json"), "{}")
    with pytest.raises(WriteFailedError, match="not a URL"):
        write_folder(Path("s3://bucket/student"), lambda folder: None, size=0)
