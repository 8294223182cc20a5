"""The attention operators that a layer plan can name, with their options."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterator
from importlib import import_module

from . import attention
from .attention.base import AttentionOperator, LayerShape, OutputGate
from .errors import ConfigError, check_types, did_you_mean, kind_of
from .plan_syntax import AS_IT_IS, KEEP, NAME
from .plan_syntax import Choice as Choice
from .plugins import load_plugins
from .programs.program import FOUND

# Which operators claim to be faster than fused softmax attention, and from how many tokens on.

FASTER_FROM: dict[str, int] = {
    "kernel": 576,
    "linear": 576,
    "performer": 2304,
    "hedgehog": 1024,
    "t2r": 576,
    "focused": 576,
    "cosformer": 1024,
    "inline": 576,
    "mala": 1024,
    "linformer": 196,
    "nystrom": 1024,
    "agent": 576,
    "window": 196,
    "neighbourhood": 576,
    "dilated": 576,
    "hybrid": 2304,
    "ttt": 2304,
    "monarch": 2304,
    "uniform": 64,
}
"""The number of patch tokens from which an operator with default options claims to be faster than
`scaled_dot_product_attention` on a CPU (forward, float32, heads of width 64). An operator that is not listed makes no
claim. docs/efficiency.md has the measurements; a test measures the claims at 4,096 tokens."""


# The registry of attention operators for layer plans.


def find_operators() -> Iterator[tuple[str, Callable[..., AttentionOperator]]]:
    """Yield each name and constructor in the tables `OPERATORS` of the files in `attention/`."""
    for file in pkgutil.iter_modules(attention.__path__):
        module = import_module(f"{attention.__name__}.{file.name}")
        yield from getattr(module, "OPERATORS", {}).items()


OPERATORS = dict(find_operators())
"""Constructors by name: the first argument is the `LayerShape`, the others are options."""

BUILT_IN = frozenset(OPERATORS)
"""The operators of this package, without registered ones."""

GATE = "gate"
"""The option of every operator that gates the output of its heads by the layer's input, `OutputGate`."""

MOST = 16_384
"""The largest value of a numeric option: a plan may come from an untrusted file."""


@check_types()
def register_operator(name: str, create: Callable[..., AttentionOperator]) -> None:
    """Register an operator of another package under `name`.

    Args:
        name: the word of a layer plan, of a-z, 0-9 and _.
        create: a class or function; it takes the `LayerShape` and the operator's options.

    Raises:
        ConfigError: the name is taken or no such word, or the class is no `AttentionOperator` with all that one needs.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"name={name!r} is no word of a plan: give one of a-z, 0-9 and _, as in mean_attention"
        )
    if inspect.isclass(create):
        if not issubclass(create, AttentionOperator):
            raise ConfigError(f"create={create.__name__} is no AttentionOperator: give a subclass of it")
        if lacking := sorted(getattr(create, "__abstractmethods__", ())):
            raise ConfigError(
                f"create={create.__name__} is an AttentionOperator without {', '.join(lacking)}"
            )
    if name in OPERATORS or name in (KEEP, AS_IT_IS):
        raise ConfigError(f"there is an operator {name!r} already: choose another name")
    OPERATORS[name] = create


def is_operator(name: str) -> bool:
    """Return whether an operator has this name, of this package, registered, or of a plugin."""
    if name not in OPERATORS:
        load_plugins()
    return name in OPERATORS


def options_of(name: str) -> list[str]:
    """Return the names of an operator's options. The formula of a found program is not one: it is the operator."""
    options = list(inspect.signature(OPERATORS[name]).parameters)[1:]
    return [option for option in options if not (name in FOUND and option == "code")]


def check_choice(choice: Choice) -> None:
    """Raise ConfigError if the operator or an option does not exist, or a number has an invalid value.

    A number is at most `MOST`, and is neither true nor false.
    """
    if not is_operator(choice.operator):
        raise ConfigError(
            f"plan: unknown operator {choice.operator!r}; {did_you_mean(choice.operator, OPERATORS)}"
        )
    valid = options_of(choice.operator)
    for name, value in choice.options.items():
        if name == GATE and GATE not in valid:
            if not isinstance(value, bool):
                raise ConfigError(f"plan: {choice.operator} has gate={value!s:.40}; write true or false")
            continue
        if name not in valid:
            known = did_you_mean(name, valid) if valid else "it has none"
            raise ConfigError(f"plan: {choice.operator} has no option {name!r}; {known}")
        if isinstance(value, bool) and _is_number(choice.operator, name):
            raise ConfigError(f"plan: {choice.operator} has {name}={str(value).lower()}; give a number")
        if isinstance(value, (int, float)) and not abs(value) <= MOST:  # also refuses NaN
            raise ConfigError(
                f"plan: {choice.operator} has {name}={value!s:.40}; valid are numbers up to {MOST:,}"
            )


def _is_number(operator: str, option: str) -> bool:
    """Return whether an option is declared as a number."""
    declared = inspect.signature(OPERATORS[operator]).parameters[option].annotation
    types = set(str(getattr(declared, "__name__", declared)).replace(" ", "").split("|"))
    return bool(types) and types <= {"int", "float", "None"}


def canonical(choice: Choice) -> Choice:
    """Return the choice with its options in order of their names, without those that have their default."""
    if not is_operator(choice.operator):
        return choice
    known = inspect.signature(OPERATORS[choice.operator]).parameters
    given = sorted(choice.options.items())
    defaults = {GATE: False, **{name: each.default for name, each in known.items()}}
    return Choice(choice.operator, {name: value for name, value in given if value != defaults[name]})


def resolved(choice: Choice, operator: AttentionOperator) -> Choice:
    """Return the canonical choice with the options that its operator took from the image size of the conversion."""
    known = options_of(choice.operator) if is_operator(choice.operator) else ()
    sized = {name: value for name, value in operator.sized_options.items() if name in known}
    return canonical(Choice(choice.operator, {**choice.options, **sized}))


def create_operator(choice: Choice, shape: LayerShape) -> AttentionOperator:
    """Create the operator of a choice for a layer of this shape.

    Raises ConfigError: the operator, an option or its value is invalid.
    """
    check_choice(choice)
    options = dict(choice.options)
    gated = GATE not in options_of(choice.operator) and options.pop(GATE, False)
    operator = OPERATORS[choice.operator](shape, **options)
    if not isinstance(operator, AttentionOperator):
        raise ConfigError(
            f"the function that {choice.operator} was registered with returns {kind_of(operator)}, no AttentionOperator"
        )
    if gated:
        operator.output_gate = OutputGate(shape)
    return operator
