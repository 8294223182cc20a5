"""Write what a student needs of our sources as one file, `modeling_graftvit.py`, which runs without graftvit.

Definitions are taken whole from the modules that have them, by following names from `modeling_graftvit.py` beside this
file and from what the student's `config.json` names. Two tables are cut to what the student has, of operators and of
families. The file has the modules one after another, each after those that it needs.
"""

from __future__ import annotations

import ast
import builtins
import copy
import json
import linecache
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec, resolve_name
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from timm.models import model_entrypoint, split_model_name_tag

from ..models import layer_plan
from ..models.converted import choices_of
from ..models.copied import ARCHITECTURE as COPIED
from ..models.errors import CheckpointError, Json, JsonDict
from ..models.families import Family, find_family, walk
from .architecture import INNER, build
from .files import read_json
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
DROPPED = ("register_model", "check_types")
"""Decorators that the file leaves out: `ARCHITECTURES` has its models, and its callers' types are theirs to check."""
KNOWN = {*dir(builtins), "__name__", "__package__", "__file__"}


def for_transformers(config: Json) -> JsonDict:
    """Return a config.json by which `transformers.AutoModel` finds its classes in the file beside it."""
    found = {auto: f"modeling_graftvit.GraftViT{kind}" for auto, kind in AUTO_CLASSES.items()}
    return {**config, "model_type": "graftvit", "auto_map": found}


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
    described = [(str(config["architecture"]), config["model_args"])]
    if described[0][0] == COPIED:
        teacher = config["model_args"]["copied"]["teacher"]
        described.append((teacher["architecture"], teacher["model_args"]))
    names = sorted({name for each in described for name in _architectures(*each)})
    models = [build(*each, on_meta=True) for each in described]
    operators = {choice.operator for model in models for choice in choices_of(model)} & {
        *layer_plan.OPERATORS
    }
    created = {word: layer_plan.OPERATORS[word] for word in sorted(operators)}
    built = {name: each for name in names if _package(each := model_entrypoint(name)) != "timm"}
    families = dict.fromkeys(filter(None, map(find_family, models)))
    tables = {
        Name(layer_plan.__name__, "OPERATORS"): partial(_table, created),
        Name(walk.__name__, "FAMILIES"): partial(_list, families),
        Name(ROOT, "ARCHITECTURES"): partial(_table, built),
    }
    own = {
        _package(getattr(each, "func", each)) for each in (modeling_file, *created.values(), *built.values())
    }
    return HEAD.format(version=version("graftvit"), architecture=described[0][0]) + _Merged(own, tables).text(
        ROOT
    )


def _architectures(name: str, arguments: Json) -> Iterator[str]:
    """Yield timm's name of a model, and those of the models that it is made of."""
    name = split_model_name_tag(name)[0]
    yield name
    if name in INNER:
        yield from _architectures(arguments[INNER[name]], arguments)


def _package(thing: Any) -> str:
    return str(thing.__module__).partition(".")[0]


@dataclass(frozen=True, order=True)
class Name:
    """What a name means: a definition in a module of ours or, with an alias, an import of another package."""

    module: str
    name: str
    """Empty where the import is of the module itself."""
    alias: str = ""


Refer: TypeAlias = Callable[[Name], str]
"""Returns what the file calls a name, which it then has."""
Table: TypeAlias = Callable[[Callable[[Any, str], str]], str]


def _table(things: Mapping[str, Any], refer: Callable[[Any, str], str]) -> str:
    return "{" + ", ".join(f"{word!r}: {refer(thing, repr(word))}" for word, thing in things.items()) + "}"


def _list(families: Mapping[Family, None], refer: Callable[[Any, str], str]) -> str:
    """Return the families as an expression. Raises CheckpointError: one is described by an object, as an `Adapter`."""
    for family in families:
        if vars(family):
            raise CheckpointError(
                f"the family {family.name} is described by a {type(family).__name__}: {SUBCLASS}"
            )
    return "[" + ", ".join(f"{refer(type(family), family.name)}()" for family in families) + "]"


SUBCLASS = "only a class of a module can be written to modeling_graftvit.py"


_INNER = (
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
            case (
                ast.FunctionDef(name=str(name))
                | ast.ClassDef(name=str(name))
                | ast.ExceptHandler(name=str(name))
                | ast.MatchAs(name=str(name))
                | ast.MatchStar(name=str(name))
            ):
                found.add(name)
        if not isinstance(each, _INNER):
            found |= _bound(each)
    return found


class _Source:
    """A module of ours: the numbers of its statements by the names that they define, and its imports."""

    def __init__(self, module: str) -> None:
        self.module = module
        try:
            spec = find_spec(module)
        except ValueError:  # of `__main__` in a notebook
            spec = None
        text = "" if spec is None else "".join(linecache.getlines(spec.origin or ""))
        if spec is None or not text:
            raise CheckpointError(
                f"{FILE} needs the source of {module}: put it into a file of its own, and import that"
            )
        self.package = spec.parent or ""
        self.body = ast.parse(text).body
        self.defined, self.imported = dict[str, int](), dict[str, Name]()
        self.for_types, self.in_blocks, self.loose = set[str](), set[str](), set[int]()
        """The names that are imported for types alone, those that other blocks bind, and these blocks."""
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
        elif not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
            self.loose.add(index)
            self.in_blocks |= names

    def resolve(self, statement: ast.ImportFrom) -> str:
        """Return the whole name of the module that a statement imports from."""
        return resolve_name("." * statement.level + (statement.module or ""), self.package)


class _Merged:
    """What some definitions need, found by following names, and then written."""

    def __init__(self, own: set[str], tables: Mapping[Name, Table]) -> None:
        self.own, self.tables = own, tables
        self.sources = dict[str, _Source]()
        self.kept = defaultdict[str, set[int]](set)
        self.needed = defaultdict[str, set[str]](set)
        """The modules by those that need them."""
        self.imports = set[Name]()
        self.waiting = list[Name]()
        self.names: dict[Name, str] | None = None
        """What the file calls each of them, once all are found."""

    def text(self, root: str) -> str:
        """Return the imports, and the definitions that all those of a module need."""
        self.waiting = [Name(root, name) for name in self.source(root).defined]
        while self.waiting:
            self._keep(self.waiting.pop())
        order = list(dict.fromkeys(self._order(root, set())))
        self.names = self._choose_names(order)
        lines = defaultdict[str, list[str]](list)
        for each in sorted(self.imports):
            alias = self.names[each]
            start = f"from {each.module} import " if each.name else ""
            name = each.name or f"import {each.module}"
            lines[start].append(name if alias in (each.name, each.module) else f"{name} as {alias}")
        imports = [*lines.pop("", ()), *(start + ", ".join(names) for start, names in lines.items())]
        parts = ["\n".join(imports)]
        for module in order:
            found = (self._statement(self.source(module), index) for index in sorted(self.kept[module]))
            parts += [f"# {module}", *(ast.unparse(ast.fix_missing_locations(each)) for each in found)]
        return "\n" + "\n\n\n".join(parts) + "\n"

    def source(self, module: str) -> _Source:
        if module not in self.sources:
            self.sources[module] = _Source(module)
        return self.sources[module]

    def is_own(self, module: str) -> bool:
        return module.partition(".")[0] in self.own

    def find(self, source: _Source, name: str) -> Name | ModuleType | None:
        """Return what a name means in a module; None for a builtin, or what a loose statement binds.

        Raises CheckpointError: nothing defines it.
        """
        if name in source.defined:
            return Name(source.module, name)
        target = source.imported.get(name)
        if target is None:
            if name not in KNOWN and name not in source.in_blocks:
                raise CheckpointError(
                    f"{source.module} uses {name}, which no statement of its file defines or imports by name"
                )
            return None
        if not self.is_own(target.module):
            return target
        thing = getattr(import_module(target.module), target.name)
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
            raise CheckpointError(
                f"{word} is {name or 'no class or function'}, which no module defines: {SUBCLASS}"
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
        for index in {source.defined[found.name]} | (source.loose if not kept else set()):
            if index not in kept:
                kept.add(index)
                self._statement(source, index)

    def _statement(self, source: _Source, index: int) -> ast.stmt:
        """Return a statement of a module with the names of the file."""
        statement = copy.deepcopy(source.body[index])
        for name, table in self.tables.items():
            if name.module == source.module and source.defined[name.name] == index:
                text = table(partial(self._expression, source))
                return ast.parse(f"{self.refer(source, name)} = {text}").body[0]
        _Renamed(self, source).visit(statement)
        if isinstance(statement, ast.FunctionDef | ast.ClassDef) and index not in source.loose:
            statement.name = self.refer(source, Name(source.module, statement.name))
        return statement

    def _expression(self, source: _Source, thing: Any, word: str) -> str:
        """Return Python for a class, a function or a `partial` of one."""
        if not isinstance(thing, partial):
            return self.refer(source, self.definition(thing, word))
        inner = self._expression(source, thing.func, word)
        options = [*map(repr, thing.args), *(f"{key}={value!r}" for key, value in thing.keywords.items())]
        return (
            f"{self.refer(source, Name('functools', 'partial', 'partial'))}({', '.join([inner, *options])})"
        )

    def _order(self, module: str, seen: set[str]) -> Iterator[str]:
        """Yield the modules that one needs, each after those that it needs, then itself."""
        seen.add(module)
        for each in sorted(self.needed[module] - seen):
            if each not in seen:
                yield from self._order(each, seen)
        yield module

    def _choose_names(self, order: list[str]) -> dict[Name, str]:
        """Return a name of its own for each import and definition: the one that it has, if nothing else has it."""
        names, taken = (
            dict[Name, str](),
            {*dir(builtins)}.union(*(self.source(each).in_blocks for each in order)),
        )
        defined = (
            Name(module, name)
            for module in order
            for name, index in self.source(module).defined.items()
            if index in self.kept[module]
        )
        for each in (*sorted(self.imports), *defined):
            name = each.alias or each.name
            if name in taken:
                name = f"{name}_of_{each.module.rpartition('.')[2]}"
            while name in taken:
                name += "_"
            taken.add(name)
            names[each] = name
        return names


class _Renamed(ast.NodeTransformer):
    """Gives the names in a statement of a module those that they have in the file."""

    def __init__(self, merged: _Merged, source: _Source) -> None:
        self.merged, self.source, self.local = merged, source, set[str]()
        self.of_class = set[str]()
        """The names that a class binds, which its methods do not see."""

    def visit(self, node: ast.AST) -> Any:
        is_scope = isinstance(node, _INNER) and not isinstance(node, ast.FunctionDef | ast.ClassDef)
        return self._scope(node) if is_scope else super().visit(node)

    def visit_Name(self, node: ast.Name) -> Any:
        if node.id not in self.local | self.of_class:
            found = self.merged.find(self.source, node.id)
            if isinstance(found, ModuleType):
                raise CheckpointError(
                    f"{self.source.module} reads the module {node.id} other than by a name in it"
                )
            if found is not None:
                now = node.id not in self.source.for_types
                node.id = self.merged.refer(self.source, found, now=now)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        if isinstance(node.value, ast.Name) and node.value.id not in self.local | self.of_class:
            module = self.merged.find(self.source, node.value.id)
            if isinstance(module, ModuleType):
                found = self.merged.find(self.merged.source(module.__name__), node.attr)
                if isinstance(found, Name):
                    return ast.Name(self.merged.refer(self.source, found), ast.Load())
        return self.generic_visit(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> Any:
        if self.merged.is_own(self.source.resolve(node)):
            raise CheckpointError(
                f"{self.source.module} imports {node.module} inside of a block: move that to its top"
            )
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        outer = self.of_class
        self.of_class = _bound(node)
        self.generic_visit(node)
        self.of_class = outer
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        decorators = [
            each for each in node.decorator_list if ast.unparse(each).partition("(")[0] not in DROPPED
        ]
        decorators = [self.visit(each) for each in decorators]
        node.decorator_list = []
        self._scope(node)
        node.decorator_list = decorators
        return node

    def _scope(self, node: Any) -> Any:
        outer = self.local, self.of_class
        self.local, self.of_class = self.local | _bound(node), set()
        self.generic_visit(node)
        self.local, self.of_class = outer
        return node
