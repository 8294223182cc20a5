"""The table of attention operators that a plan can name."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from .attention.linear import LinearAttention
from .errors import ConfigError, did_you_mean
from .host import Operator, Softmax
from .plan import Choice

OPERATORS: dict[str, Callable[..., Operator]] = {"softmax": Softmax, "linear": LinearAttention}


def create_operator(choice: Choice) -> Operator:
    """The operator of a choice.

    Raises ConfigError: there is no such operator, or it has no such option or value.
    """
    if choice.operator not in OPERATORS:
        raise ConfigError(
            f"plan: unknown operator {choice.operator!r}; {did_you_mean(choice.operator, OPERATORS)}"
        )
    make = OPERATORS[choice.operator]
    valid = [name for name in inspect.signature(make).parameters if name not in ("args", "kwargs")]
    for name in choice.options:
        if name not in valid:
            known = did_you_mean(name, valid) if valid else "it has none"
            raise ConfigError(f"plan: {choice.operator} has no option {name!r}; {known}")
    return make(**choice.options)
