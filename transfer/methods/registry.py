"""The table of transfer methods: where each is, and how a package outside adds its own.

No torch here, so that the command line knows the names at once; a method is imported when a run asks for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ...models.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from .method import TransferMethod

_MODULES = {
    "copy": "copy_attention",
    "copy_q": "copy_attention",
    "copy_k": "copy_attention",
    "copy_v": "copy_attention",
    "distill": "distill",
    "distill_q": "distill",
    "distill_k": "distill",
    "distill_v": "distill",
    "attention_output": "attention_output",
    "block_output": "block_output",
    "feature": "feature",
    "logits": "logits",
}
"""The module of each method of this package, which holds it in `METHODS`."""
_registered: dict[str, TransferMethod] = {}


def method_names() -> tuple[str, ...]:
    """Return the values that `transfer.method` takes."""
    return (*_MODULES, *_registered)


def find_method(name: str) -> TransferMethod:
    """Return the method of a name. Raises ConfigError for an unknown name."""
    if name in _registered:
        return _registered[name]
    if name not in _MODULES:
        raise ConfigError(f"transfer.method={name!r}; {did_you_mean(name, method_names())}")
    methods: tuple[TransferMethod, ...] = import_module(f".{_MODULES[name]}", __package__).METHODS
    return next(method for method in methods if method.name == name)


def register_method(method: TransferMethod) -> None:
    """Make a method known under its name, for `transfer.method` and `DualViT`.

    Raises ConfigError: there is one of this name.
    """
    if method.name in method_names():
        raise ConfigError(f"there is a transfer method {method.name!r} already: choose another name")
    _registered[method.name] = method
