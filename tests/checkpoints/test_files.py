"""What is read from files, and what is no file: nothing is waited for, and nothing endless is read."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graftvit.checkpoints import files as json_lines
from graftvit.checkpoints import files as paths
from graftvit.checkpoints.describe import describe_file
from graftvit.checkpoints.files import (
    append_line,
    check_regular,
    near_path,
    open_lines,
    open_regular,
    parse_record,
    read_records,
    read_regular,
)
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.pretrained import load, load_pretrained, load_weights
from graftvit.checkpoints.student import save
from graftvit.checkpoints.weight_files import read_file
from graftvit.models.errors import CheckpointError, ConfigError
from safetensors.torch import load_file, save_file
from support.files.hostile import ARCHITECTURE, ARGUMENTS, weights
from support.files.hostile_configs import small_model, write_model
from support.files.irregular_files import KINDS, irregular
from torch import Tensor


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("read", [check_regular, open_regular, read_regular])
def test_what_is_no_regular_file_is_refused_by_its_kind(kind: str, read: object, tmp_path: Path) -> None:
    path = irregular(kind, tmp_path / "it")
    with pytest.raises(ConfigError, match=rf"it is {KINDS[kind]}, not a regular file"):
        read(path, refusal=ConfigError)  # type: ignore[operator]


def test_a_file_that_became_a_pipe_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = irregular("pipe", tmp_path / "it")
    monkeypatch.setattr("graftvit.checkpoints.files.check_regular", lambda *_, **__: path)
    with pytest.raises(CheckpointError, match="is no regular file"):
        open_regular(path)


def test_a_file_without_end_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(5 << 30)
    with pytest.raises(CheckpointError, match=r"config.json is refused: it has more than 16,777,216 bytes"):
        read_regular(path)


def test_text_is_read_up_to_the_limit_and_must_be_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("é" * 10, encoding="utf-8")
    assert read_regular(path, limit=20) == "é" * 10
    with pytest.raises(CheckpointError, match="more than 19 bytes"):
        read_regular(path, limit=19)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="no UTF-8 text"):
        read_regular(path)


def test_a_path_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "in" / "a").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="outside of"):
        check_regular(tmp_path / "in" / "a", tmp_path / "in")


# What a mistyped path is told.


@pytest.mark.parametrize(("typed", "near"), [
    ("runs/techer", "runs/teacher"), ("runs/techer/student", "runs/teacher/student"),
    ("rums/teacher/student", "runs/teacher/student"), ("rums/other", "runs"),
    ("runs/teachers.yml", "runs/teachers.yaml"), ("runs/hiden", ""), ("runs/.hiden", "runs/.hidden"),
    ("runs/nothing-like-it", ""), ("", ""), ("runs/a\0b", ""), (f"runs/{'x' * 5000}", ""),
])  # fmt: skip
def test_the_nearest_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, near: str) -> None:
    for folder in ("teacher/student", ".hidden"):
        (tmp_path / "runs" / folder).mkdir(parents=True)
    (tmp_path / "runs" / "teachers.yaml").touch()
    monkeypatch.chdir(tmp_path)
    assert near_path(typed) == (f"did you mean {near!r}?" if near else "")
    absolute = str(tmp_path / near)
    assert near_path(tmp_path / typed) == (f"did you mean {absolute!r}?" if near else "")


def test_files_are_left_out_where_a_folder_is_meant(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").touch()
    assert "run.yaml" in near_path(tmp_path / "run.yml")
    assert near_path(tmp_path / "run.yml", folders=True) == ""


@pytest.mark.parametrize(
    "name", ["vit", "vit_tiny.mae", "layers=first-6,seed=0~ab12", "größe", "+3", "a" * 180]
)
def test_a_name_may_be_part_of_a_path(name: str) -> None:
    assert paths.safe_name(name, "x") == name


@pytest.mark.parametrize("name", [
    "", ".", "..", ".hidden", "a/b", "../a", "/a", "a\\b", "a\0", "a\n", "C:", "a b", "~", "a" * 181, "ö" * 91,
])  # fmt: skip
def test_any_other_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^compare\.plans: '.*' is no name of a file: "):
        paths.safe_name(name, "compare.plans")
    with pytest.raises(CheckpointError):
        paths.safe_name(name, "x", refusal=CheckpointError)


# JSON Lines: a cut line keeps to itself, is left out, and is spoken of.


ROOT = Path(__file__).resolve().parents[2]


def added(path: Path, *lines: str) -> None:
    with open_lines(path) as file:
        for line in lines:
            append_line(file, line)


def test_a_line_after_a_cut_one_is_a_line_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    added(path, '{"a": 1}')
    with path.open("ab") as file:
        file.write(b'{"a": 2, "lo')
    added(path, '{"a": 3}', '{"a": 4}')
    assert path.read_text() == '{"a": 1}\n{"a": 2, "lo\n{"a": 3}\n{"a": 4}\n'
    with caplog.at_level(logging.WARNING):
        assert read_records(path) == [{"a": 1}, {"a": 3}, {"a": 4}]
        assert read_records(path) == [{"a": 1}, {"a": 3}, {"a": 4}]
    (message,) = caplog.messages  # once, for readers that look again and again
    assert message == f"{path}: left out line 2, which is no whole record"


def test_a_record_without_its_line_end_is_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}')
    with caplog.at_level(logging.WARNING):
        assert read_records(path) == [{"a": 1}, {"a": 2}]
    added(path, '{"a": 3}')
    assert read_records(path) == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert not caplog.messages


def test_many_lines_that_are_none_are_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\x00" * 4096 + b"\nnull\n7\n[]\n" + b'{"a": 1}\n' + b"\xff\n" * 20)
    with caplog.at_level(logging.WARNING):
        assert read_records(path) == [{"a": 1}]
    (message,) = caplog.messages
    assert message == f"{path}: left out lines 1, 2, 3, 4 and 20 more, which are no whole records"


@pytest.mark.parametrize("line", [
    '{"a": ' * 100_000, '{"a": ' + "[" * 100 + "]" * 100 + "}", '{"a": ' + "9" * 5_000 + "}",
    '{"a": "' + "b" * json_lines.LINE + '"}',
], ids=["no end", "deep", "long number", "long"])  # fmt: skip
def test_what_no_record_is_like_is_none(line: str, tmp_path: Path) -> None:
    assert parse_record(line.encode()) is None
    path = tmp_path / "a.jsonl"
    path.write_text(f'{line}\n{{"a": 1}}\n')
    assert read_records(path) == [{"a": 1}]


def test_a_pipe_or_too_large_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, kind in ((pipe, "a pipe"), (Path("/dev/zero"), "a device")):
        with pytest.raises(CheckpointError, match=f"{path} is {kind}"):
            read_records(path)
    monkeypatch.setattr(json_lines, "SIZE", 10)
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1234}\n')
    with pytest.raises(CheckpointError, match="more than 10 bytes"):
        read_records(path)


def test_a_file_that_is_not_there_has_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path / "a.jsonl") == []


def test_other_kinds_of_line_ends_are_part_of_a_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    added(path, json.dumps({"a": "one\u2028two\x85three"}, ensure_ascii=False))
    assert read_records(path) == [{"a": "one\u2028two\x85three"}]


OPENS = re.compile(r"""open\(\s*["']a|json\.loads\((?:line|row)\b""")
NO_RECORDS = {
    "launch/slurm/environment.py": "what submitit's local controller says",
    "transfer/engine/cached_targets.py": "a lock, which is empty",
    "transfer/cells.py": "what a process of a cell says",
}


def test_nobody_else_adds_lines_or_reads_records_from_them() -> None:
    """One writer and one reader know a cut line; files in which nobody looks for records may be added to."""
    packages = ("models", "checkpoints", "transfer", "launch")
    found = {
        str(path.relative_to(ROOT))
        for package in packages
        for path in (ROOT / package).rglob("*.py")
        if OPENS.search(path.read_text())
    }
    assert found - set(NO_RECORDS) == {"checkpoints/files.py"}


# What files hold beside weights; `safety/test_hostile_files.py` has those that are refused.


def test_a_namespace_alone_is_read(tmp_path: Path) -> None:
    torch.save(
        {"model": {"a": torch.ones(2)}, "args": argparse.Namespace(lr=0.1, name="x")}, tmp_path / "a.pth"
    )
    assert read_file(tmp_path / "a.pth").tree["args"].lr == 0.1
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # allowed here only


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(0.5), np.int64(3), np.bool_(True)])
def test_numbers_of_numpy_are_read(number: Any, is_zip: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"model": {"a": torch.ones(2)}, "best": number}, path, _use_new_zipfile_serialization=is_zip)
    assert read_file(path).tree["best"] == number
    assert f"  best: {number}" in describe_file(path)


@pytest.mark.parametrize(
    "tree", [torch.zeros(2), [torch.zeros(2)], 3, {"epoch": 3}, {}, {"model": {}}, {"model": 3}]
)
def test_what_holds_no_weights_is_refused(tmp_path: Path, tree: Any) -> None:
    torch.save(tree, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"odd\.pth (holds a|is of no known format)"):
        load_pretrained(str(tmp_path / "odd.pth"))


def test_a_file_that_needs_too_much_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / "m.safetensors")

    def none_left(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("graftvit.checkpoints.weight_files.safe_open", none_left)
    with pytest.raises(CheckpointError, match=r"m\.safetensors .* [\d,]+ bytes need more memory"):
        read_file(tmp_path / "m.safetensors")


# Numbers that are finite in a file and infinite in the kind of number that they become are refused.


def with_value(tensors: dict[str, Tensor], name: str, value: float) -> dict[str, Tensor]:
    """The tensors in float64, with one number of another value."""
    wide = {key: tensor.double() for key, tensor in tensors.items()}
    wide[name].view(-1)[0] = value
    return wide


@pytest.mark.parametrize("value", [1e300, -1e39, float(torch.finfo(torch.float32).max) * 1.01])
@pytest.mark.parametrize("name", ["blocks.0.attn.qkv.weight", "pos_embed", "norm.bias"])
def test_a_number_beyond_float32_is_refused(name: str, value: float, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(with_value(weights(), name, value), path)
    with pytest.raises(CheckpointError, match=f"values that are not finite as float32 in {name}"):
        load_pretrained(str(path), model=ARCHITECTURE, model_args=ARGUMENTS)
    model, _, _ = small_model("plain")
    with pytest.raises(CheckpointError, match=f"not finite as float32 in {name}"):
        load_weights(model, str(path))


def test_a_number_beyond_float32_in_the_part_of_a_teacher_is_refused(tmp_path: Path) -> None:
    path = write_model("copied", tmp_path / "m") / "model.safetensors"
    name = "teacher.model.blocks.0.attn.qkv.weight"
    save_file(with_value(load_file(path), name, 1e300), path)
    with pytest.raises(CheckpointError, match=f"not finite as float32 in {name}"):
        load(tmp_path / "m")


def test_numbers_of_float64_within_float32_load(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(with_value(weights(), "norm.bias", 3e38), path)
    model = load_pretrained(str(path), model=ARCHITECTURE, model_args=ARGUMENTS).model
    assert model.state_dict()["norm.bias"][0] == torch.tensor(3e38)


def test_a_smaller_kind_of_number_that_cannot_hold_the_weights_is_refused(tmp_path: Path) -> None:
    folder = write_model("plain", tmp_path / "m")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["norm.bias"][0] = 1e6
    save_file(tensors, path)
    assert load(folder, dtype=torch.bfloat16).norm.bias.isfinite().all()
    with pytest.raises(CheckpointError, match=r"not finite as float16 in norm\.bias"):
        load(folder, dtype=torch.float16)
    with pytest.raises(CheckpointError, match=r"not finite as float16 in norm\.bias"):
        save(folder, tmp_path / "half", dtype=torch.float16)
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize("name", ["mean", "std"])
def test_two_numbers_for_three_channels_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="2 numbers for 3 channels"):
        Preprocessing.read({"input_size": (3, 32, 32), name: [0.9, 0.1]})
    assert Preprocessing.read({"input_size": (3, 32, 32), name: [0.9]}).described()[name] == [0.9] * 3
    assert Preprocessing.read({"input_size": (1, 32, 32), name: [0.9, 0.5, 0.1]}).described()[name] == [0.9]
