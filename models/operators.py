"""The registry of attention operators for layer plans."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

from .attention.agent import AgentAttention
from .attention.attention_program import ProgramAttention
from .attention.base import AttentionOperator, LayerShape
from .attention.hash import HashAttention
from .attention.hilo import HiLoAttention
from .attention.hybrid import HybridAttention
from .attention.kernel import KernelAttention
from .attention.linformer import LinformerAttention
from .attention.monarch import MonarchAttention
from .attention.nystrom import NystromAttention
from .attention.softmax import SoftmaxAttention
from .attention.ttt import TTTAttention
from .attention.uniform import UniformAttention
from .attention.window import NeighborhoodAttention, WindowAttention
from .errors import ConfigError, did_you_mean
from .json_types import JsonDict
from .layer_plan import KEEP, Choice
from .programs.found import FOUND

OPERATORS: dict[str, Callable[..., AttentionOperator]] = {
    "softmax": SoftmaxAttention,
    "kernel": KernelAttention,
    "linear": partial(KernelAttention, feature="elu", center=True),
    "performer": partial(KernelAttention, feature="favor", center=True),
    "hedgehog": partial(KernelAttention, feature="hedgehog", center=True),
    "t2r": partial(KernelAttention, feature="t2r", center=True),
    "focused": partial(KernelAttention, feature="focused", local="v", center=True),
    "cosformer": partial(KernelAttention, feature="cosine", center=True),
    "inline": partial(
        KernelAttention, feature="identity", normalizer="inline", local="v", local_size=3, center=True
    ),
    "mala": partial(KernelAttention, feature="elu", normalizer="mala", local="v", center=True),
    "linformer": LinformerAttention,
    "nystrom": NystromAttention,
    "agent": AgentAttention,
    "window": WindowAttention,
    "neighbourhood": NeighborhoodAttention,
    "dilated": partial(WindowAttention, dilation=2),
    "hilo": HiLoAttention,
    "hybrid": HybridAttention,
    "ttt": TTTAttention,
    "monarch": MonarchAttention,
    "uniform": UniformAttention,
    "program": ProgramAttention,
    **{name: partial(ProgramAttention, code=code) for name, code in FOUND.items()},
    "hash": HashAttention,
}
"""Constructors by name: the first argument is the `LayerShape`, the others are options."""

BUILT_IN = frozenset(OPERATORS)
"""The operators of this package, without registered ones."""

MOST = 16_384
"""The largest value of a numeric option: a plan may come from an untrusted file."""


def register_operator(name: str, create: Callable[..., AttentionOperator]) -> None:
    """Register an operator of another package under `name`.

    `create` is a class or function; it takes the `LayerShape` and the operator's options.

    Raises ConfigError: the name is taken.
    """
    if name in OPERATORS or name == KEEP:
        raise ConfigError(f"there is an operator {name!r} already: choose another name")
    OPERATORS[name] = create


RENAMED = {"centre": "center", "normaliser": "normalizer"}
"""Older spellings of options, which plans of saved models may have."""


def options_of(name: str) -> list[str]:
    """Return the names of an operator's options. The formula of a found program is not one: it is the operator."""
    options = list(inspect.signature(OPERATORS[name]).parameters)[1:]
    return [option for option in options if not (name in FOUND and option == "code")]


def check_choice(choice: Choice) -> None:
    """Raise ConfigError if the operator or an option does not exist, or a number has an invalid value.

    A number is at most `MOST`, and is neither true nor false.
    """
    if choice.operator not in OPERATORS:
        raise ConfigError(
            f"plan: unknown operator {choice.operator!r}; {did_you_mean(choice.operator, OPERATORS)}"
        )
    valid = options_of(choice.operator)
    for name, value in _options(choice).items():
        if name not in valid:
            known = did_you_mean(name, valid) if valid else "it has none"
            raise ConfigError(f"plan: {choice.operator} has no option {name!r}; {known}")
        if isinstance(value, bool) and _is_number(choice.operator, name):
            raise ConfigError(f"plan: {choice.operator} has {name}={str(value).lower()}; give a number")
        if isinstance(value, (int, float)) and not abs(value) <= MOST:  # also refuses NaN
            raise ConfigError(
                f"plan: {choice.operator} has {name}={value:g}; valid are numbers up to {MOST:,}"
            )


def _is_number(operator: str, option: str) -> bool:
    """Return whether an option is declared as a number."""
    declared = inspect.signature(OPERATORS[operator]).parameters[option].annotation
    types = set(str(getattr(declared, "__name__", declared)).replace(" ", "").split("|"))
    return bool(types) and types <= {"int", "float", "None"}


def canonical(choice: Choice) -> Choice:
    """Return the choice with its options in order of their names, without those that have their default."""
    if choice.operator not in OPERATORS:
        return choice
    known = inspect.signature(OPERATORS[choice.operator]).parameters
    given = sorted(_options(choice).items())
    return Choice(choice.operator, {name: value for name, value in given if value != known[name].default})


def create_operator(choice: Choice, shape: LayerShape) -> AttentionOperator:
    """Create the operator of a choice for a layer of this shape.

    Raises ConfigError: the operator, an option or its value is invalid.
    """
    check_choice(choice)
    return OPERATORS[choice.operator](shape, **_options(choice))


def _options(choice: Choice) -> JsonDict:
    """Return the options under the names that the operator has."""
    own = options_of(choice.operator)
    return {
        RENAMED[name] if name not in own and RENAMED.get(name) in own else name: value
        for name, value in choice.options.items()
    }
