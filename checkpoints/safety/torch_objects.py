"""The names that a torch file may use, and the descriptions that each one makes: tensors without their numbers."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch

from ...models.errors import CheckpointError
from .extent import count, is_count, last_element
from .pickle_outline import DamagedPickle, Symbol, plain_key

STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}  # fmt: skip


@dataclass(frozen=True)
class StorageOutline:
    """Bytes of the file that tensors look at."""

    key: str
    dtype: torch.dtype
    elements: int
    start: int = 0
    """In elements of the record; old files have storages that are a part of another one."""

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class TensorOutline:
    """A tensor as the pickle describes it, checked against the storage that the pickle describes."""

    storage: StorageOutline
    dtype: torch.dtype
    offset: int
    """In elements."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


@dataclass(frozen=True)
class NumpyDtype:
    """A dtype of numpy, which is made in two steps."""

    name: str

    def with_state(self, state: Any) -> NumpyDtype:
        """The same in the byte order that the state says."""
        order = (
            state[1] if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|") else "="
        )
        return replace(self, name=order + self.name.lstrip("<>|="))


def find(module: str, name: str) -> Symbol | None:
    """The table: what a name of the file stands for; None where it is not in it."""
    if module in ("torch", "torch.storage", "torch.cuda") and name in STORAGES:
        return Symbol(name, None, STORAGES[name])
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return Symbol(name, None, getattr(torch, name))
    return _table().get(f"{module}.{name}")


@cache
def _table() -> dict[str, Symbol]:
    numpy_core = ("numpy.core.multiarray", "numpy._core.multiarray")
    calls = {
        "torch._utils._rebuild_tensor": _tensor,
        "torch._utils._rebuild_tensor_v2": _tensor_v2,
        "torch._utils._rebuild_tensor_v3": _tensor_v3,
        "torch._utils._rebuild_parameter": lambda data, *_: _only_tensor(data),
        "torch._utils._rebuild_parameter_with_state": lambda data, *_: _only_tensor(data),
        "torch._tensor._rebuild_from_type_v2": _from_type,
        "torch.Tensor": None,
        "torch.nn.parameter.Parameter": None,
        "torch.nn.parameter.Buffer": None,
        "torch.Size": lambda sizes=(): tuple(sizes),
        "torch.device": lambda *words: ":".join(map(str, words)),
        "torch.serialization._get_layout": str,
        "argparse.Namespace": argparse.Namespace,
        "collections.OrderedDict": _dict,
        "collections.defaultdict": lambda _=None, items=(): _dict(items),
        "collections.Counter": _dict,
        "builtins.dict": _dict,
        "builtins.list": lambda items=(): list(items),
        "builtins.set": lambda items=(): {plain_key(item) for item in items},
        "builtins.bytes": lambda: b"",
        "builtins.complex": lambda real, imaginary: complex(real, imaginary),
        **dict.fromkeys(("builtins.int", "builtins.float", "builtins.str", "builtins.bool"), None),
        "_codecs.encode": _encode,
        "numpy.dtype": lambda name, *_: NumpyDtype(str(name)),
        **dict.fromkeys((f"{module}.scalar" for module in numpy_core), _scalar),
        **dict.fromkeys((f"pathlib.{name}" for name in ("PosixPath", "WindowsPath", "Path")), _path),
    }
    return {name: Symbol(name, call) for name, call in calls.items()}


def storage_of(pid: Any) -> StorageOutline:
    """The storage that a persistent id names: ("storage", type, key, location, elements[, view])."""
    if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] not in ("storage", b"storage"):
        raise DamagedPickle("its pickle names something that is no storage")
    _, kind, key, _, elements = pid[:5]
    if not isinstance(kind, Symbol) or not isinstance(kind.value, torch.dtype):
        raise DamagedPickle("its pickle names a storage of no known type")
    if not isinstance(key, (str, int)) or not is_count(elements):
        raise DamagedPickle(f"its pickle names a storage of {str(elements)[:40]} elements")
    whole = StorageOutline(str(key), kind.value, elements)
    view = pid[5] if len(pid) == 6 else None
    if view is None:
        return whole
    _, start, length = view
    if not is_count(start) or not is_count(length) or start + length > elements:
        raise DamagedPickle("its pickle names a part of a storage that lies outside of it")
    return replace(whole, elements=length, start=start)


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, dtype: torch.dtype | None = None
) -> TensorOutline:
    """Raises DamagedPickle where the numbers lead outside of the storage, or repeat it."""
    if not isinstance(storage, StorageOutline):
        raise DamagedPickle("its pickle describes a tensor without a storage")
    if not isinstance(shape, tuple) or not isinstance(stride, tuple) or len(stride) != len(shape):
        raise DamagedPickle("its pickle describes a tensor whose shape and strides do not go together")
    try:
        elements = count("", shape)
    except CheckpointError as error:
        raise DamagedPickle(str(error).partition("damaged: ")[2]) from error
    if not is_count(offset) or not all(map(is_count, stride)):
        raise DamagedPickle(
            f"its pickle describes a tensor with a negative or huge stride or offset: {stride}"[:160]
        )
    dtype = dtype or storage.dtype
    room = storage.nbytes // dtype.itemsize
    if elements and offset + last_element(shape, stride) >= room:
        raise DamagedPickle(
            f"a tensor of shape {shape} reaches beyond its storage of {room:,} elements"[:160]
        )
    if elements > room:
        raise DamagedPickle(f"a tensor of shape {shape} repeats its storage of {room:,} elements"[:160])
    return TensorOutline(storage, dtype, offset, shape, stride)


def _tensor_v2(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, metadata: Any = None
) -> TensorOutline:
    if metadata:
        raise DamagedPickle("it holds a conjugated or negated view; save plain tensors")
    return _tensor(storage, offset, shape, stride)


def _tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> TensorOutline:
    if metadata or not isinstance(dtype, Symbol) or not isinstance(dtype.value, torch.dtype):
        raise DamagedPickle("it holds a tensor of no known dtype")
    return _tensor(storage, offset, shape, stride, dtype.value)


def _only_tensor(data: Any) -> TensorOutline:
    if not isinstance(data, TensorOutline):
        raise DamagedPickle("its pickle makes a parameter of what is no tensor")
    return data


def _from_type(call: Any, kind: Any, arguments: Any, _: Any) -> TensorOutline:
    """A tensor with attributes of its own; these are dropped."""
    rebuilds = (
        isinstance(call, Symbol) and call.name.startswith("torch._utils._rebuild_") and call.call is not None
    )
    if not rebuilds or not isinstance(kind, Symbol) or not isinstance(arguments, tuple):
        raise DamagedPickle("it holds a tensor of a class of its own; save plain tensors")
    return _only_tensor(call.call(*arguments))


def _dict(items: Any = ()) -> dict[Any, Any]:
    pairs = items.items() if isinstance(items, dict) else items
    return {plain_key(key): value for key, value in pairs}


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How protocol 2 keeps bytes."""
    if not isinstance(text, str) or str(encoding).replace("-", "") not in ("latin1", "utf8"):
        raise DamagedPickle("its pickle encodes what is no text")
    return text.encode("latin1" if "latin" in encoding else "utf8", "surrogateescape")


def _scalar(dtype: Any, data: Any = b"") -> Any:
    """A number of numpy, such as a best accuracy."""
    if not isinstance(dtype, NumpyDtype) or not isinstance(data, (bytes, str)):
        raise DamagedPickle("it holds a number of numpy of no known kind")
    raw = data.encode("latin1") if isinstance(data, str) else data
    kind = np.dtype(dtype.name)
    if kind.hasobject or kind.kind not in "biuf" or kind.itemsize != len(raw):
        raise DamagedPickle("it holds a number of numpy of no known kind")
    return np.frombuffer(raw, kind)[0].item()


def _path(*parts: Any) -> str:
    return "/".join(str(part) for part in parts).replace("//", "/")
