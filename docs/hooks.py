"""Make README.md the first page of the site, and its table of pages the navigation (`hooks` of mkdocs.yml)."""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

import graftvit
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
ROW = re.compile(r"^\| ([^|]+) \| (\[.+) \|$", re.MULTILINE)
NAMED = re.compile(r"\[([^]]+)\]\(([^)]+)\)")
TARGET = re.compile(r"(?<=\]\()(?![a-z]+:)[^)#]+")
"""The file of a link to a file of the repository."""
MEMBERS: dict[str, list[str]] = {
    "DualViT": [
        "describe", "forward", "map_divergences", "predict", "release", "save", "standardize", "teachers", "teaching",
        "to_model", "with_student",
    ],
    "RunConfig": [],
}  # fmt: skip
"""By class: the members that its users need, where others are for the engine. configuration.md has the settings."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make the table in README.md the navigation."""
    sections = {
        task.capitalize(): [
            {name[0].upper() + name[1:]: place_of(link)} for name, link in NAMED.findall(links)
        ]
        for task, links in ROW.findall((ROOT / "README.md").read_text())
    }
    sections["Look up"].append({"Python": "api.md"})
    config.nav = [{"Overview": "index.md"}, *({task: pages} for task, pages in sections.items())]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md, the page of the public names, and what pages link to outside of `docs/`."""
    files.append(File.generated(config, "api.md", content=write_names()))
    found = ["README.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages() if file.src_dir)]
    for path in found:
        if not path.startswith("docs/") or path.endswith(".ipynb"):
            source, level = str(ROOT / path), InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, place_of(path), abs_src_path=source, inclusion=level))
        if path.endswith((".md", ".ipynb")):
            links = {
                normpath(join(dirname(path), link)) for link in TARGET.findall((ROOT / path).read_text())
            }
            found += sorted(link for link in links if (ROOT / link).is_file() and link not in found)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Link to the places that files of the repository have in the site."""
    if page.file.abs_src_path is None:
        return markdown
    here = Path(page.file.abs_src_path).relative_to(ROOT).as_posix()

    def place(link: re.Match[str]) -> str:
        return relpath(place_of(normpath(join(dirname(here), link[0]))), dirname(page.file.src_uri))

    return TARGET.sub(place, markdown)


def write_names() -> str:
    """Return the page of the public names: the help of the package, and the place of each for mkdocstrings."""
    text = re.sub(r"^(\w.*?) {2,}(.+)$", r"- **\1**: \2", str(graftvit.__doc__), flags=re.MULTILINE)
    options = {name: f"\n    options:\n      members: {members}" for name, members in MEMBERS.items()}
    places = (f"::: graftvit.{name}{options.get(name, '')}" for name in graftvit.__all__)
    return "\n".join(["# Python", "", text, *places])


def place_of(path: str) -> str:
    """Return the place of a file of the repository in the site."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/").replace(".ipynb", ".md")


def on_page_read_source(page: Page, config: MkDocsConfig) -> str | None:
    """Return the cells of a notebook, and what they show, as Markdown."""
    path = Path(page.file.abs_src_path or "")
    if path.suffix != ".ipynb":
        return None
    cells = json.loads(path.read_text())["cells"]
    download = f'<p><a href="{path.name}" download>Download this notebook</a></p>'
    return "\n\n".join([*(part for cell in cells for part in render_cell(cell)), download])


def render_cell(cell: dict[str, Any]) -> list[str]:
    """Return the text or the code of a cell, and its outputs: pictures, pages and text."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    outputs = [{"text/plain": each["text"]} if "text" in each else each["data"] for each in cell["outputs"]]
    return [f"```python\n{source}\n```", *map(render_output, outputs)]


def render_output(shown: dict[str, Any]) -> str:
    if "image/png" in shown:
        text = escape("".join(shown["text/plain"]))
        return f'<img alt="{text}" src="data:image/png;base64,{shown["image/png"].strip()}">'
    return f"```text\n{''.join(shown['text/plain']).rstrip()}\n```"
