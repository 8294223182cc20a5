"""The part of the hostile corpus that is no pickle: headers that lie, tensors that are no weights, what is no file."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save, save_file
from support.files.hostile import ARCHITECTURE, ARGUMENTS, HUGE, saved, several, torch_zip, weights, zipped

# safetensors with a header that lies.


def _safe(header: Any, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(16)


def _field(shape: Any = (4,), offsets: Any = (0, 16), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@several(
    "huge_header", "longer_than_the_file", "huge_shape", "negative_shape", "overflowing_shape", "fraction", "overlap",
    "hole", "outside", "backwards", "unknown_dtype", "no_shape", "duplicate", "nested", "nan", "metadata", "list",
    file="model.safetensors",
)  # fmt: skip
def lying_header(kind: str, folder: Path, canary: Path) -> bytes:
    one = _field()
    if kind in ("huge_header", "longer_than_the_file"):
        return _safe({"a": one}, length=1 << 62 if kind == "huge_header" else 5000)
    if kind == "nested":
        return _safe(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}")
    header: Any = {
        "huge_shape": {"a": _field((HUGE,))},
        "negative_shape": {"a": _field((-4,))},
        "overflowing_shape": {"a": _field((1 << 62, 4), (0, 0))},
        "fraction": {"a": _field((4.0,))},
        "overlap": {"a": one, "b": _field((2,), (8, 16))},
        "hole": {"a": _field((2,), (0, 8)), "b": _field((1,), (12, 16))},
        "outside": {"a": one, "b": _field((4,), (16, 32))},
        "backwards": {"a": _field((4,), (16, 0))},
        "unknown_dtype": {"a": _field(dtype="F33")},
        "no_shape": {"a": {"dtype": "F32", "data_offsets": [0, 16]}},
        "duplicate": b'{"a":%b,"a":%b}' % (json.dumps(one).encode(), json.dumps(one).encode()),
        "nan": {"a": _field((float("nan"),))},
        "metadata": {"__metadata__": {"a": {"b": 1}}, "a": one},
        "list": [],
    }[kind]
    return _safe(header)


# Whole files whose weights are no weights.


@several(
    "nan_positions", "infinite_positions", "whole_numbers", "truth_values", "complex", "other_shape",
    file="model.safetensors",
)  # fmt: skip
def wrong_tensor(kind: str, folder: Path, canary: Path) -> bytes:
    tensors = weights()
    position = tensors["pos_embed"]
    tensors["pos_embed"] = {
        "nan_positions": position.index_fill(1, torch.tensor([2]), torch.nan),
        "infinite_positions": position.index_fill(1, torch.tensor([0]), torch.inf),
        "whole_numbers": position.to(torch.int64),
        "truth_values": position > 0,
        "complex": position.to(torch.complex64),
        "other_shape": position[..., :8].contiguous(),
    }[kind]
    return save(tensors)


@several("safetensors", "zip", "legacy", "npz")
def one_key_twice(kind: str, folder: Path, canary: Path) -> Path | bytes:
    """A second value under a name that is there already."""
    if kind == "legacy":
        return saved({"aa": 1, "bb": 2}, _use_new_zipfile_serialization=False).replace(b"bb", b"aa")
    if kind == "zip":
        return torch_zip(pickle.dumps({"aa": 1, "bb": 2}, protocol=2).replace(b"bb", b"aa"))
    path = folder / f"model.{kind}"
    if kind == "npz":
        np.savez(path, a=np.zeros(4, np.float32), b=np.ones(4, np.float32))
        path.write_bytes(path.read_bytes().replace(b"b.npy", b"a.npy"))
    else:
        path.write_bytes(save({"a": torch.zeros(4), "b": torch.ones(4)}).replace(b'"b":', b'"a":'))
    return path


CUTS = ("empty", "first_byte", "in_header", "in_tensors", "last_byte")


def valid(container: str, folder: Path) -> Path:
    """A good file of each container."""
    path = folder / {"safetensors": "m.safetensors", "npz": "m.npz"}.get(container, "m.pth")
    tensors = weights()
    if container == "safetensors":
        save_file(tensors, path)
    elif container == "npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        torch.save({"model": tensors}, path, _use_new_zipfile_serialization=container == "zip")
    return path


@several(*(f"{container}_{cut}" for container in ("safetensors", "zip", "legacy", "npz") for cut in CUTS))
def truncated(kind: str, folder: Path, canary: Path) -> Path:
    container, _, cut = kind.partition("_")
    path = valid(container, folder)
    content = path.read_bytes()
    keep = {"empty": 0, "first_byte": 1, "in_header": 100, "in_tensors": len(content) // 2, "last_byte": -1}
    path.write_bytes(content[: keep[cut]])
    return path


# What is no file of weights.


@several("html", "lfs", "json", "gzip", "text", "zeros", "zip", file="model.safetensors")
def something_else(kind: str, folder: Path, canary: Path) -> bytes:
    return {
        "html": b"<!DOCTYPE html><html><body>Sign in</body></html>",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
        "json": b'{"error": "Repository not found"}',
        "gzip": b"\x1f\x8b\x08" + bytes(50),
        "text": b"these are not the weights that you are looking for, go about your business",
        "zeros": bytes(1000),
        "zip": zipped({"readme.txt": b"hello"}),
    }[kind]


@several("loop", "dangling")
def no_regular_file(kind: str, folder: Path, canary: Path) -> Path:
    """Others are in `irregular_files.py`."""
    path = folder / "model.safetensors"
    path.symlink_to({"loop": path.name, "dangling": "nowhere"}[kind])
    return path


@several("parent", "absolute", "link")
def index_that_escapes(kind: str, folder: Path, canary: Path) -> Path:
    inner, secret = folder / "model", folder / "secret.safetensors"
    inner.mkdir()
    save_file(weights(), secret)
    name = {"parent": "../secret.safetensors", "absolute": str(secret), "link": "a.safetensors"}[kind]
    if kind == "link":
        (inner / name).symlink_to(secret)
    index = {"weight_map": dict.fromkeys(weights(), name)}
    (inner / "model.safetensors.index.json").write_text(json.dumps(index))
    (inner / "config.json").write_text(json.dumps({"architecture": ARCHITECTURE, "model_args": ARGUMENTS}))
    return inner
