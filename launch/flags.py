"""Flags of the command line: `--blr 1e-3`, `--optim.blr=1e-3`, `--no-fsdp`, and bare `optim.blr=1e-3`."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from ..checkpoints.files import NOT_A_URL, is_there, is_url
from ..models.errors import ConfigError, JsonDict, did_you_mean
from ..transfer.config import TeacherConfig
from ..transfer.setting import Leaf
from .fields import find_key, find_stage_key, leaf_of, leaves, sections, short_names, unknown
from .load_config import Setting, at_home, load_config, parse_override, parse_setting

_taken: ContextVar[list[Parser] | None] = ContextVar("_taken", default=None)
"""The parsers whose help is not printed."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `ConfigError` with one sentence, and reads `--dry-run` as `--dry_run`.

    An argument of `type=Path` is a path on this machine, and no URL.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.register("type", Path, local_path)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> argparse.Namespace:
        """Parse as argparse does; flags may stand between arguments, and dashes in them are read as underscores."""
        words = sys.argv[1:] if args is None else args
        return super().parse_intermixed_args([_underscored(word) for word in words], namespace)

    def flag(self, name: str, text: str, **more: Any) -> None:
        """Add a flag with a value; its help ends with its default, if it has one."""
        default = more.get("default")
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
        self.add_argument(name, help=text if shown in (None, "") else f"{text} (default: {shown})", **more)

    def output_dir(self, text: str, default: str | None = None, *, required: bool = False) -> None:
        """Add the flag of the folder that the command writes."""
        path = None if default is None else Path(default)
        self.flag("--output_dir", text, type=output_folder, default=path, required=required, metavar="DIR")

    def share(self, text: str) -> None:
        """Add the flag of the share of the work that this process does, which jobs of an array divide."""
        text = f"{text}; used by jobs of `graftvit submit --shares N`"
        self.add_argument("--share", default="1/1", metavar="I/N", help=text)

    def switch(self, name: str, text: str) -> None:
        """Add a flag without a value."""
        self.add_argument(name, action="store_true", help=text)

    def print_help(self, file: Any = None) -> None:
        """Print the help, or hand the parser to `parser_of`."""
        taken = _taken.get()
        if taken is None:
            super().print_help(file)
        else:
            taken.append(self)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of printing the usage and exiting."""
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def parser_of(run: Callable[[list[str]], int]) -> Parser:
    """Return the parser whose help a command or an action prints."""
    taken: list[Parser] = []
    token = _taken.set(taken)
    try:
        with suppress(SystemExit):  # argparse leaves this way after --help
            run(["--help"])
    finally:
        _taken.reset(token)
    return taken[0]


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Show the short flags; the group's title gives the section of the dotted ones."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = ", ".join(sorted(action.option_strings, key=len, reverse=True))
        choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
        value = choices if action.metavar is None else action.metavar
        return names if action.nargs == 0 else f"{names} {value}".rstrip()


def command_parser(command: str, description: str, examples: Sequence[str], usage: str = "") -> Parser:
    """Create the parser of a command or an action, with its own of the examples at the end of its help."""
    width = _help_width()
    own = [example for example in examples if f" {command}" in example] or examples
    return Parser(
        prog=f"graftvit {command}",
        usage=f"graftvit {command} {usage}" if usage else None,
        description="\n".join(textwrap.fill(line, width) for line in description.splitlines()),
        epilog="\n".join(["examples:", *(f"  {example}" for example in own)]),
        formatter_class=lambda prog: _Formatter(prog, max_help_position=34, width=width),
        allow_abbrev=False,
    )


@dataclass(frozen=True)
class Action:
    """An action of a command, such as `stop` of `graftvit jobs`."""

    does: str
    """Purpose, in a few words."""
    run: Callable[[list[str]], int]
    """Runs it with the words after its name; returns the exit code."""


def run_action(command: str, argv: list[str], actions: Mapping[str, Action], examples: Sequence[str]) -> int:
    """Run the action that the first word names with the other words, or print the help of all actions.

    Raises:
        ConfigError: there is no such action.
    """
    if not argv or argv[0] in ("-h", "--help"):
        text = f"{describe_actions(actions)}\n\n`graftvit {command} ACTION --help` explains an action."
        command_parser(command, text, examples, usage="ACTION ...").print_help(sys.stdout)
        return 0 if argv else 2
    action, words = find_action(argv, actions)
    return actions[action].run(words)


def find_action(argv: Sequence[str], actions: Mapping[str, Action]) -> tuple[str, list[str]]:
    """Return the action that the first word names, and the other words. Raises ConfigError: there is no such action."""
    action, *words = argv or [""]
    if action not in actions:
        raise ConfigError(f"unknown action {action!r}; {did_you_mean(action, actions)}")
    return action, words


def describe_actions(actions: Mapping[str, Action]) -> str:
    """Return a line for each action."""
    width = max(map(len, actions))
    return "\n".join(f"{name:<{width}}  {action.does}" for name, action in actions.items())


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return the parser of a whole number from `least` to `most`, as the `type` of an argument."""

    def parse(text: str) -> int:
        value = int(text) if re.fullmatch(r"[+-]?\d{1,20}", text) else None
        if value is None or value < least or (most is not None and value > most):
            valid = f", {least} or more" if most is None else f" from {least:,} to {most:,}"
            raise argparse.ArgumentTypeError(f"give a whole number{valid}, not {text!r}")
        return value

    return parse


def local_path(text: str) -> Path:
    """Parse a path on the command line. Raises argparse.ArgumentTypeError for a URL; the parser adds the name."""
    if is_url(text):
        raise argparse.ArgumentTypeError(f"{text!r}: {NOT_A_URL}")
    return Path(text)


def output_folder(text: str) -> Path:
    """Parse a folder to write. Raises argparse.ArgumentTypeError as `local_path`, or because it is a file."""
    path = local_path(text)
    if (path.exists() or path.is_symlink()) and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a file or a link that leads nowhere: give a folder")
    return path


def output_file(text: str) -> Path:
    """Parse a file to write. Raises argparse.ArgumentTypeError as `local_path`, or because its folder is missing."""
    path = local_path(text)
    if not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be written: its folder does not exist; create it first"
        )
    return path


def run_folder(text: str) -> Path:
    """Parse a folder on the command line.

    Raises argparse.ArgumentTypeError for an empty name, such as that of a shell variable that is not set. The parser
    adds the name of the argument.
    """
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder: give the folder of a run or of a sweep")
    return local_path(text)


def parse_command(
    parser: Parser, argv: Sequence[str], only: Sequence[str] | None = None, *, explain: bool = True
) -> tuple[argparse.Namespace, list[Setting]]:
    """Return the command's own arguments, and the settings of the run in the given order.

    Args:
        parser: Holds the command's own flags and positional arguments.
        argv: The words after the command's name.
        only: Sections and keys that the command takes; by default all.
        explain: Explain these settings in the help of the command.

    Raises:
        ConfigError: if a flag is unknown or has no value.
    """
    own = set(parser._option_string_actions)
    takes_value = {name for name, action in parser._option_string_actions.items() if action.nargs != 0}
    if explain:
        _describe_settings(parser, only)
    rest: list[str] = []
    settings: list[Setting] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        flag = _underscored(word)
        if flag.partition("=")[0] in own:
            rest.append(flag)
            if flag in takes_value and words:
                rest.append(words.pop(0))
        elif word.startswith("--"):
            settings.append(_flag_setting(word, words, parser, only))
        elif "=" in word and not is_there(word):
            settings.append(_checked(parse_override(word), parser, only))
        else:
            rest.append(word)
    return parser.parse_args(rest), settings


def split_words(parser: Parser, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the flags of `parser` with their values, and all other words, which belong to another command."""
    own: list[str] = []
    others: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, _ = _underscored(word).partition("=")
        action = parser._option_string_actions.get(name)
        (others if action is None else own).append(word)
        if action is not None and action.nargs != 0 and not equals and words:
            own.append(words.pop(0))
    return own, others


def _underscored(word: str) -> str:
    """Write `--dry-run=x-y` as `--dry_run=x-y`, and expand `=~/x` as a shell would; keep other words."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{at_home(value)}"


def _flag_setting(word: str, words: list[str], parser: Parser, only: Sequence[str] | None) -> Setting:
    """Return the setting of a long flag; take its value from `words` if it needs one."""
    name, equals, value = word[2:].partition("=")
    stage, key = _staged_key(name, only)
    off = key is None or stage.startswith("no_")
    if off and not equals and name.startswith(("no-", "no_")):
        stage, key = _staged_key(name[3:], only)
        if key is not None and leaf_of(key).is_switch:
            return _checked(Setting(key, False, word, stage), parser, only)
        raise _unknown_flag(name, parser, only)
    if key is None:
        raise _unknown_flag(name, parser, only)
    leaf = leaf_of(key)
    if not equals and leaf.is_switch and not {*words[:1]} & {"true", "false", *leaf.names}:
        return _checked(Setting(key, True, word, stage), parser, only)
    if not equals:
        if not words or words[0].startswith("--"):
            raise ConfigError(f"--{name} needs a value: {leaf.valid()}")
        value = words.pop(0)
    return _checked(replace(parse_setting(key, value, origin=f"--{name}"), stage=stage), parser, only)


def _unknown_flag(name: str, parser: Parser, only: Sequence[str] | None) -> ConfigError:
    own = tuple(flag[2:] for flag in parser._option_string_actions if flag.startswith("--"))
    keys = [key for key, leaf in leaves().items() if _takes(leaf, only)]
    return unknown(name, dashes="--", extra=own, keys=keys, command=parser.prog)


def _staged_key(name: str, only: Sequence[str] | None) -> tuple[str, str | None]:
    """Return the stage, empty for all, and the key that a flag means; the key is None for an unknown one."""
    key = _only_key(name, only) or find_key(name)
    if key is not None or only is not None:
        return "", key
    return find_stage_key(name) or ("", None)


def _only_key(name: str, only: Sequence[str] | None) -> str | None:
    """Return the setting that a plain name means for a command with few settings: `model` means `teacher.model`."""
    head, dot, inner = name.replace("-", "_").partition(".")  # model_args.depth
    named = [key for key in leaves() if key.rpartition(".")[2] == head and _takes(leaf_of(key), only)]
    return f"{named[0]}{dot}{inner}" if only is not None and len(named) == 1 else None


def _checked(setting: Setting, parser: Parser, only: Sequence[str] | None) -> Setting:
    if not _takes(leaf_of(setting.key), only):
        raise ConfigError(
            f"{setting.origin} has no effect on this command; `{parser.prog} --help` lists the valid flags"
        )
    return setting


def _takes(leaf: Leaf, only: Sequence[str] | None) -> bool:
    return only is None or leaf.key in only or leaf.section in only


def _describe_settings(parser: Parser, only: Sequence[str] | None) -> None:
    """Add the settings to the help with their defaults, one group for each section."""
    taken = [leaf for leaf in leaves().values() if _takes(leaf, only)]
    titles = {"": ("run", "The run itself.")} | {
        name: (
            name,
            textwrap.fill(" ".join((section.__doc__ or "").partition("Args:")[0].split()), _help_width() - 2),
        )
        for name, section in sections().items()
    }
    texts = dict[str, str | None]()
    if only is not None and "teacher" not in only:
        titles["teacher"] = ("source", "How a source of weights is read.")
        texts = {f"teacher.{name}": text for name, text in SOURCE_TEXTS.items()}
    for name, (title, description) in titles.items():
        members = [leaf for leaf in taken if leaf.section == name]
        group = parser.add_argument_group(title, description) if members else parser
        for leaf in members:
            group.add_argument(
                *_names(leaf, only),
                dest=leaf.key,
                default=argparse.SUPPRESS,
                nargs="?",
                metavar=_metavar(leaf),
                help=_help(leaf, texts.get(leaf.key)),
            )


def _names(leaf: Leaf, only: Sequence[str] | None) -> list[str]:
    short = [f"--{name}" for name, key in short_names().items() if key == leaf.key]
    if not short and _only_key(leaf.name, only) == leaf.key:
        short = [f"--{leaf.name}"]
    names = short or [f"--{leaf.key}"]
    if leaf.is_switch and leaf.field.default is True:
        return [f"--no-{name[2:]}" for name in names]
    return names


def _metavar(leaf: Leaf) -> str:
    if leaf.is_switch:
        return ""
    valid = leaf.valid().removesuffix(" or none")
    if valid.startswith("one of ") and " or " not in valid:
        return "{" + ",".join(valid.removeprefix("one of ").split(", ")) + "}"
    return leaf.name.upper()


def _help(leaf: Leaf, text: str | None = None) -> str:
    default = leaf.field.default
    if isinstance(default, tuple):
        default = ",".join(str(part) for part in default)
    if leaf.is_switch:
        ending = "on by default; this flag turns it off" if default else "off by default"
    else:
        ending = f"default: {'none' if default is None else default if default != '' else repr('')}"
    text = text or leaf.field.description or leaf.name.replace("_", " ")
    return f"{text} ({ending})".replace("%", "%%")


def _help_width() -> int:
    return min(shutil.get_terminal_size((110, 0)).columns, 120)  # some terminals say that they have 0 columns


# The settings for reading a source of weights, for the commands that take one.

SOURCE_TEXTS = {
    "model": None,
    "model_args": "keyword arguments of the model's timm constructor",
    "revision": "branch, tag or commit on the hub",
    "img_size": "image size of the model's input, to which it is resampled; its own by default",
    "position_embedding": None,
}
"""By setting: its help, where that of a run's teacher says more than is true of any source."""
SOURCE_SETTINGS = tuple(f"teacher.{name}" for name in SOURCE_TEXTS)
SOURCE_HELP = "timm name, hf-hub:org/name[@revision], run or model folder, weights file; a path may end in #best, #last, #ema, #teacher or #student"  # noqa: E501


IMAGE_SETTINGS = ("data.dataset", "data.data_path", "data.train_split", "data.download", "seed")
"""The settings for drawing some training images."""


def source_keywords(how: TeacherConfig) -> JsonDict:
    """Return the settings as keywords of `load_pretrained`."""
    return {name: getattr(how, name) for name in SOURCE_TEXTS}


def keywords_of(settings: Sequence[Setting]) -> JsonDict:
    """Return the settings of a command line as keywords of `load_pretrained`. Raises ConfigError for a wrong value."""
    return source_keywords(load_config(None, settings).teacher)
