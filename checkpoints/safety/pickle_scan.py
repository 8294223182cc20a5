"""Read from a pickle's opcodes what it names and how much it describes, before torch's restricted loader runs it.

`torch.load(weights_only=True)` calls no foreign code, and it takes every size on trust: `torch.FloatTensor(1 << 40)`
is allowed, a storage of an old file is allocated as long as the pickle says, and a nested tuple can take years to
hash. The effect of each opcode on the stack comes from `pickletools`; nothing is built or called here.
"""

from __future__ import annotations

import math
import pickletools
import re
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

MAX_ENTRIES = 2_000_000
"""Opcodes, and entries counted as if nothing were shared: one byte can repeat a whole object."""
ITEM_BYTES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4,
    "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1, "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16, "UntypedStorage": 1,
}  # fmt: skip
STORAGES = {
    f"{module}.{name}": n
    for module in ("torch", "torch.storage", "torch.cuda")
    for name, n in ITEM_BYTES.items()
}
REBUILDS = tuple(f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3"))
PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
"""Rebuilds a tensor that has attributes: its first argument is called."""
CALLED = {
    *REBUILDS, *PARAMETERS, FROM_TYPE, "torch.Size", "torch.device", "torch.serialization._get_layout",
    "torch.nn.parameter.Parameter", "argparse.Namespace", "pathlib.PosixPath", "collections.OrderedDict",
    "collections.Counter", "builtins.set", "builtins.complex", "_codecs.encode",
}  # fmt: skip
SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
DTYPE = "numpy.dtype"
CALLED |= {*SCALARS, DTYPE}
PLAIN_ARGUMENTS = {DTYPE: (0, "[biuf][1248]"), "_codecs.encode": (1, "latin-?1")}
"""Place and pattern of an argument that could take memory or time: a dtype of a gigabyte, a codec that is quadratic."""
BUILT = ("argparse.Namespace", "collections.OrderedDict", DTYPE)
"""May be given attributes. A tensor may not: that would set its shape again."""
PLAIN_DTYPES = tuple((3, order, None, None, None, -1, -1, 0) for order in "<>|")
"""The states of numpy's dtypes of plain numbers."""
OPAQUE = object()
"""The value of a list, a dictionary or a set."""
MARK = object()


class DamagedPickle(ValueError):  # noqa: N818
    """The bytes make no sense as a checkpoint; its text says why."""


class Name(str):
    """A global that the pickle names."""


@dataclass(frozen=True)
class Storage:
    """Numbers that tensors look at, as the pickle describes them."""

    key: str
    elements: int
    item_bytes: int

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return self.elements * self.item_bytes


@dataclass
class Entry:
    """One object on the stack: a literal, a name, a storage or a tuple of these, or `OPAQUE`."""

    value: Any
    weight: int = 1
    """Objects in it, counted as if nothing were shared."""


class PickleScan:
    """Scans one pickle after another of a file."""

    def __init__(self) -> None:
        self.foreign: dict[str, None] = {}
        """The names that no checkpoint needs, in the order of the file."""
        self.storages: dict[str, Storage] = {}
        self.literals: set[str] = set()
        """Of the last pickle."""
        self._left = MAX_ENTRIES

    def scan(self, stream: BinaryIO) -> None:
        """Reads up to the end of the next pickle. Raises DamagedPickle."""
        self.stack: list[Any] = []
        self.memo: dict[int, Entry] = {}
        self.literals = set()
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                self._count(1)
                self._step(opcode, argument)
        except DamagedPickle:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError) as error:
            words = " ".join(str(error).split())[:120] or type(error).__name__
            raise DamagedPickle(f"its pickle cannot be read, {words}") from error

    def _count(self, entries: int) -> None:
        self._left -= entries
        if self._left < 0:
            raise DamagedPickle(f"its pickle describes more than {MAX_ENTRIES:,} entries")

    def _step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        name = opcode.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[int(argument)] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[int(argument)])
            self._count(self.stack[-1].weight)
        elif name == "MARK":
            self.stack.append(MARK)
        else:
            taken = self._take(opcode.stack_before)
            if len(opcode.stack_after) == 1:
                self.stack.append(self._made(name, argument, taken))

    def _take(self, wanted: list[pickletools.StackObject]) -> list[Entry]:
        """The entries that an opcode takes off the stack."""
        behind: list[Entry] = []
        count = len(wanted)
        if pickletools.markobject in wanted:
            place = next((at for at in reversed(range(len(self.stack))) if self.stack[at] is MARK), None)
            if place is None:
                raise DamagedPickle("its pickle closes what it did not open")
            behind, count = self.stack[place + 1 :], wanted.index(pickletools.markobject)
            del self.stack[place:]
        if count > len(self.stack):
            raise DamagedPickle("its pickle takes more off its stack than there is")
        before = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return [*before, *behind]

    def _made(self, name: str, argument: Any, taken: list[Entry]) -> Entry:
        """What an opcode leaves on the stack."""
        weight = 1 + sum(entry.weight for entry in taken)
        if name in ("GLOBAL", "INST"):
            return Entry(self._named(str(argument).replace(" ", ".", 1)))
        if name == "STACK_GLOBAL":
            return Entry(self._named(".".join(str(entry.value) for entry in taken)))
        if name.startswith("TUPLE") or name == "EMPTY_TUPLE":
            return Entry(tuple(entry.value for entry in taken), weight)
        if name in ("REDUCE", "NEWOBJ"):
            return Entry(self._called(*(entry.value for entry in taken)), weight)
        if name == "BINPERSID":
            return Entry(self._storage(taken[0].value))
        if name == "BUILD" and not self.foreign:
            _check_state(taken[0].value, taken[1].value)
        if name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"):
            taken[0].weight = weight
            return taken[0]
        if name.removeprefix("EMPTY_") in ("DICT", "LIST", "SET", "FROZENSET"):
            return Entry(OPAQUE, weight)
        if argument is not None:
            self.literals.add(str(argument)[:80])
        return Entry(argument, weight)

    def _named(self, name: str) -> Name:
        name = name.replace("__builtin__.", "builtins.", 1)
        is_dtype = isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype)
        if name not in CALLED and name not in STORAGES and name != "torch.Tensor" and not is_dtype:
            self.foreign[name] = None
        return Name(name)

    def _called(self, function: Any, arguments: Any) -> Any:
        """The name of the function, once it and its arguments are known to do no harm."""
        if self.foreign:
            return function
        if not isinstance(function, Name) or function not in CALLED:
            raise DamagedPickle(f"its pickle calls {str(function)[:80]}")
        place, plain = PLAIN_ARGUMENTS.get(function, (0, ""))
        if plain and not re.fullmatch(plain, str(arguments[place])):
            raise DamagedPickle(f"its pickle calls {function} with {str(arguments[place])[:80]!r}")
        if function == FROM_TYPE and arguments[0] not in REBUILDS:
            raise DamagedPickle(f"its pickle makes a tensor by {str(arguments[0])[:80]}")
        if function == FROM_TYPE:
            _check_tensor(arguments[0], *arguments[2])
        elif function in REBUILDS:
            _check_tensor(function, *arguments)
        return function

    def _storage(self, pid: Any) -> Storage:
        """The storage of a persistent id: ("storage", type, key, location, elements[, part of an old file's])."""
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] not in ("storage", b"storage"):
            raise DamagedPickle("its pickle names something that is no storage")
        _, kind, key, _, elements, *part = pid
        if (
            kind not in STORAGES
            or not isinstance(kind, Name)
            or not isinstance(key, str)
            or not _are_sizes(elements)
        ):
            raise DamagedPickle(
                f"its pickle names a storage of {str(elements)[:40]} elements of no known type"
            )
        storage = Storage(key, elements, STORAGES[kind])
        if self.storages.setdefault(storage.key, storage) != storage:
            raise DamagedPickle(f"its storage {storage.key[:40]!r} is described twice")
        if not part or part[0] is None:
            return storage
        _, start, length = part[0]
        if not _are_sizes(start, length) or start + length > elements:
            raise DamagedPickle("its pickle names a part of a storage that lies outside of it")
        return Storage(storage.key, length, storage.item_bytes)


def _are_sizes(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _check_state(target: Any, state: Any) -> None:
    """Raises DamagedPickle for an object that may not be given this state."""
    if target not in BUILT or (target == DTYPE and state not in PLAIN_DTYPES):
        raise DamagedPickle("its pickle gives a state to what has none")


def _check_tensor(function: Name, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> None:
    """Raises DamagedPickle for a tensor that reaches beyond its storage, or is larger than it."""
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise DamagedPickle("its pickle describes a tensor without storage, shape or strides")
    if len(shape) != len(stride) or not _are_sizes(offset, *shape, *stride):
        raise DamagedPickle(
            f"a tensor of shape {shape} has a negative, huge or missing stride or offset"[:160]
        )
    dtype = getattr(torch, str(rest[2]).removeprefix("torch."), None) if function == REBUILDS[2] else None
    room = storage.nbytes // (dtype.itemsize if isinstance(dtype, torch.dtype) else storage.item_bytes)
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if 0 not in shape and max(last + 1, math.prod(shape)) > room:
        raise DamagedPickle(
            f"a tensor of shape {shape} does not fit into its storage of {room:,} elements"[:160]
        )
