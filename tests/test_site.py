"""`make docs` builds a site of the pages: every link leads somewhere, and nothing comes from another host."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import graftvit
import pytest

ROOT = Path(__file__).resolve().parent.parent


class Links(HTMLParser):
    """Links, places and loaded files of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.places: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        elif tag != "meta" and ("src" in given or "href" in given):
            self.loaded |= {
                each for each in [given.get("src") or given["href"]] if not each.startswith("data:")
            }


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package, reason="the site needs pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    built = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(built, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = {path: Links(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) > len([*(ROOT / "docs").glob("*.md")])
    dead = []
    for page, found in pages.items():
        assert not [each for each in found.loaded if each.startswith(("http:", "https:", "//"))], page
        for link in found.loaded | {each for each in found.links if not each.startswith(("http", "mailto:"))}:
            path, place = urldefrag(link)
            target = (page.parent / unquote(path)).resolve() if path else page
            if not target.exists() or (place and unquote(place) not in pages[target].places):
                dead.append((page.name, link))
    assert dead == []
    names = pages[site / "api.html"].places
    assert {f"graftvit.{name}" for name in (*graftvit.__all__, "DualViT.release")} <= names
    assert not {"graftvit.DualViT.sides", "graftvit.RunConfig.facts"} & names
    assert (site / "transfer/data/digits.txt").read_text() == (ROOT / "transfer/data/digits.txt").read_text()
