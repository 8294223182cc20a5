"""Write the tables of settings and methods in `docs/` from their descriptions in the code: `make docs`."""

from __future__ import annotations

import re
from pathlib import Path

from graftvit.launch.fields import Leaf, leaves, sections, short_names
from graftvit.transfer.methods.method_facts import LAYERS, METHODS
from graftvit.transfer.methods.registry import find_method
from graftvit.transfer.setting import OneOf, rule_of

DOCS = Path(__file__).parent.parent / "docs"
MARKED = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- end -->)", re.DOTALL)
HEAD = "| key | flag | default | meaning |\n| --- | --- | --- | --- |\n"


def render_settings() -> str:
    """Return a table for each section, in the order of the configuration."""
    titles = {"": "### The run\n"} | {
        name: f"### {name}\n\n{' '.join((section.__doc__ or '').split())}\n"
        for name, section in sections().items()
    }
    parts = [
        f"\n{title}\n{HEAD}" + "".join(render_row(leaf) for leaf in leaves().values() if leaf.section == name)
        for name, title in titles.items()
    ]
    return "".join(parts) + "\n"


def render_row(leaf: Leaf) -> str:
    short = [f"`--{name}`" for name, key in short_names().items() if key == leaf.key]
    see = rule_of(leaf.field).see
    meaning = mark_code(str(leaf.field.description)) + (f" ({see})" if see else "")
    listed_there = see and any(isinstance(each, OneOf) for each in leaf.field.metadata)
    valid = leaf.valid() if leaf.valid().startswith("one of") and not listed_there else ""
    meaning += f" ({valid})" if valid else ""
    return (
        f"| `{leaf.key}` | {', '.join(short) or f'`--{leaf.key}`'} | {render_default(leaf)} | {meaning} |\n"
    )


def render_default(leaf: Leaf) -> str:
    value = leaf.field.default
    if leaf.is_switch:
        return "on" if value else "off"
    if isinstance(value, tuple) and value:
        value = ",".join(map(str, value))
    return "none" if value is None else "empty" if value == "" else f"`{value}`"


def mark_code(text: str) -> str:
    """Mark dotted keys and words such as `aa=none` as code."""
    return re.sub(r"(?<![\w./])(\w+=\w+|(?:data|student|teacher|transfer)\.\w+)(?![\w.])", r"`\1`", text)


def render_methods() -> str:
    """Return a row for each method: what it does by default, and what it reads beside layers, weight and reduction."""
    columns = ["`transfer.method`", "what it does by default", "settings of its own", "teacher at inference"]
    head = f"\n| {' | '.join(columns)} |\n| --- | --- | --- | --- |\n"
    return head + "".join(map(render_method, METHODS)) + "\n"


def render_method(name: str) -> str:
    own = [f"`{setting}`" for setting in sorted((METHODS[name].reads or set()) - LAYERS)]
    teacher = "a part, in the student" if METHODS[name].copies else "none"
    return f"| `{name}` | {find_method(name).describe({})} | {', '.join(own)} | {teacher} |\n"


PAGES = {"configuration.md": render_settings, "transfer.md": render_methods}
"""By page: what its marked table holds."""


def main() -> None:
    for name, render in PAGES.items():
        text = (DOCS / name).read_text()
        (DOCS / name).write_text(MARKED.sub(lambda _, render=render: render(), text))


if __name__ == "__main__":
    main()
