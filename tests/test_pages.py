"""`python -m benchmarks.pages` writes what was measured into the pages, and README.md leads to each of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.pages import main

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """Copies of the pages, after a run of other numbers."""
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/transfer.md"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    result = json.loads(RESULTS.read_text())
    for row in result["rows"]:
        for name in row["ratio"]:
            row["ratio"][name] = row["tokens"] / 10_000 + len(name)
    (tmp_path / "cpu.json").write_text(json.dumps(result | {"machine": "a machine", "repeats": 11}))
    for row in result["rows"]:
        row["ratio"] |= {"distill": row["ratio"]["distill"] + 1, "dense distill": 4.0}
    (tmp_path / "kept.json").write_text(json.dumps(result))
    return tmp_path


def command(root: Path) -> list[str]:
    given = ["--results", f"{root}/cpu.json", "--kept", f"{root}/kept.json", "--root", str(root)]
    return [sys.executable, "-m", "benchmarks.pages", *given]


def test_the_numbers_are_between_the_marks(pages: Path) -> None:
    subprocess.run(command(pages), cwd=ROOT, check=True, capture_output=True)
    readme, transfer = (
        " ".join((pages / name).read_text().split()) for name in ("README.md", "docs/transfer.md")
    )
    assert (
        "costs 7.10 × the bound (teacher forward plus a plain student step) at 1,025 tokens and 7.23 ×"
        in readme
    )
    assert "forming the maps costs 13.10 × and 13.23 ×, and" in readme
    assert (
        "With few tokens, forming them can be faster where the C library keeps freed memory. Copying"
        in readme
    )
    assert "Copying costs 4.10 × and 4.23 × the bound" in readme
    assert "a machine" in readme
    assert "| 2,305 | 7.23 (1.24) | 4.23 (0.76) |" in transfer
    assert "medians of 11 rounds" in transfer
    assert (
        "distilling costs 8.02, 8.06, 8.10 and 8.23 × the bound at 197, 577, 1,025 and 2,305 tokens"
        in transfer
    )


def test_the_rest_of_the_pages_stays_and_writing_again_changes_nothing(
    pages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", command(pages)[2:])
    main()
    for name in ("README.md", "docs/transfer.md"):
        first = (pages / name).read_text()
        texts = ((ROOT / name).read_text(), first)
        assert first.count("<!-- cpu -->") == 1
        assert len({text.partition("<!-- cpu -->")[0] for text in texts}) == 1
        assert len({text.partition("<!-- cpu -->")[2].partition("<!-- end -->")[2] for text in texts}) == 1
    written = {name: (pages / name).read_text() for name in ("README.md", "docs/transfer.md")}
    main()
    assert written == {name: (pages / name).read_text() for name in written}


def test_the_table_of_the_front_page_has_every_page_once() -> None:
    """It is the navigation of the site, too."""
    _, table = (ROOT / "README.md").read_text().split("\n## Documentation\n")
    pages = [f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")]
    assert sorted(re.findall(r"\]\((docs/[^)]+)\)", table)) == sorted(pages)
