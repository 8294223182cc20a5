"""A program: a graph of primitives over Q, K and V, whose identity is its canonical text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import ConfigError, counted, did_you_mean
from .polynomial import NOTHING, TOKENS, Polynomial, Shape
from .primitives import PRIMITIVES

INPUTS = ("q", "k", "v")
MAX_NODES = 64
"""Maximum number of distinct values in a program, with its inputs: a program may come from an untrusted file."""
MAX_TEXT = 400
"""Maximum length of the canonical text."""


class ProgramError(ConfigError):
    """A program, or a part of one, that is not defined."""


@dataclass(frozen=True)
class Node:
    """A value: an input, or a primitive of operands. Nodes with the same text are the same value."""

    text: str
    shape: Shape = field(compare=False)
    primitive: str = field(default="", compare=False)
    operands: tuple[Node, ...] = field(default=(), compare=False)


Q, K, V = (Node(name, TOKENS) for name in INPUTS)


def apply(name: str, *operands: Node) -> Node:
    """Return the value of a primitive, in canonical form.

    A transpose of a transpose or of a transposed product is undone, a transposed operand makes a product of another
    kind, and operands that commute are sorted.

    Raises ProgramError: there is no such primitive, or it is not defined for these operands.
    """
    row = PRIMITIVES.get(name)
    if row is None:
        raise ProgramError(f"unknown primitive {name!r}; {did_you_mean(name, PRIMITIVES)}")
    if len(operands) != row.arity:
        raise ProgramError(f"{name} takes {counted(row.arity, 'operand')}, not {len(operands)}")
    shape = row.shape(*(each.shape for each in operands))
    if shape is None:
        shapes = " and ".join(str(each.shape) for each in operands)
        raise ProgramError(f"{name} is not defined for {shapes}, in {_brief(name, operands)}")
    name, operands = _simplified(name, operands)
    if not name:
        return operands[0]
    if PRIMITIVES[name].commutes:
        operands = tuple(sorted(operands, key=lambda node: node.text))
    text = f"{name}({' '.join(each.text for each in operands)})" if operands else name
    if len(text) > MAX_TEXT:
        raise ProgramError(f"the program is longer than {MAX_TEXT} characters")
    return Node(text, shape, name, operands)


PRODUCTS = {"mm": (False, False), "tn": (True, False), "nt": (False, True)}
"""Which operands of a product are transposed."""


def _simplified(name: str, operands: tuple[Node, ...]) -> tuple[str, tuple[Node, ...]]:
    """Return an equal primitive with fewer transposes; its name is empty if the value is its only operand."""
    if name == "t":
        [inner] = operands
        if inner.primitive == "t":
            return "", inner.operands
        if inner.primitive in ("tn", "nt"):
            return _simplified(inner.primitive, inner.operands[::-1])
    if name in PRODUCTS:
        sides = [_upright(flip, each) for flip, each in zip(PRODUCTS[name], operands, strict=True)]
        flips = tuple(flip for flip, _ in sides)
        for kind, wanted in PRODUCTS.items():
            if flips == wanted:
                return kind, tuple(each for _, each in sides)
    return name, operands


def _upright(flip: bool, node: Node) -> tuple[bool, Node]:
    """Return an operand of a product without transpose, and whether the product still has to transpose it."""
    if node.primitive == "t":
        return not flip, node.operands[0]
    if flip and node.primitive in ("tn", "nt"):
        return False, apply("t", node)
    return flip, node


@dataclass(frozen=True)
class Program:
    """An attention formula; `root` is an N×D matrix for each head.

    Raises ProgramError: the output is not N×D, there is no input, or there are too many nodes.
    """

    root: Node
    nodes: tuple[Node, ...] = field(init=False, compare=False, repr=False)
    """Each distinct value once, operands first."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", tuple(dict.fromkeys(walk_operands(self.root))))
        if self.root.shape != TOKENS:
            raise ProgramError(f"a program gives {TOKENS}, and this one gives {self.root.shape}: {self.text}")
        if not self.inputs:
            raise ProgramError(f"the program reads neither q, k nor v: {self.text}")
        if len(self.nodes) > MAX_NODES:
            raise ProgramError(f"the program has {len(self.nodes)} values; at most {MAX_NODES} are allowed")

    @property
    def text(self) -> str:
        return self.root.text

    @property
    def hash(self) -> str:
        """Return the identity of the program: 16 hexadecimal digits of the SHA-256 of its canonical text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @property
    def inputs(self) -> tuple[str, ...]:
        texts = {node.text for node in self.nodes}
        return tuple(name for name in INPUTS if name in texts)

    @property
    def mixes_heads(self) -> bool:
        """Return whether the output of a head depends on other heads of the image."""
        return any(node.primitive and PRIMITIVES[node.primitive].mixes_heads for node in self.nodes)

    @property
    def products(self) -> Polynomial:
        """Return the multiply-adds of the matrix products of one head."""
        total = NOTHING
        for node in self.nodes:
            if node.primitive:
                total += PRIMITIVES[node.primitive].products(*(each.shape for each in node.operands))
        return total

    @property
    def entries(self) -> Polynomial:
        """Return the number of entries that the primitives of one head compute."""
        total = NOTHING
        for node in self.nodes:
            if node.primitive:
                total += node.shape.entries
        return total

    @property
    def order(self) -> int:
        """Return the highest power of N in time or memory: 1 for linear attention, 2 for softmax attention."""
        return max(self.products.order, self.entries.order)

    def __call__(self, **inputs: Tensor | None) -> Tensor:
        """Return the output (B, H, N, D) for `q`, `k` and `v` of that shape; unused inputs may be None."""
        values: dict[str, Tensor] = {name: x for name, x in inputs.items() if x is not None}
        like = values[self.inputs[0]]
        for node in self.nodes:
            if node.primitive:
                operands = [values[each.text] for each in node.operands] or [like]
                values[node.text] = PRIMITIVES[node.primitive].run(*operands)
        return values[self.text]


def walk_operands(node: Node) -> Iterator[Node]:
    """Yield what a value is computed from, operands first, and the value."""
    for operand in node.operands:
        yield from walk_operands(operand)
    yield node


def _brief(name: str, operands: tuple[Node, ...]) -> str:
    text = f"{name}({' '.join(each.text for each in operands)})"
    return text if len(text) <= 80 else f"{text[:77]}..."
