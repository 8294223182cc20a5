"""Read and write YAML 1.2, with bounds, because the text may come from anyone.

`1e-3` is a number, and `2:5` and `no` are text (PyYAML's YAML 1.1 reads text, 125 and false). A duplicate key is
refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from typing import Any

import yaml

MAX_BYTES = 1 << 20
MAX_DEPTH = 50
"""Levels of lists and mappings."""
MAX_NODES = 100_000
"""Values and keys. An alias counts as many as the value that it repeats."""
MAX_DIGITS = 1_000
"""Characters of a whole number."""


class YamlError(yaml.YAMLError):
    """The reason why a text is invalid, in one line."""


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2 and bounds on memory and nesting."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._nodes = 0
        self._sizes: dict[str, int | None] = {}  # by anchor; None while its value is being read

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Count the node, then read it as PyYAML does."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            size = self._sizes.get(str(event.anchor), 1)
            if size is None:
                raise YamlError(f"the value that &{event.anchor} names holds itself{_place(event)}")
            self._count(size, event)
            return super().compose_node(parent, index)
        if self._depth >= MAX_DEPTH and not isinstance(event, yaml.ScalarEvent):
            raise YamlError(f"it nests more than {MAX_DEPTH} levels{_place(event)}")
        self._count(1, event)
        before = self._nodes
        if event.anchor is not None:
            self._sizes[event.anchor] = None
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor is not None:
            self._sizes[event.anchor] = 1 + self._nodes - before
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Limit the length, because PyYAML takes quadratic time for a long 1:2:3."""
        if len(str(node.value)) > MAX_DIGITS:
            raise YamlError(f"it has a whole number of more than {MAX_DIGITS} characters{_place(node)}")
        return int(super().construct_yaml_int(node))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse a duplicate key: the first value would be lost silently."""
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

    def _count(self, nodes: int, event: yaml.NodeEvent) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise YamlError(f"it has more than {MAX_NODES:,} values{_place(event)}")


class Dumper(yaml.SafeDumper):
    """Quote text that `Loader` would not read as text."""


_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        list("-+.0123456789"),
    ),
}
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
for _side in (Loader, Dumper):
    _side.yaml_implicit_resolvers = {}
    for _tag, (_pattern, _first) in _SCALARS.items():
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML document.

    Raises:
        YamlError: the text is not YAML, a value does not have the form of its type, or a bound is exceeded.
    """
    if len(text) > MAX_BYTES:
        raise YamlError(f"it has more than {MAX_BYTES:,} bytes")
    try:
        return yaml.load(text, Loader)
    except YamlError:
        raise
    except yaml.YAMLError as error:
        raise YamlError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise YamlError("it nests too many levels") from error
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        # PyYAML's constructors trust the tags of a text
        raise YamlError(f"it has an invalid value: {' '.join(str(error).split())}") from error


def write_yaml(value: Any) -> str:
    """Return plain values as YAML, keys in their order; a text is never wrapped."""
    # Escape unicode, because PyYAML reads some unicode line breaks that it writes as spaces.
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, width=math.inf)


def _place(at: yaml.Event | yaml.Node) -> str:
    mark = at.start_mark
    return "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
