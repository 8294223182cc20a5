"""Write text between the marks `<!-- NAME -->` and `<!-- end -->` of a page."""

from __future__ import annotations

import re
from pathlib import Path


def put_between_marks(page: Path, name: str, text: str) -> None:
    """Replace what is between the marks of `name`. Raises ValueError: the page has no such marks."""
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    content, count = marked.subn(lambda found: f"{found[1]}{text}\n{found[2]}", page.read_text())
    if count != 1:
        raise ValueError(f"{page} has {count} marks '<!-- {name} -->' with an end, and needs one")
    page.write_text(content)
