"""`graftvit data [index] SOURCE`: describe a data set, draw its images as a model sees them, index its shards."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ...models.errors import ConfigError
from ..flags import Action, Parser, command_parser, describe_actions, output_file, parse_command, whole
from ..load_config import Setting
from ..say import say
from ..submitted import Work, check_data
from ..sweep import run_configs

if TYPE_CHECKING:
    from ...transfer.config import DataConfig, RunConfig

EXAMPLES = (
    "graftvit data /data/flowers --out look.png",
    "graftvit data /data/imagenet --recipe attention_distill_vit_large --limit 10000 --out look.png",
    "graftvit data digits --recipe digits_distill --out look.png",
    "graftvit data torch/cifar10 --data_path data --download --json cifar10.json",
    "graftvit data coco --data_path /data/coco",
    "graftvit data hfds/food101 --label_column label --val_split validation",
    "graftvit data wds/shards --data_path /data/shards --num_classes 1000",
    "graftvit data index wds/shards --data_path /data/shards --workers 16 --beside",
)
SETTINGS = ("data", "student.model", "student.model_args", "student.img_size", "seed")
OF_SHARDS = tuple(f"data.{key}" for key in ("dataset", "data_path", "train_split", "val_split", "workers"))
"""Settings that say which shards there are, and how many are read at a time."""


def run(argv: list[str]) -> int:
    """Run the action that the first word names; without one, describe a data set."""
    if argv and argv[0] in ACTIONS:
        return ACTIONS[argv[0]].run(argv[1:])
    return _describe(argv)


def _describe(argv: list[str]) -> int:
    """Print the description, and write the picture and the numbers if flags ask for them."""
    arguments, config, given = _parse(argv)
    from ...checkpoints.atomic import write_bytes, write_text
    from ...transfer.data.dense_sets import DENSE_SETS
    from ...transfer.data.survey import check_readable, survey
    from ...transfer.engine.fit_operators import stage_together
    from ..data_table import to_json, to_text

    stage = next((each.value for each in reversed(given) if each.key == "data.stage"), None)
    data = stage_together(config.data.model_copy(update={"stage": stage}), None)
    config = config.model_copy(update={"data": data})
    if data.dataset in DENSE_SETS:
        return _describe_dense(arguments, data)
    found = survey(config.data, limit=arguments.limit, decode=arguments.decode)
    say(to_text(found))
    if arguments.json is not None:
        write_text(arguments.json, to_json(found) + "\n")
    if arguments.out is not None:
        write_bytes(arguments.out, _draw_picture(config, arguments.images))
        say(f"{arguments.out}\n")
    check_readable(found)
    return 0


def _describe_dense(arguments: argparse.Namespace, data: DataConfig) -> int:
    """Print the images and objects of a data set of detection or segmentation. Raises ConfigError: a picture is asked
    for."""
    from ...checkpoints.atomic import write_text
    from ..data_table import dense_to_text, survey_dense

    if arguments.out is not None:
        raise ConfigError(
            f"--out draws images of classes, and data.dataset={data.dataset} has none: leave it out"
        )
    found = survey_dense(data)
    say(dense_to_text(found))
    if arguments.json is not None:
        write_text(arguments.json, json.dumps(found, indent=2) + "\n")
    return 0


def _index(argv: list[str]) -> int:
    """Make the indexes of all shards, and print a line for each split. Raises DataError: no split can be read."""
    arguments, data = _parse_index(argv)
    from ...models.errors import DataError, counted
    from ...transfer.data.loading import SourceLostError
    from ...transfer.data.shards import index_split

    missing: list[DataError] = []
    splits = list(filter(None, dict.fromkeys((data.train_split, data.val_split))))
    for split in splits:
        try:
            found = index_split(data, split, aside=arguments.beside)
        except SourceLostError:
            raise
        except DataError as error:
            missing.append(error)
            continue
        shards = len(found.counts)
        say(
            f"{split}: {counted(int(found.counts.sum()), 'sample')} in {counted(shards, 'shard')}, indexes written: "
            f"{found.written} of {shards}\n"
        )
    if len(missing) == len(splits):
        raise missing[0]
    say("".join(f"left out: {error}\n" for error in missing))
    return 0


def _parse_index(argv: list[str]) -> tuple[argparse.Namespace, DataConfig]:
    parser = command_parser(
        "data index",
        "Make the index of each shard (wds/...) ahead of a run: where each file of each sample is. Indexes that are "
        "there are kept unless their shard has changed, so that the command can be repeated. --workers shards are read "
        "at a time.",
        EXAMPLES,
        usage="SOURCE [--beside] [--flag value ...]",
    )
    _add_source(parser)
    parser.switch(
        "--beside",
        "write each index beside its shard, as NAME.tar.npz, for all machines; by default into the cache of this one",
    )
    arguments, given = parse_command(parser, argv, only=OF_SHARDS)
    data = _load_config(arguments.recipe, [*_read_source(arguments.source), *given]).data
    if not data.dataset.lower().startswith("wds/"):
        raise ConfigError(
            f"data.dataset={data.dataset or 'folder'} has no shards: `graftvit data index` takes wds/NAME"
        )
    return arguments, data


def check(argv: list[str], *, here: bool = True) -> Work:
    """Check the arguments and, with `here`, the data set."""
    if argv and argv[0] in ACTIONS:
        _, data = _parse_index(argv[1:])
        if here:
            check_data(data)
        return Work(workers=data.workers)
    arguments, config, _ = _parse(argv)
    if here:
        check_data(config.data)
    return Work(arguments.out or arguments.json)


def _parse(argv: list[str]) -> tuple[argparse.Namespace, RunConfig, list[Setting]]:
    parser = command_parser(
        "data",
        "Describe a data set: splits, classes and their labels, images per class, sizes, formats, unreadable files. "
        "Write a picture of training images as the model sees them, after augmentation and mixing.\n\n"
        f"{describe_actions(ACTIONS)}\n\n`graftvit data ACTION --help` explains an action.",
        EXAMPLES,
        usage="[ACTION] [SOURCE] [--out PNG] [--flag value ...]",
    )
    _add_source(parser)
    parser.flag("--out", "write a picture of augmented training images", type=output_file, metavar="PNG")
    parser.flag("--images", "images in the picture", type=whole(1), default=32, metavar="N")
    parser.flag("--json", "also write the numbers to a file", type=output_file, metavar="FILE")
    parser.switch("--decode", "decode whole files; by default only headers")
    text = "images of each split to open, evenly spaced (default: all; the first 1,000 of a stream)"
    parser.flag("--limit", text, type=whole(1), metavar="N")
    arguments, given = parse_command(parser, argv, only=SETTINGS)
    return arguments, _load_config(arguments.recipe, [*_read_source(arguments.source), *given]), given


def _add_source(parser: Parser) -> None:
    parser.add_argument(
        "source", nargs="?", metavar="SOURCE",
        help="a folder, a .tar file, or a data set's name as for --dataset: digits, torch/cifar10, hfds/..., wds/...",
    )  # fmt: skip
    parser.flag("--recipe", "recipe, YAML file or run whose settings to use", metavar="RECIPE")


def _read_source(word: str | None) -> list[Setting]:
    """Read SOURCE as settings: the name of a data set, or else a path."""
    if word is None:
        return []
    from ...transfer.data.datasets import is_name

    if is_name(word) and ("/" not in word or not Path(word).exists()):
        return [Setting("data.dataset", word, "SOURCE")]
    path = str(Path(word).expanduser())
    return [Setting("data.dataset", "", "SOURCE"), Setting("data.data_path", path, "SOURCE")]


def _load_config(recipe: str | None, settings: list[Setting]) -> RunConfig:
    """Load the configuration; of several stages or students take the last, which trains the student."""
    return run_configs(recipe, settings)[-1]


def _draw_picture(config: RunConfig, count: int) -> bytes:
    """Draw a PNG of the first training images, with the size and interpolation of the student."""
    from ...transfer.analysis.report.ink import to_png
    from ...transfer.data.survey import preview
    from ...transfer.engine.build import find_like, find_start, settle
    from ...transfer.engine.modes import mode_of
    from ...transfer.engine.students import find_whole, resolve_preprocessing

    mode = mode_of(config)
    start = find_start(mode)
    spec = resolve_preprocessing(settle(config, find_like(mode, start)), start, find_whole(config.student))
    return to_png(preview(config.data, spec, count, seed=config.seed), ground="white")


ACTIONS = {"index": Action("make the index of each shard ahead of a run", _index)}
