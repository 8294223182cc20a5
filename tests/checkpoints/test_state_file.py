"""A state comes back exactly, and no changed byte goes unnoticed."""

from __future__ import annotations

import json
import resource
import struct
from pathlib import Path

import pytest
import torch
from graftvit.checkpoints.state import TrainingState, read_meta, read_state, write_state
from graftvit.models.errors import CheckpointError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
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


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def same(first: TrainingState, second: TrainingState) -> bool:
    return (
        first.meta == second.meta
        and first.tensors.keys() == second.tensors.keys()
        and all(
            first.tensors[key].dtype == second.tensors[key].dtype
            and first.tensors[key].shape == second.tensors[key].shape
            and bits(first.tensors[key]) == bits(second.tensors[key])
            for key in first.tensors
        )
    )


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
    held = {
        "whole": base,
        "view": base[2:4],
        "again": base,
        "turned": base.T,
        "number": torch.tensor(3, dtype=torch.int64),
    }
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
    assert "\n" not in str(caught.value)
    assert read_state(path).meta == {"step": 1}
    assert listed(tmp_path) == ["s.safetensors"]


def test_the_file_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    from safetensors import safe_open

    write_state(tmp_path / "s.safetensors", TrainingState({"a": torch.ones(2)}, {"step": 1}))
    with safe_open(tmp_path / "s.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["graftvit.state"]) == {"step": 1}
        assert torch.equal(file.get_tensor("a"), torch.ones(2))


def test_a_state_that_goes_on_behind_its_tensors_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.safetensors"
    write_state(path, TrainingState({"a": torch.ones(3)}, {}))
    with path.open("r+b") as file:
        file.truncate(5 << 30)
    monkeypatch.setattr(
        "graftvit.checkpoints.weight_files.check_digest", lambda *_: pytest.fail("it was read")
    )
    with pytest.raises(CheckpointError, match=r"last\.safetensors is damaged"):
        read_state(path)
