"""Read the text of a program: `mm(softmax(nt(scale(q) k)) v)`.

The text has no comma and no semicolon, so that it can stand in a layer plan, and it is never evaluated as code.
"""

from __future__ import annotations

import re

from .program import INPUTS, MAX_TEXT, K, Node, Program, ProgramError, Q, V, apply

TOKEN = re.compile(r"\s*(?:([a-z][a-z0-9]*)|([()]))")
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
        found = TOKEN.match(text, at)
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
