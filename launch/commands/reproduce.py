"""`graftvit reproduce`: kits for published numbers, their surrogates, and rows of finished runs."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ...models.errors import ConfigError, RunFailedError, did_you_mean
from ..flags import command_parser, output_file, parse_command
from ..load_config import Setting, load_comparison, load_config, load_stages
from ..say import hint, say
from . import compare
from .evaluate import SETTINGS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from ...checkpoints.provenance import Pretrained
    from ...transfer.bench_rows import Row
    from ...transfer.engine.stages import Stage
    from ...transfer.kits import Kit

EXAMPLES = (
    "graftvit reproduce                                             # the kits",
    "graftvit reproduce attention-copy                              # number, cost, commands",
    "graftvit reproduce attention-copy --surrogate --output_dir surrogates/attention",
    "graftvit reproduce attention-copy --row runs/attention-copy --data_path /data/imagenet --out rows.jsonl",
    "graftvit reproduce attention-copy --row downloaded --data_path /data/imagenet --verify rows.jsonl",
)
Scores = dict[str, dict[int, float]]
"""Top-1 by the name of a student, by seed."""


def run(argv: list[str]) -> int:
    """List the kits, explain one, run its surrogate, or make or verify a row of it."""
    arguments, settings = _parse(argv)
    from ...transfer.kits import load_kits

    kits = load_kits(arguments.kits)
    if arguments.name is None:
        say(_list(kits))
        return 0
    if arguments.name not in kits:
        raise ConfigError(f"no kit {arguments.name!r}; {did_you_mean(arguments.name, kits)}")
    kit = kits[arguments.name]
    if arguments.surrogate:
        return _run_surrogate(kit, arguments.output_dir)
    if arguments.row:
        return _make_row(arguments, kit, settings)
    for recipe in kit.recipes:
        _load_recipe(recipe)  # before anybody is told to run it
    say(_explain(arguments, kit))
    return 0


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[Setting]]:
    parser = command_parser(
        "reproduce",
        "List the kits for published numbers, or print what one takes: the number with its source, the commands, the "
        "hours of a GPU. --surrogate runs a small experiment, which a repeated command resumes, and prints what of the "
        "claim it shows: the sign of a difference, with its interval over seeds. --row evaluates the students of "
        "finished runs, compares the result with the published number, and adds it to a file that others can verify.",
        EXAMPLES,
        usage="[NAME] [--surrogate --output_dir DIR | --row STUDENT [--flag value ...]]",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="kit")
    parser.switch("--surrogate", "run the small experiment")
    parser.output_dir("folder of the small experiment")
    text = "student of a run of the kit's recipe: its run folder, or a student folder; may be repeated, once a recipe"
    parser.flag("--row", text, action="append", default=[], metavar="STUDENT")
    parser.flag("--out", "file of rows to add the row to", type=output_file, metavar="FILE")
    parser.flag(
        "--verify", "file of rows, of which that of these weights must agree", type=Path, metavar="ROWS"
    )
    parser.flag(
        "--kits", "file of kits of your own, in the form of those of the package", type=Path, metavar="FILE"
    )
    arguments, settings = parse_command(parser, argv, only=SETTINGS)
    if arguments.surrogate != (arguments.output_dir is not None):
        raise ConfigError("--surrogate and --output_dir DIR go together: a repeated command resumes in DIR")
    if arguments.surrogate and arguments.row:
        raise ConfigError("--surrogate and --row are two things: give one of them")
    given = {"--out": arguments.out, "--verify": arguments.verify}
    for flag, value in {**given, **{each.origin: each.value for each in settings}}.items():
        if value is not None and not arguments.row:
            raise ConfigError(f"{flag} {value} needs --row STUDENT")
    if (arguments.surrogate or arguments.row) and arguments.name is None:
        raise ConfigError("name a kit; `graftvit reproduce` lists them")
    return arguments, settings


def _list(kits: dict[str, Kit]) -> str:
    from ...transfer.analysis.report.tables import aligned

    rows = [["kit", "top-1", "±", "V100 hours", "surrogate, min", "claim"]]
    for name, kit in kits.items():
        number = [str(kit.published.top1), str(kit.published.tolerance)]
        rows.append([name, *number, f"{kit.gpu_hours:,.0f}", f"{kit.surrogate.minutes:g}", kit.claim])
    return aligned(rows, right=(1, 2, 3, 4)) + "\n`graftvit reproduce NAME` prints sources and commands.\n"


def _explain(arguments: argparse.Namespace, kit: Kit) -> str:
    """Return all that is known of a kit, with the commands."""
    from ...transfer.analysis.report.tables import aligned

    name, published, surrogate = arguments.name, kit.published, kit.surrogate
    this = ("reproduce", name, *(() if arguments.kits is None else ("--kits", arguments.kits)))
    folders = [f"runs/{name}" if len(kit.recipes) == 1 else f"runs/{recipe}" for recipe in kit.recipes]
    data = ("--data_path", "/data/imagenet")
    runs = [
        hint("train", recipe, *data, "--output_dir", folder)
        for recipe, folder in zip(kit.recipes, folders, strict=True)
    ]
    row = [word for folder in folders for word in ("--row", folder)]
    lines = [
        ("claim", kit.claim),
        ("published", f"{published.top1} % top-1 ({published.beside})"),
        ("source", published.source),
        ("tolerance", f"± {published.tolerance}: {published.because}"),
        (
            "cost",
            f"about {kit.gpu_hours:,.0f} V100 hours, scaled by multiply-adds from MAE's fine-tuning of ViT-B",
        ),
        *(("train", command) for command in runs),
        ("row", hint(*this, *row, *data, "--out", "rows.jsonl")),
        ("surrogate", hint(*this, "--surrogate", "--output_dir", f"surrogates/{name}")),
        ("", f"= graftvit {surrogate.command}; about {surrogate.minutes:g} min on one core"),
        *(("judged by", f"{each.higher} above {each.lower}: {each.says}") for each in surrogate.contrasts),
        ("limits", surrogate.limits),
    ]
    return aligned(lines) + "`graftvit submit` takes the words of `graftvit train`, on a SLURM cluster.\n"


# The surrogate: an existing command in a folder, and the accuracies that it left there.


def _run_surrogate(kit: Kit, folder: Path) -> int:
    from ...transfer.kits import judge

    words = shlex.split(kit.surrogate.command)
    module = importlib.import_module(f".{words[0]}", __package__)
    code: int = module.run([*words[1:], "--output_dir", str(folder)])
    if code:
        return code
    top1 = READERS[words[0]](words, folder)
    for contrast in kit.surrogate.contrasts:
        say(f"{judge(contrast, top1)}\n")
    say(f"limits: {kit.surrogate.limits}\n")
    return 0


def _read_demo(words: Sequence[str], folder: Path) -> Scores:
    """Return the accuracies of the demo's students: `scratch`, `copy/mae`, `ensemble/mae`, ..."""
    from ...transfer.analysis.demo import SEEDS, measure
    from ...transfer.analysis.demo_cells import DATA_SETS, demo_cells

    results = measure(demo_cells(folder.resolve(), SEEDS, quick=False), DATA_SETS["digits"], quick=False)
    return {
        "/".join(filter(None, (each.method, each.teacher))): dict(zip(results.seeds, each.top1, strict=True))
        for each in results.methods
    }


def _read_compare(words: Sequence[str], folder: Path) -> Scores:
    """Return the last accuracies of a comparison's students."""
    arguments, settings = compare.parse([*words[1:], "--output_dir", str(folder)])
    comparison = load_comparison(arguments.config, settings)
    found: Scores = {}
    for record in comparison.records():
        if record.final is not None and record.seed is not None:
            found.setdefault(record.name, {})[record.seed] = record.final.top1
    return found


def _read_rows(words: Sequence[str], folder: Path) -> Scores:
    """Return the last accuracies of programs, `softmax with` or `softmax without` the convolution."""
    from ...transfer.bench_rows import read_rows

    found: Scores = {}
    for row in read_rows(folder / "rows.jsonl"):
        if row.top1 is not None:
            name = f"{row.name or row.program} {'with' if row.local else 'without'}"
            found.setdefault(name, {})[row.seed] = row.top1
    return found


READERS = {"demo": _read_demo, "compare": _read_compare, "programs": _read_rows}
"""What reads the accuracies that a command left in its folder."""


# A row: students evaluated, beside the published number or a row of somebody else.


def _make_row(arguments: argparse.Namespace, kit: Kit, settings: list[Setting]) -> int:
    from ...transfer.bench_rows import merge_rows, read_rows, write_rows
    from ...transfer.kits import compare_published, disagreement_of_weights

    known = [] if arguments.verify is None else read_rows(arguments.verify)
    row = _row(arguments, kit, settings)
    say(f"{compare_published(row, kit)}\n")
    if arguments.verify is not None:
        why = disagreement_of_weights(known, row)
        if why:
            raise RunFailedError(f"{arguments.verify} is not confirmed: {why}")
        say(f"{arguments.verify}: the row of these weights agrees\n")
    if arguments.out is not None:
        before = read_rows(arguments.out) if arguments.out.exists() else []
        rows = merge_rows([before, [row]])
        write_rows(rows, arguments.out)
        say(f"{arguments.out}: {len(rows)} row{'s' if len(rows) > 1 else ''}\n")
    return 0


def _row(arguments: argparse.Namespace, kit: Kit, settings: list[Setting]) -> Row:
    """Check that the students are of the kit's recipes, evaluate them, and return their row."""
    from ...checkpoints.pretrained import load_pretrained
    from ...transfer.kits import make_row
    from ...transfer.metrics.measure import ENSEMBLE
    from ..evaluation import Evaluation, evaluate

    sources: list[str] = arguments.row
    if len(sources) != len(kit.recipes):
        raise ConfigError(
            f"--row: {arguments.name} has the recipe{'s' * (len(kit.recipes) > 1)} {', '.join(kit.recipes)}; give one "
            "student of each, in this order"
        )
    recipes = [_load_recipe(recipe) for recipe in kit.recipes]
    models = [load_pretrained(source, identified=True) for source in sources]
    seeds = [_check(*each) for each in zip(sources, models, recipes, strict=True)]
    whole = Setting("data.val_samples", None, "all images")  # of a run that was evaluated on some
    results = evaluate(
        Evaluation(sources, [whole, *settings], ["top1"], None, None, False), lambda line: None
    )
    measured = results[sources[0] if len(sources) == 1 else ENSEMBLE]
    return make_row(arguments.name, kit, models, recipes, seeds[0], measured)


def _load_recipe(recipe: str) -> list[Stage]:
    """Return the stages of a recipe of runs. Raises ConfigError: it is missing, or not valid."""
    from ...transfer.engine.stages import Stage

    return load_stages(recipe) or [Stage("", load_config(recipe))]


def _check(source: str, loaded: Pretrained, stages: list[Stage]) -> int:
    """Return the seed of a student, whose run and its earlier stages, where they are there, are those of the recipe."""
    from ...checkpoints.pretrained import load_pretrained
    from ...transfer.kits import check_recipe

    for number, stage in enumerate(stages[:-1], 1):
        folder = Path(source) / f"{number}-{stage.name}"
        if folder.is_dir():
            check_recipe(str(folder), load_pretrained(str(folder)), stages, stage.name)
    return check_recipe(source, loaded, stages, stages[-1].name)
