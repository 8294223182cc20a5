"""The recipes that come with the package: one YAML file for each published experiment."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

from ..models.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from importlib.abc import Traversable


def recipe_names() -> list[str]:
    """Return the names of the recipes, sorted."""
    return sorted(_recipes())


def recipe_text(name: str) -> str:
    """Return the YAML of a recipe.

    Raises:
        ConfigError: if no recipe has this name.
    """
    recipes = _recipes()
    if name not in recipes:
        raise ConfigError(f"no recipe or file {name!r}; {did_you_mean(name, recipes)}")
    return recipes[name].read_text(encoding="utf-8")


def recipe_summary(name: str) -> str:
    """Return the first line of a recipe, a comment that states its origin."""
    return recipe_text(name).splitlines()[0].lstrip("# ").rstrip()


def _recipes() -> dict[str, Traversable]:
    folder = resources.files("graftvit.cfgs")
    return {entry.name[: -len(".yaml")]: entry for entry in folder.iterdir() if entry.name.endswith(".yaml")}
