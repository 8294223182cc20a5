"""What a pickle describes, without running any of it: a stack machine that only knows data.

Python's pickle, and torch's restricted one, call what the file names. This one calls nothing: a name from the file
is looked up in a table of our own (`torch_objects.py`), whose functions make descriptions of tensors, numbers and
containers. A name that is not in the table becomes `Foreign`, which nothing can be done with.
"""

from __future__ import annotations

import argparse
import pickletools
from collections.abc import Callable, Hashable
from typing import Any, Protocol

MAX_NODES = 2_000_000
"""Of the tree, counted as if nothing were shared, and of the steps to it: one byte can describe a whole object."""
TOO_MANY = "its pickle describes more than two million entries"
MAX_DEPTH = 100


class DamagedPickle(ValueError):  # noqa: N818
    """What the bytes say makes no sense; its text says why."""


class Stream(Protocol):
    """Bytes to read from, whose `read` never gives more than there are."""

    def read(self, size: int, /) -> bytes: ...
    def readline(self) -> bytes: ...


class Foreign:
    """Something that only code could make; named, never made."""

    def __init__(self, name: str) -> None:
        self.name = name


class Symbol:
    """A name of the table: what is called, or stands for itself."""

    def __init__(self, name: str, call: Callable[..., Any] | None, value: Any = None) -> None:
        self.name, self.call, self.value = name, call, value


MARK = object()
Find = Callable[[str, str], Symbol | None]
Persistent = Callable[[Any], Any]


class Machine:
    """Reads one pickle after another from a stream."""

    def __init__(self, stream: Stream, find: Find, persistent: Persistent | None = None) -> None:
        self.stream, self.find, self.persistent = stream, find, persistent
        self.foreign: dict[str, None] = {}
        """The names that are not in the table, in the order of the file."""

    def load(self) -> Any:
        """The value of the next pickle in the stream. Raises DamagedPickle."""
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        try:
            for step, (opcode, argument, _) in enumerate(pickletools.genops(self.stream)):  # type: ignore[arg-type]
                if opcode.name == "STOP":
                    break
                if step > MAX_NODES:
                    raise DamagedPickle(TOO_MANY)
                self._step(opcode.name, argument)
            (value,) = self.stack
        except DamagedPickle:
            raise
        except (
            ValueError,
            IndexError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            MemoryError,
        ) as error:
            words = " ".join(str(error).split())[:120] or type(error).__name__
            raise DamagedPickle(f"its pickle cannot be read, {words}") from error
        check_tree(value)
        return value

    def _step(self, name: str, argument: Any) -> None:
        if name in CONSTANTS:
            self.stack.append(CONSTANTS[name]())
        elif name in LITERALS:
            self.stack.append(argument)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[int(argument)] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[int(argument)])
        elif name not in ("PROTO", "FRAME"):
            step = getattr(self, f"_{name.lower()}", None)
            if step is None:
                raise DamagedPickle(f"its pickle uses {name}, which no weights do")
            step(argument)

    def _pop_mark(self) -> list[Any]:
        position = len(self.stack) - 1
        while self.stack[position] is not MARK:
            position -= 1
            if position < 0:
                raise DamagedPickle("its pickle closes what it did not open")
        items = self.stack[position + 1 :]
        del self.stack[position:]
        return items

    def _mark(self, _: Any) -> None:
        self.stack.append(MARK)

    def _pop(self, _: Any) -> None:
        self.stack.pop()

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._pop_mark()))

    def _tuple1(self, _: Any) -> None:
        self.stack[-1:] = [(self.stack[-1],)]

    def _tuple2(self, _: Any) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def _tuple3(self, _: Any) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def _list(self, _: Any) -> None:
        self.stack.append(self._pop_mark())

    def _dict(self, _: Any) -> None:
        items = self._pop_mark()
        self.stack.append({})
        self._fill(items)

    def _append(self, _: Any) -> None:
        item = self.stack.pop()
        self._extend([item])

    def _appends(self, _: Any) -> None:
        self._extend(self._pop_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Foreign):
            raise DamagedPickle(f"its pickle appends to a {type(target).__name__}")

    def _setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    def _setitems(self, _: Any) -> None:
        self._fill(self._pop_mark())

    def _fill(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                plain = plain_key(key)
                if plain in target:
                    raise DamagedPickle(f"it names {str(plain)[:80]!r} twice")
                target[plain] = value
        elif not isinstance(target, Foreign):
            raise DamagedPickle(f"its pickle sets items of a {type(target).__name__}")

    def _additems(self, _: Any) -> None:
        items, target = self._pop_mark(), self.stack[-1]
        if isinstance(target, set):
            target.update(map(plain_key, items))
        elif not isinstance(target, Foreign):
            raise DamagedPickle(f"its pickle adds to a {type(target).__name__}")

    def _frozenset(self, _: Any) -> None:
        self.stack.append(frozenset(map(plain_key, self._pop_mark())))

    def _global(self, argument: Any) -> None:
        module, _, name = str(argument).partition(" ")
        self._named(module, name)

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._named(str(module), str(name))

    def _named(self, module: str, name: str) -> None:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        found = self.find(module, name)
        self.stack.append(found if found is not None else self._refuse(f"{module}.{name}"))

    def _refuse(self, name: str) -> Foreign:
        self.foreign[name] = None
        return Foreign(name)

    def _reduce(self, _: Any) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        self.stack.append(self.called(called, arguments))

    def _newobj(self, _: Any) -> None:
        self._reduce(_)

    def _newobj_ex(self, _: Any) -> None:
        keywords, arguments, called = self.stack.pop(), self.stack.pop(), self.stack.pop()
        if keywords and isinstance(called, Symbol):
            raise DamagedPickle(f"its pickle makes a {called.name} with keywords")
        self.stack.append(self.called(called, arguments))

    def _inst(self, argument: Any) -> None:
        arguments = tuple(self._pop_mark())
        self._global(argument)
        self.stack.append(self.called(self.stack.pop(), arguments))

    def _obj(self, _: Any) -> None:
        called, *arguments = self._pop_mark()
        self.stack.append(self.called(called, tuple(arguments)))

    def called(self, called: Any, arguments: Any) -> Any:
        """What the table says of a name with arguments; nothing else is ever called."""
        if isinstance(called, Foreign):
            return called
        if not isinstance(called, Symbol) or called.call is None or not isinstance(arguments, tuple):
            name = called.name if isinstance(called, Symbol) else type(called).__name__
            raise DamagedPickle(f"its pickle calls a {name}")
        if any(isinstance(argument, Foreign) for argument in arguments):
            return next(argument for argument in arguments if isinstance(argument, Foreign))
        return called.call(*arguments)

    def _build(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, argparse.Namespace):
            if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
                raise DamagedPickle("its pickle gives a Namespace what are no settings")
            target.__dict__.update(state)
        elif hasattr(target, "with_state"):
            self.stack[-1] = target.with_state(state)
        elif not isinstance(target, (dict, Foreign)):  # an OrderedDict may have attributes: dropped
            raise DamagedPickle(f"its pickle gives a {type(target).__name__} a state")

    def _binpersid(self, _: Any) -> None:
        if self.persistent is None:
            raise DamagedPickle("its pickle names a storage where there is none")
        self.stack.append(self.persistent(self.stack.pop()))


CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
LITERALS = (
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
)  # fmt: skip


def plain_key(key: Any) -> Hashable:
    """`key`, if it is text or a number, or a tuple of such. Anything deeper could end the process when hashed."""
    simple = (str, int, float, bool, bytes, type(None))
    if isinstance(key, simple) or (isinstance(key, tuple) and all(isinstance(part, simple) for part in key)):
        return key
    if isinstance(key, (Foreign, Symbol)):
        return key.name
    raise DamagedPickle(f"its pickle has a {type(key).__name__} as a key")


def children(node: Any) -> list[Any]:
    """What a container holds; nothing for anything else."""
    if isinstance(node, dict):
        return list(node.values())
    if isinstance(node, argparse.Namespace):
        return list(vars(node).values())
    return list(node) if isinstance(node, (list, tuple)) else []


def check_tree(root: Any) -> None:
    """DamagedPickle for a tree that holds itself, or is deeper or larger than any checkpoint."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()
    pending: list[tuple[Any, bool]] = [(root, False)]
    while pending:
        node, is_done = pending.pop()
        if is_done:
            open_nodes.discard(id(node))
            sizes[id(node)] = 1 + sum(sizes.get(id(child), 1) for child in children(node))
            if sizes[id(node)] > MAX_NODES:
                raise DamagedPickle(TOO_MANY)
        elif id(node) in open_nodes:
            raise DamagedPickle("its pickle holds itself")
        elif id(node) not in sizes:
            inner = [
                child
                for child in children(node)
                if isinstance(child, (dict, list, tuple, argparse.Namespace))
            ]
            open_nodes.add(id(node))
            if len(open_nodes) > MAX_DEPTH:
                raise DamagedPickle(f"its pickle is nested more than {MAX_DEPTH} deep")
            pending.append((node, True))
            pending.extend((child, False) for child in inner)
