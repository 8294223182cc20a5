"""A program: a graph of primitives over Q, K and V, whose identity is its canonical text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape

from torch import Tensor

from ..errors import ConfigError, counted, did_you_mean
from .primitives import NOTHING, PRIMITIVES, TOKENS, Polynomial, Shape

# The modules that AttnZero ships, as programs, and the attention that its configuration starts from.
#
# A number is a position in its list of candidates. `bench_1` and `bench_2` are in templates of its benchmark,
# without a number. Its `cosine_similarity` compares a tensor with itself, which gives the number one for one
# image. Trials 20 and 40 add dimensions that a program does not have: these are their formulas without them.

LINEAR = "mul(mm(elu1(q) tn(elu1(k) v)) recip(nt(elu1(q) sum(elu1(k)))))"
"""(φ(Q) (φ(K)ᵀ V)) / (φ(Q) Σ φ(K) + 1e-6), φ = elu + 1."""

FOUND: dict[str, str] = {
    "attnzero_105": "mul(l2(mm(l2(q) zscore(tn(minmax(v) elu1(k))))) q)",
    "attnzero_140": "add(l2(nt(abs(v) sigmoid(tn(elu1(k) scale(v))))) l2t(q))",
    "attnzero_240": "nt(l2t(add(l2t(add(sigmoid(relu(k)) softsign(v))) q)) "
    "l2t(tn(v l2t(add(l2t(add(sigmoid(relu(k)) softsign(v))) q)))))",
    "attnzero_272": "add(softmax(nt(v sign(tn(v abslog(k))))) softsign(q))",
    "attnzero_20": "mul(mul(k sigmoid(q)) softsign(v))",
    "attnzero_25": "mul(cosigmoid(mul(q sign(k))) l2(v))",
    "attnzero_34": "mul(add(sign(v) softmax(q)) zscore(mul(l2t(k) v)))",
    "attnzero_40": "q",
    "attnzero_76": "add(relu(q) softmax(mul(neg(scale(q)) sqrt(one))))",
    "attnzero_80": "add(minmax(one) scale(v))",
    "attnzero_174": "add(q sumnorm(l2t(mul(cosigmoid(v) relu(softsign(one))))))",
    "attnzero_228": "mul(cosigmoid(v) sigmoid(add(k q)))",
    "attnzero_bench_1": "add(elu1(q) neg(one))",
    "attnzero_bench_2": "mul(cosigmoid(add(l2(k) l2t(abslog(v)))) sumnorm(add(abslog(v) cosigmoid(q))))",
}
"""Programs by the name of their operator; the first four mix tokens by their content."""


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

    @property
    def last_product(self) -> str:
        """Return the text of the last matrix product with a row for each token; empty without one."""
        products = [node.text for node in self.nodes if node.primitive in PRODUCTS and node.shape == TOKENS]
        return products[-1] if products else ""

    def __call__(self, bias: Tensor | None = None, **inputs: Tensor | None) -> Tensor:
        """Return the output (B, H, N, D) for `q`, `k` and `v` of that shape; unused inputs may be None.

        A `bias` (1, H, N, D) is added to `last_product`.
        """
        values: dict[str, Tensor] = {name: x for name, x in inputs.items() if x is not None}
        like, last = values[self.inputs[0]], self.last_product
        for node in self.nodes:
            if node.primitive:
                operands = [values[each.text] for each in node.operands] or [like]
                values[node.text] = PRIMITIVES[node.primitive].run(*operands)
                if bias is not None and node.text == last:
                    values[node.text] = values[node.text] + bias
        return values[self.text]


def walk_operands(node: Node) -> Iterator[Node]:
    """Yield what a value is computed from, operands first, and the value."""
    for operand in node.operands:
        yield from walk_operands(operand)
    yield node


def _brief(name: str, operands: tuple[Node, ...]) -> str:
    text = f"{name}({' '.join(each.text for each in operands)})"
    return text if len(text) <= 80 else f"{text[:77]}..."


# Print programs for readers: LaTeX, and PyTorch that computes the same.

OPERAND = re.compile("#([12])")


def latex(program: Program) -> str:
    """Return the formula. c is the number of columns, φ(x) = elu(x) + 1, and σ̄ = 1 − σ."""
    return _latex(program.root)


def _latex(node: Node) -> str:
    if not node.primitive:
        return node.text.upper()
    row = PRIMITIVES[node.primitive]
    parts = [_latex(each) for each in node.operands]
    if row.infix:
        loose = [each.primitive and PRIMITIVES[each.primitive].infix for each in node.operands]
        parts = [rf"\left({part}\right)" if wrap else part for part, wrap in zip(parts, loose, strict=True)]
    return OPERAND.sub(lambda found: parts[int(found[1]) - 1], row.latex)


def torch_code(program: Program) -> str:
    """Return the source of a function `attention(q, k, v)` of tensors (B, H, N, D)."""
    names: dict[str, str] = {name: name for name in program.inputs}
    lines: list[str] = []
    for node in program.nodes:
        if node.primitive:
            row = PRIMITIVES[node.primitive]
            operands = [names[each.text] for each in node.operands] or [program.inputs[0]]
            names[node.text] = "out" if node == program.root else f"x{len(lines) + 1}"
            lines.append(f"    {names[node.text]} = {row.code.format(*operands)}  # {node.shape}")
    body = "\n".join([*lines, f"    return {names[program.text]}"])
    return (
        "import torch\nimport torch.nn.functional as F\n\n\ndef attention(q, k, v):\n"
        f'    """{program.text}"""\n{body}\n'
    )


# Formulas of programs as MathML, which browsers draw: from the part of LaTeX that `latex` writes.

TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[0-9]+|[^\s]")
SYMBOLS = {r"\phi": "φ", r"\sigma": "σ", r"\top": "⊤", r"\max": "max"}
OPERATORS = {r"\odot": "⊙", "-": "−"}
SPACES = (r"\,", r"\;")


def mathml(program: Program) -> str:
    """Return the formula O = … as an element `math`."""
    row = _Reader(latex(program)).row()
    return f'<math display="block"><mi>O</mi><mo>=</mo>{row}</math>'


class _Reader:
    """A reader of LaTeX tokens from left to right."""

    def __init__(self, text: str) -> None:
        self._tokens = TOKEN.findall(text)

    def row(self, end: str = "") -> str:
        """Return all items up to the token `end`, or up to the end of the formula, and take that token."""
        items: list[str] = []
        while self._tokens and self._tokens[0] != end:
            if self._tokens[0] in ("^", "_"):
                tag = "msup" if self._tokens.pop(0) == "^" else "msub"
                items.append(f"<{tag}>{items.pop()}{self._item()}</{tag}>")
            else:
                items.append(self._item())
        if end:
            self._tokens.pop(0)
        return f"<mrow>{''.join(items)}</mrow>"

    def _item(self) -> str:
        token = self._tokens.pop(0)
        if token == "{":
            return self.row("}")
        if token == r"\left":
            return self._fenced()
        if token == r"\frac":
            return f"<mfrac>{self._item()}{self._item()}</mfrac>"
        if token == r"\sqrt":
            return f"<msqrt>{self._item()}</msqrt>"
        if token == r"\bar":
            return f"<mover>{self._item()}<mo>¯</mo></mover>"
        if token == r"\operatorname":
            return self._name()
        return _leaf(token)

    def _fenced(self) -> str:
        """Return what stands between \\left and \\right, with its signs."""
        sign = self._tokens.pop(0)
        inside = self.row(r"\right")
        return f"<mrow><mo>{escape(sign)}</mo>{inside}<mo>{escape(self._tokens.pop(0))}</mo></mrow>"

    def _name(self) -> str:
        """Return a function's name, which may have an index."""
        end = self._tokens.index(r"\left")
        word, _, index = "".join(self._tokens[1 : end - 1]).partition("_")
        del self._tokens[:end]
        name = f"<mi>{escape(word)}</mi>"
        return f"<msub>{name}<mi>{escape(index.strip('{}'))}</mi></msub>" if index else name


def _leaf(token: str) -> str:
    if token in SPACES:
        return '<mspace width="0.17em"></mspace>'
    if token.isdecimal():
        return f"<mn>{token}</mn>"
    if token in SYMBOLS or token.isalpha():
        return f"<mi>{SYMBOLS.get(token, token)}</mi>"
    return f"<mo>{escape(OPERATORS.get(token, token))}</mo>"


# Read the text of a program: `mm(softmax(nt(scale(q) k)) v)`.
#
# The text has no comma and no semicolon, so that it can stand in a layer plan, and it is never evaluated as code.

WORD = re.compile(r"\s*(?:([a-z][a-z0-9]*)|([()]))")
LEAVES = dict(zip(INPUTS, (Q, K, V), strict=True))


def parse_program(text: str) -> Program:
    """Return the program of a text, canonical or not.

    Raises ProgramError: the text is too long, is not well formed or not well typed.
    """
    if len(text) > MAX_TEXT:
        raise ProgramError(f"the program is longer than {MAX_TEXT} characters")
    tokens = _tokens(text)
    node, end = _node(tokens, 0)
    if end != len(tokens):
        raise ProgramError(f"program: {tokens[end]!r} stands after the end of {node.text}")
    return Program(node)


def _tokens(text: str) -> list[str]:
    tokens, at, text = [], 0, text.rstrip()
    while at < len(text):
        found = WORD.match(text, at)
        if found is None:
            wrong = text[at:].strip()[:1]
            hint = "; separate operands by a space" if wrong == "," else ""
            hint = "; names are in lower case" if wrong.isupper() else hint
            raise ProgramError(f"program: {wrong!r} is not a name or a parenthesis{hint}")
        tokens.append(found[1] or found[2])
        at = found.end()
    return tokens


def _node(tokens: list[str], at: int) -> tuple[Node, int]:
    """Return the value that starts at token `at`, and where the next one starts."""
    if at == len(tokens) or tokens[at] in "()":
        found = "its end" if at == len(tokens) else repr(tokens[at])
        raise ProgramError(f"program: a primitive, q, k or v is expected in place of {found}")
    name, at = tokens[at], at + 1
    if name in LEAVES:
        return LEAVES[name], at
    operands = []
    if at < len(tokens) and tokens[at] == "(":
        at += 1
        while at < len(tokens) and tokens[at] != ")":
            operand, at = _node(tokens, at)
            operands.append(operand)
        if at == len(tokens):
            raise ProgramError(f"program: the parenthesis of {name} is not closed")
        at += 1
    return apply(name, *operands), at
