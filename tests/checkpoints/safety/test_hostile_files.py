"""Every hostile file is refused in one sentence; nothing runs, nothing large is allocated, no other error escapes."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.weight_files import outline, read_file
from graftvit.models.errors import CheckpointError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.files.hostile import ARCHITECTURE, ARGUMENTS, CORPUS, weights
from support.files.hostile_archives import legacy_view_of_another_storage, record_of_a_lying_size
from support.files.hostile_tensors import valid
from support.runs.limits import limited_memory, limited_work

ROOM = 512 << 20
"""Bytes that the process may take beyond what it has; the smallest lie in the corpus asks for more."""
CPU_SECONDS = 30.0
CONTAINERS = ("safetensors", "zip", "legacy", "npz")


@pytest.fixture(scope="module", autouse=True)
def everything_is_imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the first file makes a process load is not counted as what a hostile one takes."""
    path = valid("safetensors", tmp_path_factory.mktemp("good"))
    load_pretrained(str(path), model=ARCHITECTURE, model_args=ARGUMENTS)


@pytest.mark.parametrize("name", sorted(CORPUS))
def test_a_hostile_file_is_refused(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "files").mkdir()
    path = CORPUS[name](tmp_path / "files", canary)
    source = f"local-dir:{path}" if path.is_dir() and name != "no_regular_file_folder" else str(path)
    with limited_memory(ROOM), limited_work(CPU_SECONDS), pytest.raises(CheckpointError) as caught:
        load_pretrained(source, model=ARCHITECTURE, model_args=ARGUMENTS)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < 700
    assert path.name in sentence
    assert not canary.exists()
    causes = [type(error) for error in _causes(caught.value)]
    assert MemoryError not in causes


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def test_the_corpus_is_large() -> None:
    assert len(CORPUS) >= 100


@pytest.mark.parametrize("name", [name for name in sorted(CORPUS) if name.startswith("code_")])
def test_code_is_named_with_what_to_do(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is refused: it.*(code|program)"):
        read_file(CORPUS[name](tmp_path, tmp_path / "canary"))


@pytest.mark.parametrize("make", [record_of_a_lying_size, legacy_view_of_another_storage])
def test_numbers_of_another_record_are_not_taken(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"is (damaged|refused)"):
        read_file(tmp_path / "m.pth")


@pytest.mark.parametrize("container", CONTAINERS)
def test_good_files_pass(container: str, tmp_path: Path) -> None:
    path = valid(container, tmp_path)
    tree = read_file(path).tree
    found = tree.get("model", tree)
    assert found.keys() == weights().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights().items())


def never_another_error(path: Path) -> None:
    try:
        read_file(path)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    head=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x10\0\0\0\0\0\0\0{"]),
    rest=st.binary(max_size=300),
)
def test_random_bytes(tmp_path: Path, head: bytes, rest: bytes) -> None:
    path = tmp_path / "random.pth"
    path.write_bytes(head + rest)
    never_another_error(path)


@pytest.mark.parametrize("container", CONTAINERS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_changes_of_a_good_file(tmp_path: Path, container: str, data: st.DataObject) -> None:
    """Bytes changed, put in or left out anywhere; the descriptions at both ends are hit more often than numbers."""
    path = tmp_path / "changed.bin"
    content = bytearray(valid(container, tmp_path).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        near_an_end = data.draw(st.sampled_from([0, len(content)]))
        place = abs(near_an_end - data.draw(st.integers(1, min(1500, len(content))))) % len(content)
        length = data.draw(st.integers(0, 4))
        content[place : place + length] = data.draw(st.binary(max_size=8))
    path.write_bytes(
        content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    )
    never_another_error(path)


def test_the_directory_of_an_archive_is_not_read_again_for_each_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "m.npz", **{f"a{number}": np.zeros(1, np.float32) for number in range(50)})
    opened: list[object] = []
    plain = zipfile.ZipFile.__init__

    def count(archive: zipfile.ZipFile, *arguments: Any, **options: Any) -> None:
        opened.append(archive)
        plain(archive, *arguments, **options)

    monkeypatch.setattr(zipfile.ZipFile, "__init__", count)
    assert len(outline(tmp_path / "m.npz").tree) == 50
    assert len(opened) <= 2
