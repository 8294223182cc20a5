"""What files hold beside weights; `safety/test_hostile_files.py` has those that are refused."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graftvit.checkpoints.describe import describe_file
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.weight_files import read_file
from graftvit.models.errors import CheckpointError
from safetensors.torch import save_file


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


@pytest.mark.parametrize(
    "tree", [torch.zeros(2), [torch.zeros(2)], 3, {"epoch": 3}, {}, {"model": {}}, {"model": 3}]
)
def test_what_holds_no_weights_is_refused(tmp_path: Path, tree: Any) -> None:
    torch.save(tree, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"odd\.pth (holds a|is of no known format)"):
        load_pretrained(str(tmp_path / "odd.pth"))


def test_a_file_for_which_there_is_no_memory_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / "m.safetensors")

    def none_left(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("graftvit.checkpoints.weight_files.safe_open", none_left)
    with pytest.raises(
        CheckpointError, match=r"m\.safetensors cannot be read: its [\d,]+ bytes need more memory"
    ):
        read_file(tmp_path / "m.safetensors")
