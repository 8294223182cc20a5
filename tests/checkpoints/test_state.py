"""At any moment a run folder holds a whole state, which comes back exactly; no changed byte goes unnoticed."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import random
import resource
import struct
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from graftvit.checkpoints.atomic import recover_folder, write_file, write_folder, write_shared, write_text
from graftvit.checkpoints.state import StateFolder, TrainingState, read_meta, read_state, write_state
from graftvit.checkpoints.student import refuse_existing
from graftvit.models.errors import CheckpointError, GraftError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

FORK = multiprocessing.get_context("fork")


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def at(step: int, size: int = 50) -> TrainingState:
    return TrainingState({"student.weight": torch.full((size,), float(step))}, {"step": step})


def step_of(state: TrainingState | None) -> int | None:
    if state is None:
        return None
    assert torch.all(state.tensors["student.weight"] == state.meta["step"])
    return int(state.meta["step"])


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def test_what_is_no_state_stays(tmp_path: Path) -> None:
    for name in ("best.safetensors", "notes.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own.txt").write_text("of a user")
    folder = StateFolder(tmp_path)
    folder.save(at(1))
    with pytest.raises(CheckpointError, match=r"best\.safetensors cannot be written"):
        folder.save_best(at(1))
    folder.take_over()
    assert all((tmp_path / name / "own.txt").is_file() for name in ("best.safetensors", "notes.old"))


def test_last_previous_and_best(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "run" / "checkpoints")
    assert folder.load() is None
    folder.save(at(1))
    assert listed(folder.folder) == ["last.safetensors"]
    folder.save(at(2))
    folder.save_best(at(2))
    folder.save(at(3))
    assert step_of(folder.load()) == 3
    assert step_of(read_state(folder.previous)) == 2
    assert step_of(read_state(folder.best)) == 2
    assert listed(folder.folder) == [f"{name}.safetensors" for name in ("best", "last", "previous")]


@pytest.mark.parametrize("links", [True, False])
def test_the_newest_states_are_kept(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    folder = StateFolder(tmp_path)
    for step in (5, 10, 15, 20):
        folder.save(at(step), keep=2, step=step)
    folder.save(at(20), keep=2, step=20)  # saved again by an attempt that began at 15
    assert listed(tmp_path) == [
        "last.safetensors", "previous.safetensors", "step-00000015.safetensors", "step-00000020.safetensors",
    ]  # fmt: skip
    assert (tmp_path / "step-00000020.safetensors").samefile(folder.last) == links  # one copy on the disk
    assert [step_of(read_state(tmp_path / f"step-000000{step}.safetensors")) for step in (15, 20)] == [15, 20]
    folder.save(at(25))  # without the setting, kept states stay
    assert step_of(read_state(tmp_path / "step-00000020.safetensors")) == 20
    assert step_of(folder.load()) == 25


@pytest.mark.parametrize(("first", "second"), [("a", "b"), ("b", "a")])
def test_of_states_without_a_name_the_newest_is_read(tmp_path: Path, first: str, second: str) -> None:
    for age, (step, writer) in enumerate([(1, first), (2, second)]):
        path = tmp_path / f"incoming.{writer}.safetensors"
        write_state(path, at(step))
        os.utime(path, (1000 + age, 1000 + age))
    assert step_of(StateFolder(tmp_path).load()) == 2


@pytest.mark.parametrize("how", ["flip", "empty", "truncate", "remove"])
def test_a_damaged_last_state(tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = StateFolder(tmp_path)
    for step in (1, 2):
        folder.save(at(step))
    content = folder.last.read_bytes()
    if how == "remove":
        folder.last.unlink()
    elif how == "flip":
        damage(folder.last)
    else:
        folder.last.write_bytes(b"" if how == "empty" else content[: len(content) // 2])
    peeked = StateFolder(tmp_path).peek()
    assert peeked is not None
    assert peeked["step"] == (2 if how == "flip" else 1)  # the header alone does not tell of a changed tensor
    with caplog.at_level(logging.WARNING):
        assert step_of(StateFolder(tmp_path).load()) == 1
    assert (str(folder.last) in caplog.text) == (how != "remove")


@pytest.mark.parametrize("loaded", [True, False])
def test_a_damaged_last_never_replaces_a_whole_previous(tmp_path: Path, loaded: bool) -> None:
    folder = StateFolder(tmp_path)
    for step in (1, 2):
        folder.save(at(step))
    damage(folder.last)
    again = StateFolder(tmp_path)
    if loaded:
        again.load()
    again.save(at(3))
    assert step_of(read_state(again.last)) == 3
    assert step_of(read_state(again.previous)) == 1


def test_all_damaged_is_an_error_that_names_them(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    for step in (1, 2):
        folder.save(at(step))
    damage(folder.last)
    damage(folder.previous)
    with pytest.raises(CheckpointError, match=r"last\.safetensors is damaged.*previous\.s"):
        folder.load()


@pytest.mark.parametrize("died_after", ["write", "first rename"])
def test_a_death_between_renames(tmp_path: Path, died_after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = StateFolder(tmp_path)
    for step in (1, 2):
        folder.save(at(step))
    rename = Path.replace
    # The atomic write renames out of its own folder and goes through.
    stop_at = "last.safetensors" if died_after == "write" else "incoming.safetensors"

    def dying(self: Path, target: Path) -> Path:
        if self == tmp_path / stop_at:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        folder.save(at(3))
    monkeypatch.undo()
    again = StateFolder(tmp_path)
    assert step_of(again.load()) == (2 if died_after == "write" else 3)
    again.save(at(4))
    assert step_of(again.load()) == 4
    assert step_of(read_state(again.previous)) == 2
    assert listed(tmp_path) == ["last.safetensors", "previous.safetensors"]


def save_without_end(path: Path, said: Connection) -> None:
    folder = StateFolder(path)
    state = folder.load()
    for step in itertools.count(1 if state is None else state.meta["step"] + 1):
        folder.save(TrainingState({"student.weight": torch.full((300_000,), float(step))}, {"step": step}))
        said.send(step)


def heard(said: Connection) -> Iterator[int]:
    """What was said, to the end of a process that may have been cut short in a word."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            yield said.recv()


def test_kill_9_at_any_moment_leaves_the_last_reported_state_or_a_newer_one(tmp_path: Path) -> None:
    chance = random.Random(5)
    reached = 0
    for _ in range(10):
        said, ours = FORK.Pipe(duplex=False)
        process = FORK.Process(target=save_without_end, args=(tmp_path, ours))
        process.start()
        ours.close()
        first, begin = said.recv(), time.perf_counter()
        second = said.recv()
        time.sleep(chance.uniform(0, 3) * (time.perf_counter() - begin))  # in units of one save
        process.kill()
        process.join()
        reached = max([reached, first, second, *heard(said)])
        state = StateFolder(tmp_path).load()
        assert (step_of(state) or 0) >= reached
    assert reached > 10
    assert len(listed(tmp_path)) <= 4  # at most one leftover of the last death


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root; the limit on file sizes in test_state_file covers it")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_ends_in_one_sentence_and_loses_nothing(small_disk: Path) -> None:
    folder = StateFolder(small_disk / "checkpoints")
    for step in (1, 2):
        folder.save(at(step, 20_000))
    for save in (folder.save, folder.save_best):
        with pytest.raises(CheckpointError, match=r"needs 400,0\d\d bytes .* [\d,]+ free") as caught:
            save(at(3, 100_000))
        assert isinstance(caught.value, GraftError)
        assert caught.value.exit_code == 1
    assert step_of(folder.load()) == 2
    assert step_of(read_state(folder.previous)) == 1
    assert listed(folder.folder) == ["last.safetensors", "previous.safetensors"]
    folder.save(at(4, 20_000))  # what fits goes on
    assert step_of(StateFolder(folder.folder).load()) == 4


# A state comes back exactly, and no changed byte goes unnoticed.


DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool,
]  # fmt: skip
quick = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
tensors = st.builds(
    lambda dtype, shape, seed: torch.randint(
        0, 256, (*shape, torch.empty(0, dtype=dtype).element_size()), dtype=torch.uint8,
        generator=torch.Generator().manual_seed(seed),
    ).clamp(max=1 if dtype is torch.bool else 255).view(dtype).squeeze(-1),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 1000),
)  # fmt: skip
meta = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def same(first: TrainingState, second: TrainingState) -> bool:
    described = [
        {key: (tensor.dtype, tensor.shape, bits(tensor)) for key, tensor in state.tensors.items()}
        for state in (first, second)
    ]
    return first.meta == second.meta and described[0] == described[1]


@quick
@given(st.dictionaries(names, tensors, max_size=5), st.dictionaries(st.text(), meta, max_size=4))
def test_a_state_comes_back_bit_for_bit(
    tmp_path: Path, held: dict[str, torch.Tensor], said: dict[str, object]
) -> None:
    state = TrainingState(held, said)
    write_state(tmp_path / "s.safetensors", state)
    assert same(read_state(tmp_path / "s.safetensors"), state)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("state") / "s.safetensors"
    held = {"student.weight": torch.randn(3, 4), "rng.0.torch": torch.arange(40, dtype=torch.uint8)}
    write_state(path, TrainingState(held, {"position": {"step": 7}, 'quote "sha256":"': [1.5, None]}))
    return path.read_bytes()


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_one_changed_byte_anywhere_is_found(tmp_path: Path, written: bytes, data: st.DataObject) -> None:
    where = data.draw(st.integers(0, len(written) - 1))
    change = data.draw(st.integers(1, 255))
    damaged = bytearray(written)
    damaged[where] ^= change
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"damaged\.safetensors"):
        read_state(path)


def test_every_byte_of_the_header_counts(tmp_path: Path, written: bytes) -> None:
    length = 8 + struct.unpack("<Q", written[:8])[0]
    path = tmp_path / "damaged.safetensors"
    for position in range(length):
        damaged = bytearray(written)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            read_state(path)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 60, 200, -1])
def test_a_truncated_or_longer_file_is_named(tmp_path: Path, written: bytes, keep: int) -> None:
    path = tmp_path / "short.safetensors"
    for content in (written[:keep], written + b"x"):
        path.write_bytes(content)
        for read in (read_state, read_meta):
            with pytest.raises(CheckpointError, match=r"short\.safetensors is damaged"):
                read(path)


def test_what_is_no_state_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="no training state"):
        read_state(path)
    with pytest.raises(CheckpointError, match=r"absent\.safetensors cannot be read: No such file"):
        read_state(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="is a folder, not a regular file"):
        read_state(tmp_path)


def test_views_shared_and_strided_tensors_are_kept_apart(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    held = {"whole": base, "view": base[2:4], "again": base, "turned": base.T, "number": torch.tensor(3)}
    held["grad"] = torch.nn.Parameter(torch.randn(2))
    state = TrainingState(held, {})
    write_state(tmp_path / "s.safetensors", state)
    assert same(read_state(tmp_path / "s.safetensors"), state)


def test_an_overwritten_state_replaces_the_old_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    dead_attempt = tmp_path / ".s.safetensors.0123456789ab.tmp"
    dead_attempt.mkdir()
    (dead_attempt / ".tmpQKVgnj").write_bytes(b"as safetensors 0.8 names what it has not finished")
    for step in (1, 2):
        write_state(path, TrainingState({"a": torch.full((3,), step)}, {"step": step}))
    assert read_state(path).meta == {"step": 2}
    assert listed(tmp_path) == ["s.safetensors"]


def test_meta_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_state(tmp_path / "s.safetensors", TrainingState({}, {"a": object()}))
    assert not listed(tmp_path)


def test_a_file_that_cannot_be_written_keeps_the_old_one(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk where no small one can be mounted."""
    path = tmp_path / "s.safetensors"
    write_state(path, TrainingState({"a": torch.zeros(10)}, {"step": 1}))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            write_state(path, TrainingState({"a": torch.zeros(100_000)}, {"step": 2}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.exit_code == 1
    assert str(caught.value).startswith(f"{path} cannot be written: it needs 400,0")
    assert read_state(path).meta == {"step": 1}
    assert listed(tmp_path) == ["s.safetensors"]


def test_the_file_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    from safetensors import safe_open

    write_state(tmp_path / "s.safetensors", TrainingState({"a": torch.ones(2)}, {"step": 1}))
    with safe_open(tmp_path / "s.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["graftvit.state"]) == {"step": 1}
        assert torch.equal(file.get_tensor("a"), torch.ones(2))


def test_a_state_that_is_too_long_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.safetensors"
    write_state(path, TrainingState({"a": torch.ones(3)}, {}))
    with path.open("r+b") as file:
        file.truncate(5 << 30)
    monkeypatch.setattr(
        "graftvit.checkpoints.weight_files.check_digest", lambda *_: pytest.fail("it was read")
    )
    with pytest.raises(CheckpointError, match=r"last\.safetensors is damaged"):
        read_state(path)


# Folders are replaced whole, and brought back after a death in between.


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


@pytest.mark.parametrize("when", ["while it is written", "after the check"])
def test_of_two_writers_of_a_new_folder_the_second_is_refused(tmp_path: Path, when: str) -> None:
    target = tmp_path / "student"

    def write_first() -> None:
        write_folder(target, fill("first"), size=3, check=partial(refuse_existing, target, overwrite=False))
        (target / "config.json").write_text('{"architecture": "vit"}')

    def write(folder: Path) -> None:
        fill("second")(folder)
        if when == "while it is written":
            write_first()

    def check() -> None:
        refuse_existing(target, overwrite=False)
        if when == "after the check":
            write_first()

    with pytest.raises(CheckpointError, match=r"already holds a model|cannot be written"):
        write_folder(target, write, size=3, check=check)
    assert (target / "a").read_text() == "first"
    assert listed(tmp_path) == ["student"]


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


def test_of_a_folder_with_several_writers_only_old_leftovers_are_removed(tmp_path: Path) -> None:
    for name, age in (("0" * 12, 0), ("1" * 12, 2 * 86_400)):
        (tmp_path / f".x.{name}.tmp").mkdir()
        os.utime(tmp_path / f".x.{name}.tmp", (time.time() - age,) * 2)
    write_folder(tmp_path / "x", lambda path: (path / "a").touch(), size=0, check=lambda: None)
    assert listed(tmp_path) == [f".x.{'0' * 12}.tmp", "x"]
