"""How a setting is described, once, beside its field in `config.py`.

From the description come the flag and its help, the YAML key, the refusal of a setting that changes nothing, what a
resumed run may change, what the digest of a cell or of cached targets holds, and the tables of docs/configuration.md.
No torch here, so that `graftvit --help` stays quick.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeGuard, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from ..checkpoints.files import NOT_A_URL, is_url
from ..models.errors import WEIGHT_ARGUMENTS, ConfigError, JsonDict, did_you_mean

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
    if annotation is bool:
        if not isinstance(value, bool):
            raise PydanticCustomError("switch", "Input should be true or false")
        return
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    if any(isinstance(part, bool) for part in (value, *inner)):
        raise PydanticCustomError("switch", "Input should not be true or false")


class Section(BaseModel):
    """A group of settings; an unknown key or a value of the wrong kind is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
    needs: ClassVar[tuple[Need, ...]] = ()
    """Conditions of all settings of the section."""

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
            if isinstance(table, OneOf) and value not in table.names():
                valid = ", ".join(map(repr, table.names()))
                raise PydanticCustomError("one_of", "Input should be one of {valid}", {"valid": valid})
        return value


def is_section(kind: Any) -> TypeGuard[type[Section]]:
    """Return whether an annotation is a class of settings."""
    return isinstance(kind, type) and issubclass(kind, Section)


def section_of_entries(annotation: Any) -> type[Section] | None:
    """Return the section of the entries of a list or mapping, such as `LossEntry`; None for other annotations."""
    kinds = [annotation, *get_args(annotation)]
    inner = [kind for outer in kinds for kind in get_args(outer)]
    return next((kind for kind in inner if is_section(kind)), None)


def explain(error: ValidationError, section: type[BaseModel], prefix: str = "") -> ConfigError:
    """Return pydantic's first finding in a section as one sentence: the dotted key, its value, and what is valid."""
    first = error.errors()[0]
    path, message = first["loc"], first["msg"].removeprefix("Value error, ")
    for name in path[:-1]:
        field = section.model_fields.get(str(name))
        if field is not None:
            kind = field.annotation
            section = kind if is_section(kind) else section_of_entries(kind) or section
    key = ".".join(map(str, [prefix, *path] if prefix else path))
    if first["type"] == "extra_forbidden":
        return ConfigError(f"unknown key {key!r}; {did_you_mean(str(path[-1]), section.model_fields)}")
    return ConfigError(f"{key} is {first['input']!r}: {message}" if key else message)


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
    """Raise ConfigError for a setting that changes nothing in a run."""
    _refuse_unread(_walk_unread(run, run, ""))


def check_section(section: Section, name: str) -> None:
    """Raise ConfigError for a setting that changes nothing because of others of its section, in whatever run."""
    _refuse_unread(_walk_unread(None, section, f"{name}."))


def _refuse_unread(found: Iterable[tuple[str, str, Any]]) -> None:
    for key, why, value in found:
        written = str(value).lower() if value is None or isinstance(value, bool) else repr(value)
        raise ConfigError(f"{key}={written} {why}")


def find_replacements(run: Section, keys: Iterable[str]) -> set[str]:
    """Return the settings that take the place of those in `keys`, whatever value these have."""
    found = {need for key in keys for need in find_rule(type(run), key).needs if need.instead}
    return {need.instead for need in found if not need.met(run)}


def _walk_unread(run: Section | None, section: Section, prefix: str) -> Iterator[tuple[str, str, Any]]:
    """Give key, reason and value of each setting that changes nothing, of entries of lists first.

    Without a run, only the conditions within a section count.
    """
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _walk_unread(run, value, f"{prefix}{name}.")
            continue
        for index, entry in enumerate(value if isinstance(value, list) else ()):
            if isinstance(entry, Section):
                yield from _walk_unread(run, entry, f"{prefix}{name}[{index}].")
        if value in (field.default, *rule_of(field).off):
            continue
        for need in section.needs_of(name):
            subject = run if need.of == "run" else section
            if subject is not None and not need.met(subject):
                yield f"{prefix}{name}", f"{need.finding} {need.why.format(run=subject)}", value
                break
