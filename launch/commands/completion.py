"""`graftvit completion`: print a script with which a shell completes commands, flags and recipes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from ...models.errors import ConfigError, install_command
from ..fields import leaves
from ..flags import Action, Parser, command_parser, output_file, output_folder, parser_of, run_folder
from ..load_config import recipe_names
from ..say import say

EXAMPLES = (
    'eval "$(graftvit completion bash)"    # in this shell',
    "graftvit completion bash > ~/.local/share/bash-completion/completions/graftvit",
    "graftvit completion zsh > ~/.zfunc/_graftvit    # a folder of $fpath",
    "graftvit completion fish > ~/.config/fish/completions/graftvit.fish",
)
RECIPES = ("config", "recipe")
"""Names of arguments that are a recipe or a file."""
PATHS = (Path, output_file, output_folder, run_folder)
RECIPE_OR_FILE = {
    "bash": "_graftvit_recipes_or_FILE",  # shtab escapes names of files where this name has the word
    "zsh": "_graftvit_recipes",
    "fish": "(_graftvit_recipes)",
}
FUNCTIONS = {
    "bash": '_graftvit_recipes_or_FILE() {{ compgen -f -W "{recipes}" -- "$1"; }}',
    "zsh": "_graftvit_recipes() {{ _alternative 'recipes:recipe:({recipes})' 'files:file:_files'; }}",
    "fish": "function _graftvit_recipes; string split ' ' '{recipes}'; __fish_complete_path (commandline -ct); end",
}
"""By shell: what completes the name of a recipe, or a file."""


def run(argv: list[str]) -> int:
    """Print the script."""
    text = "Print a script with which a shell completes commands, flags and recipes."
    parser = command_parser("completion", text, EXAMPLES, "SHELL")
    parser.add_argument("shell", choices=tuple(FUNCTIONS), help="the shell that reads the script")
    shell = parser.parse_args(argv).shell
    try:
        import shtab
    except ImportError as error:
        raise ConfigError(
            f"completion needs shtab, not installed: {install_command('completion')}"
        ) from error
    recipes = " ".join(recipe_names())
    script = shtab.complete(
        _command_line(shtab.FILE), shell, preamble=FUNCTIONS[shell].format(recipes=recipes)
    )
    say(script + "\n")
    return 0


def _command_line(file: Mapping[str, object]) -> Parser:
    """Return a parser of the whole command line; an argument that is a path is completed by `file`."""
    from ..cli import COMMANDS

    whole = Parser(prog="graftvit")
    runs = {name: import_module(f"{__package__}.{name}").run for name in COMMANDS}
    inner = _add(whole, {name: Action(COMMANDS[name], run) for name, run in runs.items()}, file)
    submit = inner["submit"]  # takes the settings of train, too
    for argument in inner["train"]._actions:
        if argument.option_strings and not submit._option_string_actions.keys() & argument.option_strings:
            submit._add_action(argument)
    return whole


def _add(parser: Parser, actions: Mapping[str, Action], file: Mapping[str, object]) -> dict[str, Parser]:
    """Add actions, each with its own, before the other arguments of a parser; return their parsers."""
    words = parser.add_subparsers()
    parser._actions.insert(0, parser._actions.pop())
    found = {}
    for name, action in actions.items():
        own = parser_of(action.run)
        for argument in own._actions:
            if not argument.choices:
                _describe(argument, file)
        found[name] = words.add_parser(name, help=action.does, parents=[own], add_help=False)
        below = getattr(sys.modules[action.run.__module__], "ACTIONS", {})
        if below and action not in below.values():
            _add(found[name], below, file)
    return found


def _describe(argument: argparse.Action, file: Mapping[str, object]) -> None:
    """Say what completes the value of an argument."""
    leaf = leaves().get(argument.dest)
    if leaf is not None and leaf.names:
        argument.choices = leaf.names
    elif argument.dest in RECIPES or leaf or argument.type in PATHS or not argument.option_strings:
        argument.complete = RECIPE_OR_FILE if argument.dest in RECIPES else file  # type: ignore[attr-defined]
