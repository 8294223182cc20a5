"""Formulas of programs as MathML, which browsers draw: from the part of LaTeX that `latex` writes."""

from __future__ import annotations

import re
from html import escape

from .program import Program
from .program_printing import latex

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
