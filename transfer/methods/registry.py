"""The transfer methods by name; a method of this package is imported when a run asks for it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ...models.errors import ConfigError, did_you_mean
from .method_facts import METHODS, MethodFacts

if TYPE_CHECKING:
    from .method import TransferMethod

_registered: dict[str, TransferMethod] = {}


def find_method(name: str) -> TransferMethod:
    """Return the method of a name. Raises ConfigError for an unknown name."""
    if name in _registered:
        return _registered[name]
    if name not in METHODS:
        raise ConfigError(f"transfer.method={name!r}; {did_you_mean(name, METHODS)}")
    methods: tuple[TransferMethod, ...] = import_module(f".{METHODS[name].module}", __package__).METHODS
    return next(method for method in methods if method.name == name)


def register_method(method: TransferMethod) -> None:
    """Make a method known under its name, for `transfer.method` and `DualViT`.

    Raises ConfigError: there is one of this name.
    """
    if method.name in METHODS:
        raise ConfigError(f"there is a transfer method {method.name!r} already: choose another name")
    METHODS[method.name] = MethodFacts(reads=method.reads, copies=method.copies)
    _registered[method.name] = method
