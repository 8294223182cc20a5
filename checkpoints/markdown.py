"""Escape text for Markdown: no HTML, no link, no end of a table's cell."""

from __future__ import annotations

import html
import re

from ..models.errors import escaped, one_sentence

LONGEST = 10_000
"""Characters of a paragraph."""


def plain(text: object) -> str:
    """`text` in one line, as a reader of the Markdown sees it."""
    line = html.escape(one_sentence(str(text), LONGEST), quote=False)
    return re.sub(r"[`|]|\](?=[(\[:])", r"\\\g<0>", line)


def code(value: object) -> str:
    """Return a value as code for a line or a table cell; nothing in it can end either."""
    text = one_sentence(str(value)).replace("`", "'").replace("|", r"\|")
    return f"`{text}`" if text else "(empty)"


def fenced(text: str, language: str) -> str:
    """Return lines as they are, in a block that nothing in them can end."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{escaped(text)}{'' if text.endswith(chr(10)) else chr(10)}{fence}"
