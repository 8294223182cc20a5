"""How a setting is described, once, beside its field in `config.py`.

From the description come the flag and its help, the YAML key, the refusal of a setting that changes nothing, what a
resumed run may change, what the digest of a cell or of cached targets holds, and the tables of docs/configuration.md.
No torch here, so that `graftvit --help` stays quick.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
import re
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeGuard, TypeVar, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from ..checkpoints.files import NOT_A_URL, is_url
from ..models.errors import WEIGHT_ARGUMENTS, ConfigError, JsonDict, did_you_mean, kind_of
from ..models.plain_yaml import YamlError, parse_yaml
from ..models.plugins import load_plugins

if TYPE_CHECKING:
    from pydantic import GetJsonSchemaHandler
    from pydantic._internal._model_construction import ModelMetaclass
    from pydantic.json_schema import JsonSchemaValue
    from pydantic_core import CoreSchema
else:
    ModelMetaclass = type(BaseModel)
T = TypeVar("T")


# The description of a setting.


@dataclass(frozen=True)
class Need:
    """A condition without which settings change nothing."""

    met: Callable[[Any], bool]
    """Predicate over the run, or over the section that holds the setting."""
    why: str
    """End of the sentence `optim.blr=0.1 changes nothing …`: the reason, and what to do; `{run.mode}` is filled in."""
    of: Literal["run", "section"] = "run"
    """Argument of `met`, which the reason calls `run`."""
    instead: str = ""
    """Setting that takes the place of this one. A typed value of one replaces an inherited value of the other."""
    finding: str = "changes nothing"
    """What is wrong with the setting, before the reason."""


def in_mode(mode: str) -> Need:
    """Return the condition of settings that one mode reads."""
    return Need(lambda run: run.mode == mode, f"with mode={{run.mode}}: leave it out, or set mode={mode}")


@dataclass(frozen=True)
class Rule:
    """What is known of a setting beside its type, its default and its help."""

    needs: tuple[Need, ...] = ()
    """Conditions under which it has an effect, the first reason to name first; none for an effect in every run."""
    off: tuple[Any, ...] = ()
    """Values that are accepted without an effect, because they say what is true of the run."""
    outside: bool = False
    """Independence of all numbers: where a run or its images are, what it records, when it saves."""
    resume: Literal["held", "free"] = "held"
    """Permission for a resumed run to change it; always given to a setting that is `outside`."""
    drawn: bool = False
    """Membership in the identity of cached targets of augmented images."""
    also: tuple[str, ...] = ()
    """Further names of its flag, which users of MAE, timm and the attention transfer code know."""
    see: str = ""
    """Markdown link to the page that explains it, for docs/configuration.md."""


def setting(
    default: Any,
    help: str,  # noqa: A002 - the word of argparse
    *needs: Need,
    off: tuple[Any, ...] = (),
    outside: bool = False,
    resume: Literal["held", "free"] = "held",
    drawn: bool = False,
    also: tuple[str, ...] = (),
    see: str = "",
    **limits: Any,
) -> Any:
    """Describe a field of a section: its default, its help as a noun phrase, its `Rule`, and the limits of a number."""
    field: FieldInfo = Field(default, description=help, **limits)
    field.metadata.append(Rule(needs, off, outside, resume, drawn, also, see))
    return field


def rule_of(field: FieldInfo) -> Rule:
    """Return the rule of a field; a field without one has an effect in every run, and is held."""
    return next((each for each in field.metadata if isinstance(each, Rule)), Rule())


# The base class of sections, and checks of values.


@dataclass(frozen=True)
class OneOf:
    """Mark of a setting whose valid values are names in a registry, which other packages can extend."""

    names: Callable[[], Iterable[str]]

    def __get_pydantic_json_schema__(
        self, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Return the schema of any text, of which an editor completes the names."""
        return {"anyOf": [{"enum": [*self.names()]}, handler(core)]}


MAX_WHOLE = 2**63
"""Bound of whole numbers, below what torch and the file formats hold."""


def check_plain(value: Any, depth: int = 50) -> None:
    """Raise ValueError for non-finite numbers, text with a NUL, and too deep nesting."""
    if depth == 0:
        raise ValueError("it nests too many levels")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("numbers must be finite")
    if isinstance(value, int) and abs(value) >= MAX_WHOLE:
        raise ValueError("whole numbers must be below 2^63")
    if isinstance(value, str | Path) and "\0" in str(value):
        raise ValueError("text and paths must not contain a NUL character")
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set):
        for part in value:
            check_plain(part, depth - 1)


def check_switch(value: Any, annotation: Any) -> None:
    """Raise an error of pydantic for a switch that is not true or false, and for another setting that is or holds one.

    Python takes true for 1, and pydantic takes 1 for true.
    """
    kinds = (annotation, *get_args(annotation))
    if bool in kinds:
        if not isinstance(value, bool) and value not in [name for kind in kinds for name in _choices(kind)]:
            raise PydanticCustomError("switch", "Input should be true or false")
        return
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    if any(isinstance(part, bool) for part in (value, *inner)):
        raise PydanticCustomError("switch", "Input should not be true or false")


S = TypeVar("S", bound="Section")


LONGEST_VALUE = 200
"""Characters of a value in a refusal; of a longer one its type is shown."""


class SectionType(ModelMetaclass):
    """Makes sections from keywords."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Raise ConfigError for values that are not valid."""
        try:
            return super().__call__(*arguments, **keywords)
        except ValidationError as error:
            kind: Any = self
            raise explain(error, kind) from error


class Section(BaseModel, metaclass=SectionType):
    """A group of settings; an unknown key or a value of the wrong kind is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
    needs: ClassVar[tuple[Need, ...]] = ()
    """Conditions of all settings of the section."""

    @classmethod
    def __pydantic_init_subclass__(cls, **more: Any) -> None:
        """Let `help` describe each setting, which its field does for the command line and the docs."""
        super().__pydantic_init_subclass__(**more)
        lines = (f"    {name}: {_help_of(field)}" for name, field in cls.model_fields.items())
        cls.__doc__ = "\n".join([f"{inspect.getdoc(cls)}\n\nArgs:", *lines])
        plain = {
            name: ... if is_section(field.annotation) else field.default
            for name, field in cls.model_fields.items()
        }
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [inspect.Parameter(name, keyword, default=value) for name, value in plain.items()]
        cls.__signature__ = inspect.Signature(parameters)

    def __setattr__(self, name: str, value: Any) -> None:
        """Raise ConfigError: settings are frozen."""
        raise ConfigError(f"settings are frozen: make others by model_copy(update={{{name!r}: ...}})")

    @classmethod
    def needs_of(cls, name: str) -> tuple[Need, ...]:
        """Return the conditions under which a setting has an effect."""
        return (*cls.needs, *rule_of(cls.model_fields[name]).needs)

    @field_validator("*", mode="before")
    @classmethod
    def _check_plain(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        if not is_section(kind):  # the fields of a section are checked separately
            check_plain(value)
            if kind != JsonDict:
                check_switch(value, kind)
        return value

    @field_validator("*")
    @classmethod
    def _check_name(cls, value: Any, info: ValidationInfo) -> Any:
        for table in cls.model_fields[str(info.field_name)].metadata:
            if not isinstance(table, OneOf) or value in table.names():
                continue
            load_plugins()
            if value not in table.names():
                valid = ", ".join(map(repr, table.names()))
                raise PydanticCustomError("one_of", "Input should be one of {valid}", {"valid": valid})
        return value


def _help_of(field: FieldInfo) -> str:
    kind = field.annotation
    if is_section(kind):
        return f"a dictionary of {', '.join(kind.model_fields)}"
    return f"{field.description or 'as its name says'} (default: {field.default!r})"


def is_section(kind: Any) -> TypeGuard[type[Section]]:
    """Return whether an annotation is a class of settings."""
    return isinstance(kind, type) and issubclass(kind, Section)


def section_of_entries(annotation: Any) -> type[Section] | None:
    """Return the section of the entries of a list or mapping, such as `LossEntry`; None for other annotations."""
    kinds = [annotation, *get_args(annotation)]
    inner = [kind for outer in kinds for kind in get_args(outer)]
    return next((kind for kind in inner if is_section(kind)), None)


# A setting with its valid values in words.


@dataclass(frozen=True)
class Leaf:
    """One setting: its dotted `key` (`optim.blr`) and the field that declares it."""

    key: str
    field: FieldInfo

    @property
    def section(self) -> str:
        """`optim` of `optim.blr`; empty for the keys of the run itself."""
        return self.key.rpartition(".")[0]

    @property
    def name(self) -> str:
        """`blr` of `optim.blr`."""
        return self.key.rpartition(".")[2]

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types of the annotation; several for a union."""
        annotation = self.field.annotation
        for table in self.field.metadata:
            if isinstance(table, OneOf):
                return (Literal[tuple(table.names())],)
        return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)

    @property
    def is_switch(self) -> bool:
        """Whether the flag needs no value (`--fsdp`, `--no-fsdp`)."""
        return bool in self.kinds

    @property
    def is_mapping(self) -> bool:
        """Whether keys below this one may be set (`student.model_args.depth=6`)."""
        return any(get_origin(kind) is dict for kind in self.kinds)

    def valid(self) -> str:
        """Return what the setting accepts, in words."""
        words = " or ".join(_words(kind) for kind in self.kinds if kind is not type(None))
        return words + _bounds(self.field) + (" or none" if type(None) in self.kinds else "")

    @property
    def names(self) -> list[str]:
        """The names that the setting accepts, alone or in a list."""
        kinds = [inner for kind in self.kinds for inner in (kind, *get_args(kind))]
        return [name for kind in kinds for name in _choices(kind) if isinstance(name, str)]

    def nearest(self, value: Any) -> str | None:
        """Return the name, of those that the setting accepts, that `value` may have meant."""
        wrong = [str(one) for one in (value if isinstance(value, list) else [value]) if one not in self.names]
        return next((near for one in wrong for near in difflib.get_close_matches(one, self.names, n=1)), None)

    def refusal(self, name: str, value: Any) -> str:
        """Return what is wrong with a value, and what the setting accepts, as one sentence; `name` is the user's."""
        near = self.nearest(value)
        hint = f", did you mean {near!r}? It" if near else ", but"
        meaning = f" ({self.field.description})" if self.field.description else ""
        shown = repr(value) if len(repr(value)) < LONGEST_VALUE else kind_of(value)
        listed = isinstance(value, str) and "[" not in value and isinstance(self.parse(value), list)
        form = f": write [{value}]" if listed and section_of_entries(self.field.annotation) is None else ""
        return f"{name} is {shown}{hint} must be {self.valid()}{meaning}{form}"

    def parse(self, text: str) -> Any:
        """Parse a user's `text`. Text that cannot be parsed is returned unchanged, and validation refuses it."""
        if text.lower() in ("none", "null") and type(None) in self.kinds:
            return None
        many = [kind for kind in self.kinds if get_origin(kind) in (list, tuple)]
        bracketed = text.startswith("[")
        names = any(kind in (str, Path) or _choices(kind) for kind in self.kinds)
        if names and not self.is_switch and not (many and bracketed):
            return text
        if many and not bracketed and ("," in text or len(many) == len(self.kinds)):
            text = "[]" if text.lower() in ("", "none") else f"[{text}]"
        try:
            return parse_yaml(text)
        except YamlError:
            return text


def _choices(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) is Literal else ()


def _words(kind: Any, plural: bool = False) -> str:
    """Describe a type: `a whole number`, `one of ce, kl`, `2 numbers`."""
    if choices := _choices(kind):
        return ("any of " if plural else "one of " if len(choices) > 1 else "") + ", ".join(
            repr(c) if c == "" else str(c) for c in choices
        )
    names = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}
    if kind in names:
        word = names[kind]
        return f"{word}s" if plural else word if kind in (bool, str) else f"a {word}"
    if is_section(kind):
        return f"mappings with any of the keys {', '.join(kind.model_fields)}"
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is dict and arguments[1:] and is_section(arguments[1]):
        return f"a mapping of names to {_words(arguments[1])}"
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"{len(arguments)} {_words(arguments[0], plural=True)}"
    if origin in (list, tuple):
        inner = _words(arguments[0], plural=True)
        return f"a list of {inner.removeprefix('any of ')}"
    if origin is dict and arguments[1:] == (PositiveFloat,):
        return "a mapping of texts to numbers above 0, such as {head: 0.1}"
    return "a mapping such as {depth: 6}"


def _bounds(field: FieldInfo) -> str:
    """Describe the limits of a number: ` of at least 0 and below 1`."""
    limits = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
    found = [
        f"{word} {getattr(limit, name)}"
        for limit in field.metadata
        for name, word in limits.items()
        if hasattr(limit, name)
    ]
    return f" {' and '.join(found)}" if found else ""


def explain(error: ValidationError, section: type[BaseModel], prefix: str = "") -> ConfigError:
    """Return pydantic's first finding in a section as one sentence: the dotted key, its value, and what is valid."""
    first = error.errors()[0]
    path, message = first["loc"], first["msg"].removeprefix("Value error, ")
    field: FieldInfo | None = None
    known: list[str] = []
    entry = False  # the next name is that of an entry
    for name in map(str, path):
        inner = section if field is None else _section_of(field)
        if not entry and (inner is None or name not in inner.model_fields):
            break
        if entry or inner is None:
            entry = False
        else:
            section, field = inner, inner.model_fields[name]
            entry = not is_section(field.annotation) and _section_of(field) is not None
        known.append(name)
    key = ".".join([prefix, *known] if prefix else known)
    if first["type"] == "extra_forbidden":
        inner = section if field is None else _section_of(field) or section
        unknown = ".".join(filter(None, [key, str(path[-1])]))
        return ConfigError(f"unknown key {unknown!r}; {did_you_mean(str(path[-1]), inner.model_fields)}")
    if field is None or first["type"] == "value_error":
        return ConfigError(f"{key} is {first['input']!r}: {message}" if key else message)
    if first["type"] == "missing":
        return ConfigError(f"{key} is missing: {field.description}")
    return ConfigError(Leaf(key, field).refusal(key, first["input"]))


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the section that a setting is, or that its entries are."""
    kind = field.annotation
    return kind if is_section(kind) else section_of_entries(kind)


def check_local(path: T) -> T:
    """Raise ValueError for a URL where a path on this machine is meant."""
    if isinstance(path, str | Path) and is_url(path):
        raise ValueError(NOT_A_URL)
    return path


LOCAL = AfterValidator(check_local)
"""Mark of a setting that is a path on this machine."""


def check_size(size: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
    """Raise ValueError for an image size without pixels."""
    if size is not None and min((size,) if isinstance(size, int) else size) <= 0:
        raise ValueError("an image size is a whole number above 0, or two: height, width")
    return size


def check_size_text(size: Any) -> Any:
    """Raise ValueError for an image size such as 72x104, and say how it is written."""
    found = re.fullmatch(r"(\d+) *[x×,] *(\d+)", size) if isinstance(size, str) else None
    if found is not None:
        raise ValueError(f"write height and width as [{found[1]}, {found[2]}]")
    return size


def check_arguments(arguments: JsonDict) -> JsonDict:
    """Raise ValueError for a value that is no JSON, for a name such as `depth:6`, which YAML reads as a name, and for
    weights, which teacher.source and student.init name."""
    for name, value in arguments.items():
        if not name.isidentifier():
            raise ValueError(
                f"{name!r} is not the name of an argument; write '{{depth: 6}}', with a space after the colon"
            )
        if name in WEIGHT_ARGUMENTS:
            raise ValueError(
                f"{name} names weights: leave it out, and give them as teacher.source or student.init"
            )
        try:
            json.dumps(value)
        except TypeError as error:
            raise ValueError(
                f"{name}={value!r} cannot be written to config.yaml: give its name as text"
            ) from error
    return arguments


# What follows from the descriptions, for a whole run.


def fields_of(section: type[Section], prefix: str = "") -> dict[str, FieldInfo]:
    """Return the fields of all settings of a section and of those within it, by dotted key such as `optim.blr`."""
    found: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        if is_section(field.annotation):
            found |= fields_of(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def find_rule(section: type[Section], key: str) -> Rule:
    """Return the rule of a dotted key, also of one in an entry: `teachers.large.dtype`, `transfer.losses[0].weight`."""
    name, _, rest = key.partition(".")
    field = section.model_fields.get(name.partition("[")[0])
    if field is None:
        return Rule()
    entries = section_of_entries(field.annotation)
    if entries is not None and "[" not in name:
        rest = rest.partition(".")[2]  # after the name of an entry of a mapping
    inner = field.annotation if is_section(field.annotation) else entries
    return rule_of(field) if inner is None or not rest else find_rule(inner, rest)


def is_free(section: type[Section], key: str) -> bool:
    """Return whether a resumed run may change a setting."""
    rule = find_rule(section, key)
    return rule.outside or rule.resume == "free"


def value_of(run: Section, key: str) -> Any:
    """Return the value of a dotted key."""
    value: Any = run
    for name in key.split("."):
        value = getattr(value, name)
    return value


def without(run: T, keys: Iterable[str]) -> T:
    """Return the run with these settings at their defaults."""
    for key in keys:
        run = _with_default(run, key)
    return run


def _with_default(section: Any, key: str) -> Any:
    name, _, rest = key.partition(".")
    default = type(section).model_fields[name].default
    value = _with_default(getattr(section, name), rest) if rest else default
    return section.model_copy(update={name: value})


def dump_decisive(run: Section, but: Collection[str] = (), *, exclude_defaults: bool = False) -> JsonDict:
    """Return the settings that the numbers of a run depend on, as JSON, without those in `but` (dotted keys)."""
    settings: JsonDict = run.model_dump(mode="json", exclude_defaults=exclude_defaults)
    outside = {key for key, field in fields_of(type(run)).items() if rule_of(field).outside}
    for key in outside | set(but):
        section, _, name = key.rpartition(".")
        (settings.get(section, {}) if section else settings).pop(name, None)
    return {key: value for key, value in settings.items() if value != {}}


def find_unread(run: Section) -> dict[str, str]:
    """Return the settings of a run that differ from their default and change nothing, each with the reason.

    An entry of a list, such as one of `transfer.losses`, counts with the list.
    """
    return {key: why for key, why, _ in _walk_unread(run, run, "") if "[" not in key}


def check_effect(run: Section) -> None:
    """Raise ConfigError for a setting that somebody gave and that changes nothing in a run.

    What is not in `model_fields_set` is not given: a default, or what a run folder has (`as_inherited`).
    """
    _refuse_unread(_walk_unread(run, run, "", given=True))


def as_inherited(run: S, keys: Iterable[str]) -> S:
    """Return the run with these settings as it has them, of which none counts as given.

    A run folder holds all values, also of what was a default when it was written and changes nothing.
    """
    for key in keys:
        name, _, rest = key.partition(".")
        value = getattr(run, name)
        if rest:
            value = as_inherited(value, [rest])
        elif isinstance(value, list):
            value = [as_inherited(each, vars(each)) if isinstance(each, Section) else each for each in value]
        run = run.model_copy(update={name: value})
        run.model_fields_set.discard(name)
    return run


def check_section(section: Section, name: str) -> None:
    """Raise ConfigError for a setting that changes nothing because of others of its section, in whatever run."""
    _refuse_unread(_walk_unread(None, section, f"{name}.", given=True))


def _refuse_unread(found: Iterable[tuple[str, str, Any]]) -> None:
    for key, why, value in found:
        written = str(value).lower() if value is None or isinstance(value, bool) else repr(value)
        raise ConfigError(f"{key}={written} {why}")


def find_replacements(run: Section, keys: Iterable[str]) -> set[str]:
    """Return the settings that take the place of those in `keys`, whatever value these have."""
    found = {need for key in keys for need in find_rule(type(run), key).needs if need.instead}
    return {need.instead for need in found if not need.met(run)}


def _walk_unread(
    run: Section | None, section: Section, prefix: str, *, given: bool = False
) -> Iterator[tuple[str, str, Any]]:
    """Give key, reason and value of each setting that changes nothing, of entries of lists first.

    Without a run, only the conditions within a section count; with `given`, only the settings that somebody gave.
    """
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _walk_unread(run, value, f"{prefix}{name}.", given=given)
            continue
        for index, entry in enumerate(value if isinstance(value, list) else ()):
            if isinstance(entry, Section):
                yield from _walk_unread(run, entry, f"{prefix}{name}[{index}].", given=given)
        if value in (field.default, *rule_of(field).off) or (given and name not in section.model_fields_set):
            continue
        for need in section.needs_of(name):
            subject = run if need.of == "run" else section
            if subject is not None and not need.met(subject):
                yield f"{prefix}{name}", f"{need.finding} {need.why.format(run=subject)}", value
                break
