"""Files that are damaged, or would run code, are refused in one sentence."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graftvit.checkpoints.files import read_file
from graftvit.checkpoints.teacher import load_teacher
from graftvit.models.errors import CheckpointError
from safetensors.torch import save_file


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.sentinel, "boom")


class SystemBomb(Bomb):
    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {self.sentinel}",)


class EvalBomb(Bomb):
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({str(self.sentinel)!r}, 'w').close()",)


def as_raw_pickle(tree: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(tree, protocol=2))


def as_legacy(tree: Any, path: Path) -> None:
    torch.save(tree, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("bomb", [Bomb, SystemBomb, EvalBomb])
@pytest.mark.parametrize("save", [torch.save, as_raw_pickle, as_legacy])
@pytest.mark.parametrize("wrap", [lambda b: b, lambda b: {"model": {"a": torch.zeros(1)}, "args": b}])
@pytest.mark.parametrize("suffix", ["pth", "bin", "pt"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(
    tmp_path: Path,
    bomb: type[Bomb],
    save: Callable[[Any, Path], None],
    wrap: Callable[[Any], Any],
    suffix: str,
) -> None:
    sentinel = tmp_path / "sentinel"
    path = tmp_path / f"evil.{suffix}"
    save(wrap(bomb(sentinel)), path)
    for load in (lambda: read_file(path), lambda: load_teacher(str(path))):
        with pytest.raises(CheckpointError, match=r"evil\.\w+ is (refused|damaged)") as caught:
            load()
        assert "\n" not in str(caught.value)
    assert not sentinel.exists()


def test_a_bomb_hidden_in_the_allowed_namespace_is_refused(tmp_path: Path) -> None:
    sentinel, path = tmp_path / "sentinel", tmp_path / "evil.pth"
    torch.save({"model": {"a": torch.zeros(1)}, "args": argparse.Namespace(hook=SystemBomb(sentinel))}, path)
    with pytest.raises(CheckpointError, match=r"evil\.pth is refused: it holds posix\.system"):
        read_file(path)
    assert not sentinel.exists()


def test_a_namespace_alone_is_read(tmp_path: Path) -> None:
    torch.save(
        {"model": {"a": torch.ones(2)}, "args": argparse.Namespace(lr=0.1, name="x")}, tmp_path / "a.pth"
    )
    assert read_file(tmp_path / "a.pth").tree["args"].lr == 0.1
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # allowed here only


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 7, 20, 0.3, 0.9])
def test_a_truncated_file_is_named(tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"short.{suffix}"
    tensors = {"a": torch.randn(50, 50), "b": torch.randn(3)}
    torch.save(tensors, path) if suffix == "pth" else save_file(tensors, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=rf"short\.{suffix} is (damaged|empty)") as caught:
        read_file(path)
    assert "\n" not in str(caught.value)


def test_a_flipped_header_is_named_or_harmless(tmp_path: Path) -> None:
    """A plain safetensors file has no digest: what its reader cannot see, the check of keys will."""
    path = tmp_path / "flipped.safetensors"
    save_file({"a": torch.zeros(4, 4)}, path)
    content = path.read_bytes()
    for position in range(len(content) - 64):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        try:
            read_file(path)
        except CheckpointError as error:
            assert "flipped.safetensors" in str(error)  # noqa: PT017


@pytest.mark.parametrize("position", range(0, 900, 37))
def test_a_damaged_torch_file_ends_in_one_sentence(tmp_path: Path, position: int) -> None:
    path = tmp_path / "flipped.pth"
    torch.save({"model": {"a": torch.zeros(4, 4)}}, path)
    damaged = bytearray(path.read_bytes())
    damaged[position % len(damaged)] ^= 0xFF
    path.write_bytes(damaged)
    try:
        read_file(path)
    except CheckpointError as error:
        assert "flipped.pth" in str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    "tree", [torch.zeros(2), [torch.zeros(2)], 3, {"epoch": 3}, {}, {"model": {}}, {"model": 3}]
)
def test_what_holds_no_weights_is_refused(tmp_path: Path, tree: Any) -> None:
    torch.save(tree, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"odd\.pth (holds a|is of no known format)"):
        load_teacher(str(tmp_path / "odd.pth"))


def test_other_things_under_a_weights_suffix(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("readme", "hello")
    (tmp_path / "text.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    for name in ("zip.pth", "text.safetensors", "text.pth"):
        with pytest.raises(CheckpointError, match=name) as caught:
            read_file(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_file_for_which_there_is_no_memory_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / "m.safetensors")

    def none_left(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("graftvit.checkpoints.files.safe_open", none_left)
    with pytest.raises(
        CheckpointError, match=r"m\.safetensors cannot be read: its [\d,]+ bytes need more memory"
    ):
        read_file(tmp_path / "m.safetensors")
