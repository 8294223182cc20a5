"""What a primitive of attention programs states about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .polynomial import NOTHING, Polynomial, Shape


def no_products(*shapes: Shape) -> Polynomial:
    """Return the multiply-adds of a primitive without matrix products."""
    return NOTHING


@dataclass(frozen=True)
class Primitive:
    """A row of the table of primitives. Values are (B, H, rows, cols)."""

    name: str
    arity: int
    shape: Callable[..., Shape | None]
    """The shape of the result for the shapes of the operands; None where the primitive is not defined."""
    run: Callable[..., Tensor]
    """The result. A primitive without operands takes any input of the program, for its batch, heads and type."""
    code: str
    """PyTorch, with `{0}` and `{1}` for the names of the operands."""
    latex: str
    """LaTeX, with `#1` and `#2` for the operands."""
    infix: bool = False
    """The LaTeX is not delimited: an operand that is not delimited either stands in parentheses."""
    products: Callable[..., Polynomial] = no_products
    """The multiply-adds of matrix products for the shapes of the operands."""
    mixes_heads: bool = False
    """The result of a head depends on other heads of the image."""
    commutes: bool = False
