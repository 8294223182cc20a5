"""`graftvit programs search SOURCE --output_dir DIR`: search for programs that take over the attention of a teacher."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from ...models.errors import ConfigError
from ...transfer.analysis.report.tables import aligned
from ..flags import (
    IMAGE_SETTINGS,
    SOURCE_HELP,
    SOURCE_SETTINGS,
    Action,
    command_parser,
    parse_command,
    source_keywords,
    whole,
)
from ..load_config import load_config
from ..say import say
from ..submitted import Work, check_here

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...transfer.config import RunConfig
    from ...transfer.search.program_search import Evaluation, Search

EXAMPLES = (
    "graftvit programs search runs/teacher --dataset digits --output_dir found",
    "graftvit programs search vit_small_patch16_224.augreg_in1k --data_path /data/imagenet --generations 20 "
    "--output_dir found",
    "graftvit programs search runs/teacher --also runs/pyramid --dataset digits --output_dir found",
    "graftvit programs search runs/teacher --dataset digits --at_random --output_dir drawn   # for comparison",
    "graftvit programs search report found",
    "graftvit programs search report found --rows bench/rows.jsonl --top 10",
    "graftvit submit programs search runs/teacher --dataset digits --output_dir found --shares 4 --gpus_per_node 0",
)


def run(argv: list[str]) -> int:
    """Search and print the front beside well-known programs, or make the page of a search."""
    if argv and argv[0] in ACTIONS:
        return ACTIONS[argv[0]].run(argv[1:])
    arguments, config = _parse(argv)
    from ...transfer.cells import StoppedError, parse_share, usable_cores
    from ...transfer.search.program_search import run_search

    share = parse_share(arguments.share)
    workers = min(arguments.workers or usable_cores(), arguments.population)
    search = _open_search(arguments, config)
    try:
        done = run_search(
            search, arguments.generations, lambda line: say(f"{line}\n"), workers=workers, share=share
        )
    except KeyboardInterrupt as interrupt:
        raise StoppedError(
            signal.SIGINT, f"in {arguments.output_dir}; all evaluations are saved"
        ) from interrupt
    say(_format_table(search, done))
    return 0


def _report(argv: list[str]) -> int:
    parser = command_parser(
        "programs search report",
        "Write report.html into the folder of a search: its front, the lineage and the formulas of the front, and what "
        "was refused and why. The search may still be running.",
        EXAMPLES,
        usage="DIR [--rows ROWS [--short ROWS ...] [--top K]]",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the --output_dir of a search")
    text = "rows of `graftvit programs bench`: compare each proxy with their accuracies"
    parser.flag("--rows", text, type=Path, metavar="ROWS")
    text = "rows of shorter trainings, each recipe of which is a proxy"
    parser.flag("--short", text, type=Path, nargs="+", default=[], metavar="ROWS")
    parser.flag("--top", "best programs that the precision compares", type=whole(1), default=10, metavar="K")
    arguments = parser.parse_args(argv)
    if arguments.short and not arguments.rows:
        raise ConfigError("--short needs --rows, the rows of the longer trainings")
    from ...transfer.analysis.search_report import write_report

    rankings = _rank_proxies(arguments) if arguments.rows else []
    say(f"report: {write_report(arguments.folder, rankings)}\n")
    return 0


def _rank_proxies(arguments: argparse.Namespace) -> list[list[str]]:
    """Compare the proxies with the accuracies of a file of rows; print the table and return it, its head first."""
    from ...transfer.bench_rows import HEAD, rank_proxies
    from ...transfer.cells import torch_threads
    from ...transfer.search.program_search import open_search
    from ..load_config import load_rows

    with torch_threads(1):
        short = [row for path in arguments.short for row in load_rows(path)]
        rows = load_rows(arguments.rows)
        rankings = rank_proxies(open_search(arguments.folder), rows, arguments.top, short)
    table = [list(HEAD), *(each.cells for each in rankings)]
    say(f"{aligned(table, right=(3, 5, 6, 7))}\n")
    return table


def check(argv: list[str], *, here: bool = True) -> Work:
    """Check the arguments and, with `here`, the teacher and the images."""
    arguments, config = _parse(argv)
    if here:
        check_here(arguments.source, *arguments.also, data=config.data)
    return Work(output=arguments.output_dir, workers=(arguments.workers or 1) - 1, divisible=True)


def _parse(argv: list[str]) -> tuple[argparse.Namespace, RunConfig]:
    parser = command_parser(
        "programs search",
        "Search for attention programs by evolution. A program is measured by how well it takes over the attention "
        "of a pretrained teacher on recorded inputs of its layers, and by its cost; nothing is trained. The same "
        "command resumes a search that was stopped.",
        EXAMPLES,
        usage="SOURCE --output_dir DIR [--flag value ...]  |  report DIR",
    )
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    text = "another teacher: the mismatch with each is an objective"
    parser.flag("--also", text, action="append", default=[], metavar="SOURCE")
    parser.output_dir("folder of the records", required=True)
    parser.flag("--images", "images to record", type=whole(1), default=16, metavar="N")
    parser.flag("--generations", "generations", type=whole(1), default=10, metavar="N")
    parser.flag("--population", "programs in each generation", type=whole(1), default=50, metavar="N")
    parser.switch("--at_random", "draw each generation at random instead of evolving it")
    parser.flag(
        "--proxy", "matching: mismatch by least squares; fitted: after a short fit by gradients, slower",
        choices=("matching", "fitted"), default="matching",
    )  # fmt: skip
    text = "processes that evaluate at the same time (default: one per core); no effect on the archive"
    parser.flag("--workers", text, type=whole(1), metavar="N")
    parser.share("evaluate the I-th of N shares first, then what is missing")
    arguments, settings = parse_command(parser, argv, only=(*SOURCE_SETTINGS, *IMAGE_SETTINGS))
    config = load_config(None, settings)
    if not (config.data.dataset or config.data.data_path):
        raise ConfigError("a search needs images: give --data_path FOLDER, or --dataset digits")
    return arguments, config


def _open_search(arguments: argparse.Namespace, config: RunConfig) -> Search:
    """Load the teacher and record its layers."""
    from ...checkpoints.files import digest
    from ...checkpoints.pretrained import load_pretrained
    from ...checkpoints.provenance import identify
    from ...transfer.cells import torch_threads
    from ...transfer.data.survey import sample_images
    from ...transfer.search.matching import record_layers
    from ...transfer.search.program_search import Search, SearchSettings

    sources = [arguments.source, *arguments.also]
    how = source_keywords(config.teacher)
    teachers = [load_pretrained(source, **how, identified=True) for source in sources]
    with torch_threads(1):
        images = [
            sample_images(config.data, each.preprocessing, arguments.images, seed=config.seed)
            for each in teachers
        ]
        layers = [record_layers(each.model, own) for each, own in zip(teachers, images, strict=True)]
        data = f"{len(images[0])} of {config.data.dataset or config.data.data_path}"  # there may be fewer
        names, identity = ", ".join(sources), digest([identify(each) for each in teachers])
        own = (config.seed, arguments.population, arguments.at_random)
        settings = SearchSettings(*own, names, data, arguments.proxy, identity)
        return Search(arguments.output_dir, settings, layers)


def _format_table(search: Search, done: Sequence[Evaluation]) -> str:
    from ...transfer.search.program_search import ARCHIVE, controls, front

    rows = [["mismatch", "cost", "program"]]
    for each in front(done):
        rows.append([f"{each.mismatch:g}", f"{100 * each.cost / search.softmax_cost:.1f} %", each.program])
    known = [["mismatch", "cost", "for comparison"]]
    for name, (error, cost) in controls(search).items():
        known.append([f"{error:g}", f"{100 * cost / search.softmax_cost:.1f} %", name])
    refused = sum(1 for each in done if each.refused)
    return (
        f"\n{len(done)} programs, {refused} of them refused; the front, with cost relative to softmax:\n\n"
        f"{aligned(rows, right=(0, 1))}\n\n{aligned(known, right=(0, 1))}\n\n{search.folder / ARCHIVE}\n"
    )


ACTIONS = {"report": Action("write the page of a search", _report)}
