"""The transfer methods by name, and their rows of a model card; a method is imported when a run asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from ...checkpoints.card import Rows, number
from ...checkpoints.markdown import code
from ...models.errors import ConfigError, Json, check_types, did_you_mean
from ...models.plan_syntax import NAME
from ...models.plugins import load_plugins
from .method import TransferMethod
from .method_facts import METHODS, MethodFacts, method_names

_registered: dict[str, TransferMethod] = {}


def find_method(name: str) -> TransferMethod:
    """Return the method of a name. Raises ConfigError for an unknown name."""
    if name not in METHODS:
        load_plugins()
    if name in _registered:
        return _registered[name]
    if name not in METHODS:
        raise ConfigError(f"transfer.method={name!r}; {did_you_mean(name, METHODS)}")
    methods: tuple[TransferMethod, ...] = import_module(f".{METHODS[name].module}", __package__).METHODS
    return next(method for method in methods if method.name == name)


@check_types()
def register_method(method: TransferMethod) -> None:
    """Make a method known under its name, for `transfer.method` and `DualViT`.

    Args:
        method: an instance of the method, with its name.

    Raises:
        ConfigError: there is one of this name, or it has no name that is a word.
    """
    if not isinstance(name := getattr(method, "name", None), str) or not NAME.fullmatch(name):
        raise ConfigError(
            f"the name of {type(method).__name__} is {name!r}: give a word of a-z, 0-9 and _, as in my_method"
        )
    if method.name in METHODS:
        raise ConfigError(f"there is a transfer method {method.name!r} already: choose another name")
    METHODS[method.name] = MethodFacts(reads=method.reads, copies=method.copies)
    _registered[method.name] = method


# The section `transfer` of a recipe, in the words of a model card.


def describe_transfer(settings: Json) -> Rows:
    """Describe method, layers, heads and weight of each loss; the name alone of a method that is not registered."""
    losses = settings.get("losses")
    entries = [entry for entry in losses if isinstance(entry, Mapping)] if isinstance(losses, list) else []
    if not entries:
        return _describe_loss(settings)
    rows: Rows = []
    for number_of_loss, entry in enumerate(entries, start=1):
        found = [*_describe_loss(entry)]
        if entry.get("teacher"):
            found.insert(1, ("from", code(entry["teacher"])))
        rows += [(f"loss {number_of_loss}: {name}", text) for name, text in found]
    return rows


def _describe_loss(settings: Json) -> Rows:
    name = str(settings.get("method", ""))
    if name not in method_names():
        return [("method", f"{code(name)}: not described here")]
    method = find_method(name)
    rows = [("method", f"{code(name)}: {method.describe(settings)}")]
    if method.uses_layers and "layers" in settings:
        rows.append(("layers", _layers(settings["layers"])))
    if method.uses_heads and "heads" in settings:
        rows.append(("heads", _heads(settings["heads"])))
    if not method.copies and "weight" in settings:
        over = {"sum": ", summed over layers", "mean": ", averaged over layers"}
        rest = over.get(str(settings.get("reduction")), "") if method.uses_layers else ""
        rows.append(("weight of its loss", f"{number(settings['weight'])}{rest}"))
    if settings.get("temperature", 1.0) != 1.0:
        rows.append(("temperature", number(settings["temperature"])))
    return rows


def _layers(layers: object) -> str:
    kind, _, count = str(layers).partition(":")
    if layers == "all":
        return "all"
    if kind in ("first", "last") and count.isdigit():
        return f"the {kind} {count}"
    if kind == "every" and count.isdigit():
        return f"one in {count}, and the last"
    return _pairs(layers)


def _heads(heads: object) -> str:
    if heads == "mean":
        return "the means of groups of the teacher's heads"
    if heads == "match":
        return "all, each paired with a teacher's head by the least distance between maps"
    return "all" if heads == "all" else _pairs(heads)


def _pairs(chosen: object) -> str:
    """0,3,5, or teacher > student pairs, counted from 0."""
    items = chosen if isinstance(chosen, (list, tuple)) else [chosen]
    text = ", ".join(
        ">".join(map(str, item)) if isinstance(item, (list, tuple)) else str(item) for item in items
    )
    return code(text) + (" (teacher > student)" if ">" in text else "")
