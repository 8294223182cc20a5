"""Print programs for readers: LaTeX, and PyTorch that computes the same."""

from __future__ import annotations

import re

from .primitives import PRIMITIVES
from .program import Node, Program

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
