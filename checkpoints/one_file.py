"""Write what a student needs of our sources as one file, `modeling_graftvit.py`, which runs without graftvit.

Definitions are taken whole from the modules that have them, by following names from `modeling_graftvit.py` beside this
file and from what the student's `config.json` names. Two tables are cut to what the student has, of operators and of
families. The file has the modules one after another, each after those that it needs.
"""

from __future__ import annotations

import ast
import builtins
import itertools
import json
import linecache
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec, resolve_name
from pathlib import Path
from types import ModuleType
from typing import Any

from timm.models import model_entrypoint

from ..models import layer_plan
from ..models.converted import choices_of
from ..models.copied import ARCHITECTURE as COPIED
from ..models.errors import CheckpointError, Json, JsonDict
from ..models.families import Family, find_family, walk
from .architecture import build
from .files import read_json
from .provenance import architecture_of
from .sources import CONFIG

FILE = "modeling_graftvit.py"
ROOT = f"{__package__}.modeling_graftvit"
HEAD = '''\
# Written by graftvit {version} from its sources.
# Licensed under the Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0
# The weights have a license of their own: see config.json and README.md.
"""The model in the folder of this file ({architecture}), for torch, timm and safetensors alone.

    from modeling_graftvit import load

    model = load("FOLDER")
"""

from __future__ import annotations
'''
AUTO_CLASSES = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForImageClassification": "Model"}
DROPPED = ("register_model", "register_operator", "register_family", "register_method", "check_types")
"""Decorators, and statements that call these, which the file leaves out: its tables have its models, operators and
families, and its callers' types are theirs to check."""
KNOWN = {*dir(builtins), "__name__", "__package__", "__file__"}


def for_transformers(config: Json) -> JsonDict:
    """Return a config.json by which `transformers.AutoModel` finds its classes in the file beside it."""
    found = {auto: f"modeling_graftvit.GraftViT{kind}" for auto, kind in AUTO_CLASSES.items()}
    return {**config, "model_type": "graftvit", "auto_map": found}


def for_timm(config: Json) -> JsonDict:
    """Return a config.json that names no file beside it."""
    return {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}


def write_modeling(folder: Path) -> None:
    """Write `modeling_graftvit.py` into a student's folder, and say so in its config.json.

    Raises CheckpointError as `modeling_file`.
    """
    config = for_transformers(read_json(folder / CONFIG))
    (folder / FILE).write_text(modeling_file(config), encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def modeling_file(config: Json) -> str:
    """Return the text of `modeling_graftvit.py` for a student's config.json.

    Raises CheckpointError: an operator, architecture or family of another package is not defined in a module, or needs
    what its module does not define.
    """
    name, described = config["architecture"], [(config["architecture"], config["model_args"])]
    if name == COPIED:
        teacher = config["model_args"]["copied"]["teacher"]
        described.append((teacher["architecture"], teacher["model_args"]))
    names = set[str]()
    token = walk.constructed.set(names)
    try:
        models = [build(*each, on_meta=True) for each in described]
    finally:
        walk.constructed.reset(token)
    words = sorted({choice.operator for model in models for choice in choices_of(model)})
    operators = {word: layer_plan.OPERATORS[word] for word in words if word in layer_plan.OPERATORS}
    built = {name: model_entrypoint(name) for name in sorted(names)}
    built = {name: constructor for name, constructor in built.items() if _package(constructor) != "timm"}
    tables = {
        Name(layer_plan.__name__, "OPERATORS"): operators,
        Name(walk.__name__, "FAMILIES"): list(dict.fromkeys(filter(None, map(find_family, models)))),
        Name(ROOT, "ARCHITECTURES"): built,
        Name(ROOT, "MODEL"): architecture_of(config),
    }
    own = {
        _package(getattr(each, "func", each))
        for each in (modeling_file, *operators.values(), *built.values())
    }
    head = HEAD.format(version=version("graftvit"), architecture=name)
    return head + _Merged(own, tables).text(ROOT)


def _package(thing: Any) -> str:
    return str(thing.__module__).partition(".")[0]


# Names: what a module binds, and what each of its names means.


@dataclass(frozen=True, order=True)
class Name:
    """A definition in a module of ours or, with an alias, an import of another package: of itself, without `name`."""

    module: str
    name: str
    alias: str = ""


INNER_SCOPES = (
    ast.FunctionDef | ast.ClassDef | ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
)


def _bound(scope: ast.AST) -> set[str]:
    """Return the names that a scope binds, and not those of the scopes in it."""
    found = set[str]()
    for each in ast.iter_child_nodes(scope):
        match each:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                found.add(name)
            case ast.alias(name=name, asname=alias):
                found.add(alias or name.partition(".")[0])
            case ast.FunctionDef() | ast.ClassDef() | ast.ExceptHandler() | ast.MatchAs() | ast.MatchStar():
                found |= {each.name} if each.name else set()
        if not isinstance(each, INNER_SCOPES):
            found |= _bound(each)
    return found


def _is_dropped(node: ast.AST) -> bool:
    called = node.func if isinstance(node, ast.Call) else node
    return isinstance(called, ast.expr) and ast.unparse(called).rpartition(".")[2] in DROPPED


class _Source:
    """A module of ours: the numbers of its statements by the names that they define, and its imports."""

    def __init__(self, module: str) -> None:
        self.module = module
        try:
            spec = find_spec(module)
        except ValueError:  # of `__main__` in a notebook
            spec = None
        lines = [] if spec is None else linecache.getlines(spec.origin or "")
        if spec is None or not lines:
            raise CheckpointError(
                f"{FILE} needs the source of {module}: put it into a file of its own, and import that"
            )
        self.package = spec.parent or ""
        self.text = "".join(lines).encode()
        self.starts = [0, *itertools.accumulate(len(line.encode()) for line in lines)]
        """Where each line starts, in bytes, as syntax trees count."""
        self.body = ast.parse(self.text).body
        self.defined, self.imported = dict[str, int](), dict[str, Name]()
        self.for_types, self.in_blocks = set[str](), set[str]()
        """The names that are imported for types alone, and those that the loose statements bind."""
        self.loose, self.docs = set[int](), set[int]()
        for index, statement in enumerate(self.body):
            self._read(index, statement)
        self.in_blocks -= self.defined.keys() | self.imported.keys()

    def _read(self, index: int, statement: ast.stmt) -> None:
        names = _bound(ast.Module([statement], [])) - {"_"}
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            for inner in statement.body:
                self._read(index, inner)
            self.for_types |= names
        elif isinstance(statement, ast.Import):
            for each in statement.names:
                alias = each.asname or each.name.partition(".")[0]
                self.imported[alias] = Name(each.name, "", alias)
        elif isinstance(statement, ast.ImportFrom):
            for each in statement.names:
                alias = each.asname or each.name
                self.imported[alias] = Name(self.resolve(statement), each.name, alias)
        elif names and isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign):
            self.defined |= dict.fromkeys(names, index)
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            self.docs.add(index)
        elif not any(map(_is_dropped, ast.walk(statement))):
            self.loose.add(index)
            self.in_blocks |= names

    def resolve(self, statement: ast.ImportFrom) -> str:
        """Return the whole name of the module that a statement imports from."""
        return resolve_name("." * statement.level + (statement.module or ""), self.package)

    def span(self, node: Any) -> tuple[int, int]:
        """Return where a node starts and ends in `text`."""
        return (
            self.starts[node.lineno - 1] + node.col_offset,
            self.starts[node.end_lineno - 1] + node.end_col_offset,
        )


class _Merged:
    """What some definitions need, found by following names, and then written."""

    def __init__(self, own: set[str], tables: Mapping[Name, Any]) -> None:
        self.own, self.tables = own, tables
        self.installed = packages_distributions()
        self.sources = dict[str, _Source]()
        self.kept = defaultdict[str, set[int]](set)
        self.needed = defaultdict[str, set[str]](set)
        """The modules by those that need them."""
        self.imports = set[Name]()
        self.aliased, self.local = set[Name](), set[str]()
        """What a module calls by another name, and the names that would hide it in a function."""
        self.waiting = list[Name]()
        self.names: dict[Name, str] | None = None
        """What the file calls each of them, once all are found."""

    def text(self, root: str) -> str:
        """Return the imports, and the definitions that all those of a module need."""
        self.waiting = [Name(root, name) for name in self.source(root).defined]
        while self.waiting:
            self._keep(self.waiting.pop())
        order = list(self._order(root, set()))
        self.names = self._choose_names(order)
        lines = defaultdict[str, list[str]](list)
        for each in sorted(self.imports):
            alias = self.names[each]
            start, name = (
                (f"from {each.module} import ", each.name) if each.name else ("import ", each.module)
            )
            lines[start].append(name if alias == name else f"{name} as {alias}")
        imports = [f"import {name}" for name in lines.pop("import ", ())]
        imports += [start + ", ".join(names) for start, names in lines.items()]
        parts = ["\n".join(imports)]
        for module in order:
            found = (self._statement(self.source(module), index) for index in sorted(self.kept[module]))
            parts += [f"# {module}", *found]
        return "\n" + "\n\n\n".join(parts) + "\n"

    def source(self, module: str) -> _Source:
        if module not in self.sources:
            self.sources[module] = _Source(module)
        return self.sources[module]

    def is_own(self, module: str) -> bool:
        """Return whether a module goes into the file: one of the packages that `own` names, or of no package."""
        name = module.partition(".")[0]
        return name in self.own or not (name in sys.stdlib_module_names or name in self.installed)

    def find(self, source: _Source, name: str) -> Name | ModuleType | None:
        """Return what a name means in a module; None for a builtin, or what a loose statement binds.

        Raises CheckpointError: nothing defines it.
        """
        if name in source.defined:
            return Name(source.module, name)
        target = source.imported.get(name)
        if target is None:
            if name not in KNOWN | source.in_blocks:
                raise CheckpointError(
                    f"{source.module} uses {name}, which its file neither defines nor imports by name"
                )
            return None
        if not self.is_own(target.module):
            return target
        thing: Any = import_module(target.module)
        thing = getattr(thing, target.name) if target.name else thing
        if isinstance(thing, ModuleType):
            return thing
        inner = self.source(target.module)
        if target.name in inner.defined or target.name in inner.imported:
            return self.find(inner, target.name)
        return self.definition(thing, target.name)  # of a package that imports it when it is asked for

    def definition(self, thing: Any, word: str) -> Name:
        """Return the name of a class or function. Raises CheckpointError: no module defines it by its own name."""
        module, name = getattr(thing, "__module__", ""), getattr(thing, "__qualname__", "")
        if not module or name not in self.source(module).defined:
            kind = name or f"an object of {type(thing).__name__}"
            raise CheckpointError(
                f"{word} is {kind}, which no module defines: {FILE} can have a class of a module alone"
            )
        return Name(module, name)

    def refer(self, source: _Source, found: Name, *, now: bool = True) -> str:
        """Return what the file calls a name that a statement of a module has; until all are found, keep it.

        Args:
            now: the statement may need it when the file is run, and not only as the name of a type.
        """
        if self.names is not None:
            return self.names[found]
        if now and not found.alias and found.module != source.module:
            self.needed[source.module].add(found.module)
        self.waiting.append(found)
        return found.name

    def _keep(self, found: Name) -> None:
        if found.alias:
            self.imports.add(found)
            return
        source, kept = self.source(found.module), self.kept[found.module]
        for index in {source.defined[found.name]} | (set() if kept else source.loose):
            if index not in kept:
                kept.add(index)
                self._statement(source, index)

    def _statement(self, source: _Source, index: int) -> str:
        """Return a statement of a module with the names of the file."""
        for name, table in self.tables.items():
            if name.module == source.module and source.defined[name.name] == index:
                return f"{self.refer(source, name)} = {self._expression(source, table)}"
        return _Renamed(self, source).text(index)

    def _expression(self, source: _Source, thing: Any, word: str = "") -> str:
        """Return Python for a text, a class, a function or a `partial` of one, a family, or a table of them."""
        if isinstance(thing, dict):
            return (
                "{"
                + ", ".join(f"{key!r}: {self._expression(source, thing[key], repr(key))}" for key in thing)
                + "}"
            )
        if isinstance(thing, str):
            return repr(thing)
        if isinstance(thing, list):
            return "[" + ", ".join(self._expression(source, each) for each in thing) + "]"
        if isinstance(thing, Family) and not vars(thing):
            return f"{self._expression(source, type(thing))}()"
        if isinstance(thing, partial):
            name, inner = Name("functools", "partial", "partial"), self._expression(source, thing.func, word)
            options = [*map(repr, thing.args), *(f"{key}={value!r}" for key, value in thing.keywords.items())]
            return f"{self.refer(source, name)}({', '.join([inner, *options])})"
        return self.refer(source, self.definition(thing, word or f"the family {thing.name}"))

    def _order(self, module: str, seen: set[str]) -> Iterator[str]:
        """Yield the modules that one needs, each after those that it needs, then itself."""
        seen.add(module)
        for each in sorted(self.needed[module]):
            if each not in seen:
                yield from self._order(each, seen)
        yield module

    def _choose_names(self, order: list[str]) -> dict[Name, str]:
        """Return a name of its own for each import and definition: the one that it has, if nothing else has it."""
        names, taken = dict[Name, str](), {*dir(builtins)}
        taken = taken.union(*(self.source(module).in_blocks for module in order))
        kept = [(self.source(module), self.kept[module]) for module in order]
        defined = [
            Name(of.module, name) for of, kept in kept for name, index in of.defined.items() if index in kept
        ]
        for each in (*sorted(self.imports), *defined):
            name = each.alias or each.name
            if name in taken or (each in self.aliased and name in self.local):
                name = f"{name}_of_{each.module.rpartition('.')[2]}"
            while name in taken:
                name += "_"
            taken.add(name)
            names[each] = name
        return names


def _in_braces(text: str, words: Mapping[str, str]) -> str:
    """Return an f-string with other words for the names in its braces; before Python 3.12 these have no place."""
    depth, parts = 0, re.split(r"(\{\{|\}\}|\{|\})", text)
    for number, part in enumerate(parts):
        if part == "{" or part.startswith("}"):
            depth = max(depth + (1 if part == "{" else -len(part)), 0)
        elif depth:
            for old, new in words.items():
                parts[number] = re.sub(rf"(?<![\w.]){re.escape(old)}\b", new, parts[number])
    return "".join(parts)


class _Renamed(ast.NodeVisitor):
    """Gives the names in a statement of a module those that they have in the file."""

    def __init__(self, merged: _Merged, source: _Source) -> None:
        self.merged, self.source, self.local = merged, source, set[str]()
        self.of_class = set[str]()
        """The names that a class binds, which its methods do not see."""
        self.edits = list[tuple[int, int, str]]()
        self.in_string: dict[str, str] | None = None
        """The names in an f-string that get others."""

    def text(self, index: int) -> str:
        """Return the statement of a number, with the text that documents it."""
        source, node = self.source, self.source.body[index]
        self.visit(node)
        start, _ = source.span(node)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            at = start + len("class " if isinstance(node, ast.ClassDef) else "def ")
            if index not in source.loose:
                name = self.merged.refer(source, Name(source.module, node.name))
                self.edits.append((at, at + len(node.name.encode()), name))
            start = source.starts[min(each.lineno for each in (node, *node.decorator_list)) - 1]
        is_documented = isinstance(node, ast.Assign | ast.AnnAssign) and index + 1 in source.docs
        _, end = source.span(source.body[index + is_documented])
        parts = list[bytes]()
        for first, last, new in sorted(self.edits):
            parts += [source.text[start:first], new.encode()]
            start = last
        return b"".join([*parts, source.text[start:end]]).decode()

    def visit(self, node: ast.AST) -> None:
        is_scope = isinstance(node, INNER_SCOPES) and not isinstance(node, ast.FunctionDef | ast.ClassDef)
        (self._scope if is_scope else super().visit)(node)

    def visit_Name(self, node: ast.Name) -> None:
        found = self._find(node)
        if isinstance(found, ModuleType):
            raise CheckpointError(
                f"{self.source.module} reads the module {node.id} other than by a name in it"
            )
        if found is not None:
            self._rename(node, node.id, found)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        module = self._find(node.value)
        if not isinstance(module, ModuleType):
            self.generic_visit(node)
            return
        found = self.merged.find(self.merged.source(module.__name__), node.attr)
        if isinstance(found, Name):
            self._rename(node, ast.unparse(node), found)

    def _find(self, node: ast.AST) -> Name | ModuleType | None:
        if not isinstance(node, ast.Name) or node.id in self.local | self.of_class:
            return None
        return self.merged.find(self.source, node.id)

    def _rename(self, node: ast.AST, old: str, found: Name) -> None:
        if old != found.name:
            self.merged.aliased.add(found)
        new = self.merged.refer(self.source, found, now=old not in self.source.for_types)
        if new != old and self.in_string is None:
            self.edits.append((*self.source.span(node), new))
        elif new != old and self.in_string is not None:
            self.in_string[old] = new

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        if self.in_string is not None:  # in the format of a value in another one
            self.generic_visit(node)
            return
        words = self.in_string = {}
        self.generic_visit(node)
        self.in_string = None
        if words:
            start, end = self.source.span(node)
            self.edits.append((start, end, _in_braces(self.source.text[start:end].decode(), words)))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if self.merged.is_own(self.source.resolve(node)):
            raise CheckpointError(
                f"{self.source.module} imports {node.module} inside of a block: move that to its top"
            )

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self.of_class = self.of_class, _bound(node)
        self.generic_visit(node)
        self.of_class = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for each in node.decorator_list:
            if _is_dropped(each):
                last = each.end_lineno or each.lineno
                self.edits.append((self.source.starts[each.lineno - 1], self.source.starts[last], ""))
            else:
                self.visit(each)
        self._scope(node)

    def _scope(self, node: ast.AST) -> None:
        outer = self.local, self.of_class
        self.local, self.of_class = self.local | _bound(node), set()
        self.merged.local |= self.local
        for each in ast.iter_child_nodes(node):
            if each not in getattr(node, "decorator_list", ()):
                self.visit(each)
        self.local, self.of_class = outer
