"""The errors for a user's mistake, and for a loader process that died: one sentence with what to do."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

from typing_extensions import Unpack

LONGEST = 2_000
"""Maximum length of a sentence in characters."""
LONGEST_WORD = 300
"""Maximum length of a name or path in it."""
ENDS = 120
"""Characters shown at each end of a longer name."""


def escaped(text: str) -> str:
    """Escape the characters of `text` that could control a terminal; keep newlines and tabs."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode()
        for char in text
    )


def one_sentence(text: str, longest: int = LONGEST) -> str:
    """Make `text` safe to show: join its lines, escape control characters, cut the middle if it is too long."""
    lines = (line.strip() for line in text.replace("\t", " ").splitlines())
    words = " ".join(_shortened(escaped(word)) for word in " ".join(filter(None, lines)).split(" "))
    if len(words) <= longest:
        return words
    left_out = f" ... ({len(words):,} characters) ... "
    half = (longest - len(left_out)) // 2
    return words[:half].rstrip() + left_out + words[-half:].lstrip()


def _shortened(word: str) -> str:
    if len(word) <= LONGEST_WORD:
        return word
    return f"{word[:ENDS]}...({len(word):,} characters)...{word[-ENDS:]}"


class GraftError(Exception):
    """A mistake that the user can correct. The command line prints it in one line and exits with `exit_code`."""

    exit_code = 2

    def __str__(self) -> str:
        return one_sentence(super().__str__())


class UnsupportedModelError(GraftError):
    """A model, block or attention layer that is not supported."""


class CheckpointError(GraftError):
    """A file that cannot be read, is damaged, is unsafe, or does not fit the model."""


class TransferError(GraftError):
    """A teacher, a student and a transfer method that cannot be combined."""


class ConfigError(GraftError):
    """An invalid configuration key or value."""


class DataError(GraftError):
    """A data set that cannot be found or read."""


class LostLoaderError(DataError):
    """A process that loads data has died, as where memory runs out."""


def install_command(extra: str) -> str:
    """Return the command that installs the packages of an extra, wherever graftvit itself was installed from."""
    from importlib.metadata import requires  # here: it takes half of the time in which a command begins

    needed = [line.split(";") for line in requires("graftvit") or ()]
    return " ".join(
        ["pip install", *(f"'{line[0]}'" for line in needed if line[1:] == [f' extra == "{extra}"'])]
    )


class RunFailedError(GraftError):
    """A run that could not continue (non-finite loss, full disk). States saved before are intact."""

    exit_code = 1


def kind_of(value: object) -> str:
    """Return the type of a value with its article: `a list`, `an ndarray`."""
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' or name == 'ndarray' else 'a'} {name}"


def counted(count: int, thing: str) -> str:
    """Return a count with its noun: `1 batch`, `2 batches`."""
    return (
        f"{count} {thing}"
        if count == 1
        else f"{count} {thing}{'es' if thing.endswith(('s', 'tch')) else 's'}"
    )


def gibibytes(size: float) -> str:
    """Return a size in GiB, in MiB where it is small."""
    if size < 2**28:
        return f"{math.ceil(size / 2**20 * 10) / 10:.1f} MiB"
    return f"{size / 2**30:.2f} GiB"


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return a hint for an unknown `name`: the nearest valid name, then all valid names."""
    names = sorted(valid)
    nearest = difflib.get_close_matches(name, names, n=len(names) or 1, cutoff=0.6)
    best = max(nearest, key=lambda each: _likeness(each, name), default=None)
    hint = "" if best is None else f"did you mean {best!r}? "
    return f"{hint}valid: {', '.join(names)}"


def _likeness(one: str, other: str) -> tuple[float, int]:
    """Return the similarity of two names; of equally similar ones, a longer common beginning is nearer."""
    ratio = difflib.SequenceMatcher(None, one, other).ratio()
    return ratio, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


# Types of JSON, YAML and keyword arguments: values by name. The code that reads them checks their types.

Json: TypeAlias = Mapping[str, Any]
"""A mapping that is only read."""
JsonDict: TypeAlias = dict[str, Any]
"""A mapping that is created or changed."""
WEIGHT_ARGUMENTS = frozenset(
    {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
)
"""Arguments of timm's constructors that name weights to load, which neither a recipe nor a saved model may give."""


# The arguments of public functions, which a user's Python may give any type.

POSITIONAL_OR_KEYWORD, KEYWORD_ONLY = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
VAR_KEYWORD = inspect.Parameter.VAR_KEYWORD
P = ParamSpec("P")
R = TypeVar("R")


def check_types(*but: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function: it raises ConfigError for an argument, except those in `but`, that is not of its type.

    So it does for an argument that it does not take, or that is missing; the names that `**name: Unpack[...]` takes are
    those of its TypedDict.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        hints = functools.cache(lambda: get_type_hints(function))  # later: a type may be defined below

        @functools.wraps(function)
        def checked(*arguments: P.args, **keywords: P.kwargs) -> R:
            kinds = hints()
            rest = [name for name, kind in kinds.items() if get_origin(kind) is Unpack and name not in but]
            more = {key for name in rest for key in get_args(kinds[name])[0].__annotations__}
            for name, value in _bind(function.__qualname__, signature, more, *arguments, **keywords).items():
                if name in kinds and name not in but and not _is_of(value, kinds[name]):
                    shown = repr(value) if len(repr(value)) < ENDS else kind_of(value)
                    raise ConfigError(f"{name}={shown}; {_describe_kind(value, kinds[name])}")
            return function(*arguments, **keywords)

        return checked

    return decorate


def _bind(
    function: str, signature: inspect.Signature, more: Collection[str], /, *arguments: Any, **keywords: Any
) -> dict[str, Any]:
    """Return the arguments of a call by name. Raises ConfigError: one is unknown or missing.

    `more` are the names that its `**` takes; without any, it takes every name.
    """
    function = function.removesuffix(".__init__")
    kinds = {name: each.kind for name, each in signature.parameters.items() if name != "self"}
    known = {name for name, kind in kinds.items() if kind in (POSITIONAL_OR_KEYWORD, KEYWORD_ONLY)} | {*more}
    unknown = next((name for name in keywords if name not in known), None)
    if unknown is not None and (more or VAR_KEYWORD not in kinds.values()):
        raise ConfigError(f"{function}() takes no {unknown!r}; {did_you_mean(unknown, known)}")
    try:
        return signature.bind(*arguments, **keywords).arguments
    except TypeError as error:
        raise ConfigError(f"{function}(): {error}") from error


def _is_of(value: object, kind: Any) -> bool:
    """Return whether a value is of an annotation; what is in a mapping, and a protocol, are not looked at."""
    plain, inner = get_origin(kind) or kind, get_args(kind)
    if plain is Literal:
        return any(isinstance(value, type(each)) and value == each for each in inner)
    if plain in (Union, UnionType):
        return any(_is_of(value, each) for each in inner)
    if plain is tuple and Ellipsis not in inner:
        return isinstance(value, list | tuple) and len(value) == len(inner) and all(map(_is_of, value, inner))
    if plain is Any or not isinstance(plain, type) or getattr(plain, "_is_protocol", False):
        return True
    is_text = isinstance(value, str | bytes) or hasattr(value, "dtype")  # or an array
    if isinstance(value, bool) or (is_text and plain in (Collection, Sequence)):
        return plain is bool
    if isinstance(value, list | tuple) and plain in (Collection, Sequence, list, tuple):
        return all(_is_of(each, inner[0]) for each in value if inner)
    kind = Integral if plain is int else Real if plain is float else plain
    return isinstance(value, kind)


def _choices(kind: Any) -> tuple[str, ...]:
    """Return the choices of an annotation, or of what is in its collection or union."""
    inner = get_args(kind)
    return inner if get_origin(kind) is Literal else tuple(name for each in inner for name in _choices(each))


def _describe_kind(value: object, kind: Any) -> str:
    """Return what an argument takes: the nearest of its choices, or its types."""
    choices = _choices(kind)
    if isinstance(value, str) and value in choices:
        return f"give a list, as in {[value]!r}"
    if choices:
        several = value if isinstance(value, list | tuple) else [value]
        return did_you_mean(str(next((each for each in several if str(each) not in choices), value)), choices)
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    words = [
        "None" if each is NoneType else re.sub(r"<class '|'>|(?!torch\.)\b\w+\.", "", str(each))
        for each in kinds
    ]
    return f"give {' or '.join(words)}"


# What is said where a process that loads data dies.

LOST_PROCESS = (ConnectionError, EOFError, FileNotFoundError)
"""What the exchange of tensors fails with when the process that holds them is gone."""


@contextmanager
def loader_deaths() -> Iterator[None]:
    """Turn what torch raises for a dead loader process into LostLoaderError.

    The handler of a signal raises it, so that it comes out of whatever this process is doing.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise lost(error) from error


def lost(error: Exception) -> LostLoaderError:
    """Return the error for a loader process that has died, of which `error` tells."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return LostLoaderError(
        f"a loader process died ({reason}); it may have run out of memory: try a smaller data.workers"
    )
