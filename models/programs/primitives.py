"""The table of primitives by name."""

from __future__ import annotations

from .binary_primitives import BINARY, NULLARY
from .primitive import Primitive
from .unary_primitives import UNARY

PRIMITIVES: dict[str, Primitive] = {row.name: row for row in [*NULLARY, *UNARY, *BINARY]}
