"""Folders are replaced whole, and brought back after a death in between."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from graftvit.checkpoints.atomic import recover_folder, write_file, write_folder, write_shared, write_text
from graftvit.models.errors import CheckpointError


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(text: str, name: str = "a"):  # type: ignore[no-untyped-def]
    def write(folder: Path) -> None:
        (folder / name).write_text(text)

    return write


def test_a_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "student[1]"
    write_folder(target, fill("old", "gone"), size=3)
    (target.parent / ".student[1].0123456789ab.tmp").mkdir()
    write_folder(target, fill("new"), size=3)
    assert listed(target) == ["a"]
    assert listed(target.parent) == ["student[1]"]


def test_a_failure_while_filling_keeps_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "student"
    write_folder(target, fill("old"), size=3)

    def fail(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"student cannot be written: it needs 1,234 bytes") as caught:
        write_folder(target, fail, size=1234)
    assert caught.value.exit_code == 1
    assert (target / "a").read_text() == "old"
    assert listed(tmp_path) == ["student"]


def test_a_death_between_the_renames_is_recovered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "student"
    write_folder(target, fill("old"), size=3)
    rename = Path.rename

    def dying(self: Path, other: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise KeyboardInterrupt
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", dying)
    with pytest.raises(KeyboardInterrupt):
        write_folder(target, fill("new"), size=3)
    monkeypatch.undo()
    assert not target.exists()
    recover_folder(target)
    assert (target / "a").read_text() == "old"
    write_folder(target, fill("new"), size=3)
    assert (target / "a").read_text() == "new"
    assert listed(tmp_path) == ["student"]


def test_a_place_that_cannot_hold_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_file(tmp_path / "file" / "x", lambda path: None, size=0)


def test_a_pipe_or_a_device_is_not_replaced(tmp_path: Path) -> None:
    """As root, a new file in the place of /dev/full or /dev/stdout takes it from everybody."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for write in (write_text, lambda path, text: write_shared(path, text.encode(), replace=True)):
        with pytest.raises(CheckpointError, match="is a pipe"):
            write(pipe, "x")
    with pytest.raises(CheckpointError, match="is a pipe"):
        write_folder(pipe, fill("x"), size=1)
    assert pipe.is_fifo()
    assert listed(tmp_path) == ["pipe"]


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "kept").touch()
    target = tmp_path / "student"
    target.symlink_to(tmp_path / "theirs")
    for text in ("first", "second"):
        write_folder(target, fill(text), size=3)
        assert (target / "a").read_text() == text
    assert listed(tmp_path) == ["student", "theirs"]
    assert listed(tmp_path / "theirs") == ["kept"]


def test_leftovers_are_links_and_files_of_its_own_name_only(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "kept").touch()
    (tmp_path / ".x.json.0123456789ab.tmp").symlink_to(tmp_path / "theirs")
    (tmp_path / ".x.json.draft.tmp").touch()
    write_file(tmp_path / "x.json", lambda path: path.write_text(""), size=0)
    assert listed(tmp_path) == [".x.json.draft.tmp", "theirs", "x.json"]
    assert listed(tmp_path / "theirs") == ["kept"]
