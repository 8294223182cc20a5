"""`graftvit recipes`: list the recipes, or print one."""

from __future__ import annotations

from ..flags import command_parser
from ..load_config import recipe_names, recipe_summary, recipe_text
from ..say import say


def run(argv: list[str]) -> int:
    """Print the table of recipes, or the YAML of one recipe."""
    parser = command_parser(
        "recipes",
        "List the recipes that come with the package, or print one as YAML.",
        ["graftvit recipes", "graftvit recipes attention_distill_vit_large > mine.yaml"],
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="recipe to print")
    name = parser.parse_args(argv).name
    if name is not None:
        say(recipe_text(name))
        return 0
    width = max(map(len, recipe_names()), default=0)
    for recipe in recipe_names():
        say(f"{recipe:<{width}}  {recipe_summary(recipe)}\n")
    return 0
