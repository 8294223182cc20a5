"""`graftvit search SOURCE --out DIR`: search for programs that take over the attention of a teacher."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ...models.errors import ConfigError
from ...transfer.analysis.report.tables import aligned
from ..flags import command_parser, parse_command
from ..load_config import load_config
from ..say import say
from ..source_flags import SOURCE_HELP, SOURCE_SETTINGS, source_keywords

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...transfer.config import RunConfig
    from ...transfer.search.evolution import Evaluation
    from ...transfer.search.program_search import Search

DATA = ("data.dataset", "data.data_path", "data.train_split", "data.download", "seed")
EXAMPLES = (
    "graftvit search runs/teacher --dataset digits --out found",
    "graftvit search vit_small_patch16_224.augreg_in1k --data_path /data/imagenet --generations 20 --out found",
    "graftvit search runs/teacher --dataset digits --at_random --out drawn   # for comparison",
)


def run(argv: list[str]) -> int:
    """Search, and print the front beside well-known programs."""
    arguments, config = _parse(argv)
    search = _search(arguments, config)
    done = search.run(arguments.generations, lambda line: say(f"{line}\n"))
    say(_table(search, done))
    return 0


def _parse(argv: list[str]) -> tuple[argparse.Namespace, RunConfig]:
    parser = command_parser(
        "search",
        "Search for attention programs by evolution. A program is measured by how well it takes over the attention "
        "of a pretrained teacher on recorded inputs of its layers, and by its cost; nothing is trained. The same "
        "command resumes a search that was stopped.",
        EXAMPLES,
        usage="SOURCE --out DIR [--flag value ...]",
    )
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the records")
    parser.add_argument("--images", type=int, default=16, metavar="N", help="images to record (default: 16)")
    parser.add_argument("--generations", type=int, default=10, metavar="N", help="generations (default: 10)")
    parser.add_argument(
        "--population", type=int, default=50, metavar="N", help="programs in each generation (default: 50)"
    )
    parser.add_argument(
        "--at_random", action="store_true", help="draw every generation, instead of evolving the ones before"
    )
    arguments, settings = parse_command(parser, argv, only=(*SOURCE_SETTINGS, *DATA))
    for name in ("images", "generations", "population"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} {getattr(arguments, name)}: give a number, 1 or more")
    config = load_config(None, settings)
    if not (config.data.dataset or config.data.data_path):
        raise ConfigError("a search needs images: give --data_path FOLDER, or --dataset digits")
    return arguments, config


def _search(arguments: argparse.Namespace, config: RunConfig) -> Search:
    """Load the teacher and record its layers."""
    from ...checkpoints.pretrained import load_pretrained
    from ...transfer.data.sample import sample_images
    from ...transfer.search.matching import record_layers
    from ...transfer.search.program_search import Search, SearchSettings

    teacher = load_pretrained(arguments.source, **source_keywords(config.teacher))
    images = sample_images(config.data, teacher.preprocessing, arguments.images, seed=config.seed)
    data = f"{arguments.images} of {config.data.dataset or config.data.data_path}"
    settings = SearchSettings(config.seed, arguments.population, arguments.at_random, arguments.source, data)
    return Search(arguments.out, settings, record_layers(teacher.model, images))


def _table(search: Search, done: Sequence[Evaluation]) -> str:
    from ...transfer.search.evolution import front
    from ...transfer.search.program_search import ARCHIVE, controls

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
