"""`graftvit list operators | recipes | schema`: list what a plan, a command line or a YAML file can name."""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Callable
from importlib import resources

from ...models.errors import ConfigError, did_you_mean
from ...transfer.analysis.report.tables import aligned
from ..flags import Action, command_parser, run_action, whole
from ..load_config import recipe_names, recipe_summary, recipe_text
from ..say import say

EXAMPLES = (
    "graftvit list recipes",
    "graftvit list recipes attention_distill_vit_large > mine.yaml",
    "graftvit list schema > schema.json",
    "graftvit list operators",
    "graftvit list operators hybrid",
    "graftvit list operators window --grid 64",
)
GRIDS = (14, 32, 64)
HEADS, WIDTH = 12, 64
FOOT = """
a map: linear in the values, so that its rows can be shown and matched    grid: it needs the positions of the patches
bias: it accepts a relative position bias (BEiT)    new: its new parameters in a layer of 12 heads of 64, first grid
MACs: multiply-adds of the attention map in such a layer on that many patches, relative to softmax

`graftvit list operators NAME` explains one. In a plan: '*: linear; 9-11: softmax', with options: 'window(window=9)'.
"""


def run(argv: list[str]) -> int:
    """Run one action."""
    return run_action("list", argv, ACTIONS, EXAMPLES)


def _list_recipes(argv: list[str]) -> int:
    """Print the table of recipes, or the YAML of one recipe."""
    parser = command_parser(
        "list recipes",
        "List the recipes that come with the package, or print one as YAML.",
        EXAMPLES,
        "[NAME]",
    )
    parser.add_argument("recipe", nargs="?", metavar="NAME", help="recipe to print")
    name = parser.parse_args(argv).recipe
    if name is not None:
        # an editor finds a schema of the plain name beside the recipe alone
        schema = resources.files("graftvit.cfgs") / "schema.json"
        say(recipe_text(name).replace("$schema=schema.json", f"$schema={schema}"))
        return 0
    width = max(map(len, recipe_names()), default=0)
    for recipe in recipe_names():
        say(f"{recipe:<{width}}  {recipe_summary(recipe)}\n")
    return 0


def _list_schema(argv: list[str]) -> int:
    """Print the JSON schema of recipes and YAML files."""
    text = "Print the JSON schema of recipes and YAML files, with which an editor completes and checks them."
    command_parser("list schema", text, EXAMPLES).parse_args(argv)
    from ..schema import schema_text

    say(schema_text())
    return 0


def _list_operators(argv: list[str]) -> int:
    """Print the table of operators, or one operator with its equation and options."""
    parser = command_parser(
        "list operators",
        "List the attention operators that a plan can name, with their costs relative to softmax, or explain one.",
        EXAMPLES,
        usage="[NAME] [--grid N ...]",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="operator to explain")
    parser.flag(
        "--grid",
        "patches per side for which to count multiply-adds",
        type=whole(1),
        nargs="+",
        default=GRIDS,
        metavar="N",
    )
    arguments = parser.parse_args(argv)
    from ...models.layer_plan import OPERATORS
    from ...models.plugins import load_plugins

    load_plugins()
    if arguments.name is not None and arguments.name not in OPERATORS:
        raise ConfigError(f"unknown operator {arguments.name!r}; {did_you_mean(arguments.name, OPERATORS)}")
    names = list(OPERATORS) if arguments.name is None else [arguments.name]
    say(_format_table(names, arguments.grid))
    say(_explain(arguments.name) if arguments.name is not None else FOOT)
    return 0


def _format_table(names: list[str], grids: list[int]) -> str:
    head = ["operator", "a map", "grid", "bias", "new"]
    rows = [[*head, *(f"MACs {grid}x{grid}" for grid in grids), "options"]]
    for name in names:
        options = " ".join(f"{key}={value}" for key, value in _read_options(name).items())
        rows.append([name, *_describe_facts(name, grids), options or "-"])
    return aligned(rows, right=tuple(range(4, 5 + len(grids))))


def _read_options(name: str) -> dict[str, str]:
    """Return the options of an operator by name, with their defaults as a plan writes them."""
    from ...models.layer_plan import OPERATORS, options_of

    parameters = inspect.signature(OPERATORS[name]).parameters
    defaults = {option: parameters[option].default for option in options_of(name)}
    return {key: "auto" if value is None else str(value).lower() for key, value in defaults.items()}


def _describe_facts(name: str, grids: list[int]) -> list[str]:
    """Return the traits, the new parameters at the first grid, and the cost at each grid relative to softmax."""
    from ...models.attention.base import Geometry, LayerShape
    from ...models.layer_plan import Choice, create_operator

    made = []
    for grid in grids:
        shape = LayerShape(HEADS, WIDTH, Geometry(1, (grid, grid)))
        made.append([create_operator(Choice(each), shape).macs(shape.geometry) for each in (name, "softmax")])
    operator = create_operator(Choice(name), LayerShape(HEADS, WIDTH, Geometry(1, (grids[0], grids[0]))))
    traits = operator.traits
    words = ["yes" if holds else "no" for holds in (traits.linear_in_v, traits.needs_grid, traits.bias)]
    new = sum(parameter.numel() for parameter in operator.parameters())
    return [*words, f"{new:,}", *(f"{100 * own / softmax:.0f} %" for own, softmax in made)]


def _explain(name: str) -> str:
    """Return the docstring of an operator, and how a plan writes it with its options."""
    from ...models.layer_plan import OPERATORS
    from ...models.programs.program import FOUND

    code = f"\n\ncode: {FOUND[name]}" if name in FOUND else ""
    return f"\n{read_equation(OPERATORS[name])}{code}\n\nin a plan: {write_in_a_plan(name)}\n"


def read_equation(operator: Callable[..., object]) -> str:
    """Return the docstring of an operator, without its errors."""
    return textwrap.dedent("    " + (inspect.getdoc(class_of(operator)) or "")).split("\n\nRaises")[0].strip()


def class_of(operator: Callable[..., object]) -> Callable[..., object]:
    """Return the class of an operator, which may be a preset of its options."""
    return operator.func if isinstance(operator, functools.partial) else operator


def write_in_a_plan(name: str) -> str:
    """Return a plan with an operator in every layer, and with its options where they have a default."""
    options = ", ".join(f"{key}={value}" for key, value in _read_options(name).items() if value != "auto")
    return f"'*: {name}{f'({options})' if options else ''}'"


ACTIONS = {
    "operators": Action(
        "the attention operators that a plan can name, with their options and costs", _list_operators
    ),
    "recipes": Action(
        "the recipes that come with the package; `list recipes NAME` prints one", _list_recipes
    ),
    "schema": Action("the JSON schema of recipes and YAML files, for editors", _list_schema),
}
