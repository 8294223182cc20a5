"""Only regular files are read, and no more of them than was agreed; a pipe or a device is never waited for."""

from __future__ import annotations

from pathlib import Path

import pytest
from graftvit.checkpoints.files import check_regular, open_regular, read_regular
from graftvit.models.errors import CheckpointError, ConfigError
from support.files.irregular_files import KINDS, irregular


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("read", [check_regular, open_regular, read_regular])
def test_what_is_no_regular_file_is_refused_by_its_kind(kind: str, read: object, tmp_path: Path) -> None:
    path = irregular(kind, tmp_path / "it")
    with pytest.raises(ConfigError, match=rf"it is {KINDS[kind]}, not a regular file"):
        read(path, refusal=ConfigError)  # type: ignore[operator]


def test_a_file_that_became_a_pipe_since_it_was_looked_at_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
