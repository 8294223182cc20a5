"""The prose of the project: phrases that it does not use, and the map in CONTRIBUTING.md."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FORBIDDEN = {
    r"\banew\b": "again",
    r"\bis none\b": "is not a …",
    r"\bcomes? to (?:\d|an end|that)": "is",
    r"\bcame to\b": "the result of …",
    r"\bgoes on\b": "continues, resumes",
    r"\bgo on (?:with|from|where|without)\b": "continue, resume",
    r", for (?:it|they|there|he|she|nobody|nothing|whoever) ": "because …",
    r"^(?:That|What|Those) of\b": "start with a verb",
    r"\btold by\b": "recognized by",
    r"\bmend(?:s|ed|ing)?\b": "fix",
    r"\bsay(?:s|ing)? of (?:its|them|him)": "describe",
    r"\bputs? out\b": "returns",
    r"\bwhoever\b": "anyone who",
    r"\bthus\b": "so",
    r"\blest\b": "so that … not",
    r"\bnaught\b": "nothing",
    r"\bwhereof\b|\bthereof\b|\bwherein\b|\bwhereby\b": "of which, in which",
}
"""What not to write (a regular expression), and what to write in its place."""

CHECKED = ["launch", "checkpoints", "models", "transfer"]
"""Folders of Python files."""


def documents() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "cfgs").glob("*.yaml")])


def sentences_of_python(text: str) -> list[tuple[int, str]]:
    """The line and the text of every string and comment; parts of one string that Python joins are joined."""
    found = [
        (node.lineno, node.value)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return found + [
        (token.start[0], token.string.lstrip("# ")) for token in tokens if token.type == tokenize.COMMENT
    ]


def sentences_of_document(text: str) -> list[tuple[int, str]]:
    """The line and the text of every paragraph, without quotations of what not to write."""
    kept = text.partition("\n| not | but |\n")[0]
    found, line = [], 1
    for block in kept.split("\n\n"):
        found.append((line, block))
        line += block.count("\n") + 2
    return found


def forbidden_in(text: str) -> list[str]:
    plain = re.sub(r"\s+", " ", text.strip())
    return [
        f"{pattern!r}: write {instead!r}"
        for pattern, instead in FORBIDDEN.items()
        if re.search(pattern, plain)
    ]


def forbidden_in_files(
    paths: Iterable[Path], sentences: Callable[[str], list[tuple[int, str]]]
) -> list[tuple[str, int, str]]:
    return [
        (str(path.relative_to(ROOT)), line, each)
        for path in sorted(paths)
        for line, text in sentences(path.read_text())
        for each in forbidden_in(text)
    ]


@pytest.mark.parametrize("folder", CHECKED)
def test_code_uses_no_forbidden_phrase(folder: str) -> None:
    assert forbidden_in_files((ROOT / folder).rglob("*.py"), sentences_of_python) == []


def test_documents_use_no_forbidden_phrase() -> None:
    assert forbidden_in_files(documents(), sentences_of_document) == []


@pytest.mark.parametrize("text", [
    '"""That of a run which starts."""', 'raise ConfigError("the file is " f"none: {1} is none")',
    "x = 1  # measure it anew", '"""Read again,\nfor it may have changed."""',
])  # fmt: skip
def test_the_check_would_notice(text: str) -> None:
    assert [each for _, sentence in sentences_of_python(text) for each in forbidden_in(sentence)]


def test_every_path_in_the_map_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:models|checkpoints|transfer|launch|cfgs|tests|docs)/[\w./]*)`", text)
    assert len(named) >= 30
    assert [path for path in named if not (ROOT / path).exists()] == []
