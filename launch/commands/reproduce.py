"""`graftvit reproduce`: kits for published numbers, their surrogates, and rows of finished runs."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ...models.errors import ConfigError, RunFailedError, did_you_mean
from ..flags import command_parser, output_file, parse_command
from ..load_config import Setting, load_bench, load_compare, load_comparison, load_config, load_stages
from ..say import hint, say
from . import bench, compare, demo, programs
from .evaluate import SETTINGS

if TYPE_CHECKING:
    import argparse

    from ...checkpoints.provenance import Pretrained
    from ...transfer.bench_rows import Row
    from ...transfer.bench_run import Trial
    from ...transfer.engine.stages import Stage
    from ...transfer.kits import Kit, Student

EXAMPLES = (
    "graftvit reproduce                                             # the kits",
    "graftvit reproduce attention-copy                              # number, cost, commands",
    "graftvit reproduce attention-copy --surrogate --output_dir surrogates/attention",
    "graftvit reproduce attention-copy --row runs/attention-copy --data_path /data/imagenet --out rows.jsonl",
    "graftvit reproduce attention-copy --row downloaded --data_path /data/imagenet --verify rows.jsonl",
)


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
    _check_contrasts(kit, arguments.output_dir or Path("surrogate"))
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


def _check_contrasts(kit: Kit, folder: Path) -> None:
    """Raise ConfigError: a contrast names a student that the command does not train with two seeds."""
    from ...transfer.kits import common_seeds

    name, *words = shlex.split(kit.surrogate.command)
    students = COMMANDS[name].students([*words, "--output_dir", str(folder)])
    for contrast in kit.surrogate.contrasts:
        common_seeds(contrast, students)


def _run_surrogate(kit: Kit, folder: Path) -> int:
    from ...transfer.kits import judge

    name, *words = shlex.split(kit.surrogate.command)
    words += ["--output_dir", str(folder)]
    code: int = COMMANDS[name].module.run(words)
    if code:
        return code
    top1 = COMMANDS[name].scores(words, folder)
    for contrast in kit.surrogate.contrasts:
        say(f"{judge(contrast, top1)}\n")
    say(f"limits: {kit.surrogate.limits}\n")
    return 0


@dataclass(frozen=True)
class Command:
    """A command that may be a surrogate."""

    module: ModuleType
    students: Callable[[list[str]], list[Student]]
    """What it trains with some words."""
    scores: Callable[[list[str], Path], dict[Student, float]]
    """The top-1 of those that it left in its folder."""


def _students_of_demo(words: list[str]) -> list[Student]:
    """Return `scratch`, `copy/mae`, `ensemble/mae`, ... with each seed."""
    from ...transfer.analysis.demo import SEEDS, TOGETHER
    from ...transfer.analysis.demo_cells import STUDENTS

    return [(_name(*student), seed) for student in (*STUDENTS, TOGETHER) for seed in SEEDS]


def _scores_of_demo(words: list[str], folder: Path) -> dict[Student, float]:
    from ...transfer.analysis.demo import SEEDS, measure
    from ...transfer.analysis.demo_cells import DATA_SETS, demo_cells

    results = measure(demo_cells(folder.resolve(), SEEDS, quick=False), DATA_SETS["digits"], quick=False)
    return {
        (_name(each.method, each.teacher), seed): top1
        for each in results.methods
        for seed, top1 in zip(results.seeds, each.top1, strict=True)
    }


def _name(method: str, teacher: str | None) -> str:
    return "/".join(filter(None, (method, teacher)))


def _students_of_compare(words: list[str]) -> list[Student]:
    from ...transfer.analysis.compare.comparison_cells import list_cells

    arguments, _ = compare.parse(words)
    section = load_compare(arguments.config)
    cells = list_cells(section.plans, [0], teacher=True, seeds=section.seeds)
    return [(cell.name, cell.seed) for cell in compare.choose_cells(arguments, cells)]


def _scores_of_compare(words: list[str], folder: Path) -> dict[Student, float]:
    arguments, settings = compare.parse(words)
    records = load_comparison(arguments.config, settings).records()
    return {(each.name, each.seed): each.final.top1 for each in records if each.final is not None}


def _students_of_bench(words: list[str]) -> list[Student]:
    """Return programs, `softmax with` or `softmax without` the convolution, with each seed."""
    arguments, settings = bench.parse(words[2:], extends=False)
    trials = bench.choose_trials(arguments, load_bench(arguments.config, settings))
    return [(_name_program(trial), trial.seed) for trial in trials]


def _scores_of_bench(words: list[str], folder: Path) -> dict[Student, float]:
    from ...transfer.bench_rows import read_rows

    rows = read_rows(folder / bench.ROWS)
    return {(_name_program(row), row.seed): row.top1 for row in rows if row.top1 is not None}


def _name_program(of: Row | Trial) -> str:
    return f"{of.name or of.program} {'with' if of.local else 'without'}"


COMMANDS = {
    "demo": Command(demo, _students_of_demo, _scores_of_demo),
    "compare": Command(compare, _students_of_compare, _scores_of_compare),
    "programs": Command(programs, _students_of_bench, _scores_of_bench),
}


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
