"""Text in Markdown is text, in whatever it stands."""

from __future__ import annotations

import pytest
from graftvit.checkpoints.markdown import code, fenced, plain


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("*: linear; 9-11: keep", "*: linear; 9-11: keep"),
        ("[0,3,5] & a", "[0,3,5] &amp; a"),
        ("<img src=x onerror=alert(1)>", "&lt;img src=x onerror=alert(1)&gt;"),
        ("a | b\n\n# c", r"a \| b # c"),
        ("[a](javascript:b) ![a][b] [a]: b", r"[a\](javascript:b) ![a\][b] [a\]: b"),
        ("`a` \x1b[2J", r"\`a\` \x1b[2J"),
    ],
)
def test_a_text_is_shown_as_it_is(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_code_ends_where_it_ends() -> None:
    assert code("a`b|<i>\n") == r"`a'b\|<i>`"
    assert code(" ") == "(empty)"
    assert fenced("a\n````\n</details>\x1b[2J", "yaml") == "`````yaml\na\n````\n</details>\\x1b[2J\n`````"
