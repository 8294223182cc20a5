"""Rebuild what a torch file describes without its numbers, before torch reads it.

`torch.load(weights_only=True)` calls no foreign code, and it takes every size on trust: `torch.FloatTensor(1 << 40)`
passes, a storage of an old file is allocated as long as the pickle says, and a nested tuple can take years to hash. So
the pickle is rebuilt first with a stand-in for each name that `torch.save` writes: it takes the same arguments, refuses
those that torch never writes, and makes tensors on the meta device.
"""

from __future__ import annotations

import argparse
import io
import pickle
import pickletools
import re
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.serialization import StorageType

from ..report import printable
from .archive import MAX_ENTRIES, MAX_NAME, RefusedError

PurePickle: Any = pickle._Unpickler
"""The one in Python: its steps can be replaced, and its memo is no larger than what is in it."""
OPCODES = b"\x80.(N\x88\x89JKM\x8aGUX})]\x8fast\x85\x86\x87eubRQ\x81cqrhj" + b"\x93\x94\x95\x8ciS"
"""The opcodes that torch reads, and the ones by which other pickles name what they would call."""


def rebuild(stream: io.BytesIO) -> tuple[Any, dict[str, int]]:
    """Return what the next pickle in `stream` describes, and the bytes of each storage in it by its key.

    Raises RefusedError if it names what no checkpoint needs, and any other error if it is damaged.
    """
    start = stream.tell()
    if sum(1 for _ in islice(pickletools.genops(stream), MAX_ENTRIES + 1)) > MAX_ENTRIES:
        raise ValueError(f"its pickle describes more than {MAX_ENTRIES:,} entries")
    stream.seek(start)
    outline = _Outline(stream, encoding="utf-8")
    return outline.load(), {key: flat.nbytes for key, flat in outline.storages.items()}


class _Table(dict[Any, Any]):
    """A dictionary, empty at first, whose keys are checked."""

    def __init__(self) -> None:
        super().__init__()

    def __setitem__(self, key: Any, value: Any) -> None:
        _keys([key])
        super().__setitem__(key, value)


class _Dtype:
    """A numpy dtype of plain numbers."""

    def __init__(self, kind: str, *_: Any) -> None:
        if re.fullmatch("[biuf][1248]", kind) is None:
            raise ValueError("it has a kind of numpy's numbers that is not plain")
        self.dtype = np.dtype(kind)

    def __setstate__(self, state: Any) -> None:
        if state not in [(3, order, None, None, None, -1, -1, 0) for order in "<>|"]:
            raise ValueError("it changes a kind of numpy's numbers")
        self.dtype = self.dtype.newbyteorder(state[1])


def _keys(keys: Any) -> list[Any]:
    """Refuse a key that could take years to hash (a tuple), or of which others have the hash (a large number)."""
    for key in keys:
        is_text = isinstance(key, (str, bytes)) and len(key) <= MAX_NAME
        if not is_text and not (isinstance(key, (int, float)) and abs(key) < 1 << 60) and key is not None:
            raise ValueError(f"it has a key that is no number and no text of {MAX_NAME:,} characters")
    return list(keys)


def _counter(counts: Any) -> _Table:
    if type(counts) is not _Table:
        raise ValueError("it counts what is no table")
    return counts


def _encode(text: str, codec: str) -> bytes:
    if codec not in ("latin1", "latin-1"):  # others are quadratic
        raise ValueError("it encodes a text otherwise than torch")
    return text.encode(codec)


def _tensor(storage: Tensor, offset: int, shape: Any, stride: Any, *_: Any) -> Tensor:
    tensor = storage.as_strided(shape, stride, offset)  # refuses what is negative
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if tensor.numel() and max(last + 1, tensor.numel()) > storage.numel():
        raise ValueError(
            f"a tensor of shape {tuple(shape)} does not fit into {storage.numel():,} numbers"[:160]
        )
    return tensor


def _typed_tensor(
    storage: Tensor, offset: int, shape: Any, stride: Any, _: Any, __: Any, dtype: Any, *___: Any
) -> Tensor:
    return _tensor(storage.view(dtype), offset, shape, stride)


STAND_INS: dict[str, Any] = {
    **dict.fromkeys(("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"), _tensor),
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": lambda rebuild, kind, arguments, state: rebuild(*arguments),
    **dict.fromkeys(("torch.Tensor", "torch.nn.parameter.Parameter")),
    "torch.storage.UntypedStorage": torch.uint8,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch.serialization._get_layout": lambda name: _keys([name]),
    "collections.OrderedDict": _Table,
    "collections.Counter": _counter,
    "builtins.set": _keys,
    "builtins.complex": lambda real, imaginary: real + 1j * imaginary,
    "_codecs.encode": _encode,
    "argparse.Namespace": argparse.Namespace,
    "pathlib.PosixPath": PurePosixPath,
    "numpy.dtype": _Dtype,
    **{
        f"numpy.{core}.multiarray.scalar": lambda kind, data: np.frombuffer(data, kind.dtype)[0]
        for core in ("core", "_core")
    },
}
"""What torch files name, and what is called in its place; None and a dtype cannot be called."""


class _Outline(PurePickle):
    """Rebuilds one pickle."""

    def __init__(self, stream: io.BytesIO, *, encoding: str) -> None:
        super().__init__(stream, encoding=encoding)
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name. Raises RefusedError."""
        full = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full in STAND_INS:
            return STAND_INS[full]
        if module in ("torch", "torch.cuda") and name.endswith("Storage"):
            return StorageType(name).dtype
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise RefusedError(
            f"it holds {printable(full[:120])}, and rebuilding that could run code; "
            "save the weights alone (a state dict) or as .safetensors"
        )

    def persistent_load(self, pid: Any) -> Tensor:
        """Return a storage: ("storage", type, key, device, elements[, None])."""
        _, dtype, key, _, elements, *_ = pid
        if not isinstance(dtype, torch.dtype) or not isinstance(key, str) or any(pid[5:]):
            raise ValueError("it names a storage of no known type")
        flat = torch.empty(elements, dtype=dtype, device="meta")
        there = self.storages.setdefault(key, flat)
        if there.dtype != dtype or there.numel() != elements:
            raise ValueError(f"its storage {key[:40]!r} is described twice")
        return flat

    def load_empty_dictionary(self) -> None:
        """Begin a dictionary."""
        self.append(_Table())

    def load_build(self) -> None:
        """Give a state to what has one. A tensor has none: it would set its shape again."""
        target, state = self.stack[-2:]
        is_plain = isinstance(target, (_Table, argparse.Namespace)) and isinstance(state, _Table)
        if not is_plain and not isinstance(target, _Dtype):
            raise ValueError("it gives a state to what has none")
        super().load_build()

    dispatch = {code: PurePickle.dispatch[code] for code in OPCODES} | {
        pickle.BUILD[0]: load_build, pickle.EMPTY_DICT[0]: load_empty_dictionary
    }  # fmt: skip
