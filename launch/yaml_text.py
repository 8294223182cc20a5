"""YAML as people expect it: `1e-3` is a number, `2:5` and `no` are text, a key given twice is refused."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from ..checkpoints.regular_files import read_regular
from ..checkpoints.safety.plain_yaml import MAX_BYTES, MAX_DEPTH, MAX_NODES, BoundedLoader, YamlError, parse
from ..models.errors import ConfigError

__all__ = ["MAX_DEPTH", "MAX_NODES", "YamlError", "parse_yaml", "read_yaml", "write_yaml"]


class Loader(BoundedLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2 (`2:5` is 125 in YAML 1.1, and `1e-3` is text)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse a key that is given twice: the first would be lost without a word."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes what `Loader` would take for something else than text."""


_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        list("-+.0123456789"),
    ),
}
for _side in (Loader, Dumper):
    _side.yaml_implicit_resolvers = {}
    for _tag, (_pattern, _first) in _SCALARS.items():
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def parse_yaml(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        YamlError: if the text is not YAML, or larger, deeper or more than anybody writes.
    """
    return parse(text, Loader)


def read_yaml(path: Path) -> str:
    """The text of a YAML file. Raises ConfigError: it is no regular file, too large, or cannot be read."""
    return read_regular(path, limit=MAX_BYTES, refusal=ConfigError)


def write_yaml(value: Any) -> str:
    """The YAML of plain values, keys in their order."""
    # escapes instead of unicode: some line breaks of unicode that PyYAML writes, it reads back as spaces
    text: str = yaml.dump(value, Dumper=Dumper, sort_keys=False)
    return text
