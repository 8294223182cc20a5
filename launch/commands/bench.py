"""`graftvit programs bench run | extend | merge | query | verify`: a benchmark of attention programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...models.errors import ConfigError, RunFailedError, counted
from ..flags import Action, Parser, command_parser, find_action, parse_command, run_action, whole
from ..say import hint, say, tell
from ..submitted import Work

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from ...transfer.bench_rows import Row
    from ...transfer.bench_run import Bench, Trial
    from ..load_config import Setting

EXAMPLES = (
    "graftvit programs bench query attnbench_digits --backbone plain --top 10   # rows that come with the package",
    "graftvit programs bench verify attnbench_digits --sample 3",
    "graftvit programs bench run attnbench_digits --drawn 50 --output_dir bench",
    "graftvit programs bench extend bench/rows.jsonl attnbench_digits --program attnzero_105 --output_dir more",
    "graftvit programs bench merge bench/rows.jsonl theirs.parquet --out all.jsonl",
)
DATA = ("data.data_path", "data.download", "data.workers", "engine.device")
ROWS = "rows.jsonl"
ROWS_HELP = "file of rows, .jsonl or .parquet, or a recipe that comes with rows: attnbench_digits"
LOCAL = {"both": (True, False), "with": (True,), "without": (False,)}
MOST = 100_000
"""Programs to draw at a time."""
SHORT = 70
"""Characters of a program in the table."""


def run(argv: list[str]) -> int:
    """Run one action."""
    return run_action("programs bench", argv, ACTIONS, EXAMPLES)


def _parser(action: str, usage: str) -> Parser:
    text = f"{ACTIONS[action].does}."
    return command_parser(f"programs bench {action}", text[0].upper() + text[1:], EXAMPLES, usage)


def _add_choices(parser: Parser) -> None:
    """Add the flags that choose rows."""
    parser.flag("--backbone", "only this model", action="append", default=[], metavar="NAME")
    parser.flag("--data", "only this data set", action="append", default=[], metavar="NAME")
    parser.flag("--local", "with or without the convolution", choices=list(LOCAL), default="both")


def _run(argv: list[str]) -> int:
    return _train(argv, extends=False)


def _extend(argv: list[str]) -> int:
    return _train(argv, extends=True)


def check(argv: list[str], *, here: bool = True) -> Work:
    """Check the arguments of `run` and `extend`, the actions that train."""
    action, words = find_action(argv, ACTIONS)
    if action not in ("run", "extend"):
        raise ConfigError(f"`{hint('programs', 'bench', action)}` takes seconds: run it here")
    arguments, settings = parse(words, extends=action == "extend")
    if here:
        from ..load_config import load_bench, load_rows

        load_bench(arguments.config, settings)
        if action == "extend":
            load_rows(arguments.rows)
    return Work(arguments.output_dir, workers=arguments.processes - 1)


def parse(argv: Sequence[str], *, extends: bool) -> tuple[argparse.Namespace, list[Setting]]:
    """Parse the arguments of a training of models with programs."""
    usage = "CONFIG --output_dir DIR [--flag value ...]"
    parser = _parser("extend", f"ROWS {usage}") if extends else _parser("run", usage)
    if extends:
        parser.add_argument("rows", metavar="ROWS", type=Path, help=ROWS_HELP)
    parser.add_argument("config", metavar="CONFIG", help="recipe or YAML file with a section 'attnbench'")
    parser.output_dir("folder of records and rows", required=True)
    text = "a program, or attnzero_..., beside the controls"
    parser.flag("--program", text, action="append", default=[], metavar="TEXT")
    parser.flag("--drawn", "programs to draw", type=whole(0, MOST), default=0, metavar="N")
    parser.flag("--draw_seed", "seed of the draws", type=int, default=0, metavar="S")
    parser.flag(
        "--seeds",
        "seeds of the trainings",
        type=whole(0, (1 << 63) - 1),
        nargs="+",
        default=[0],
        metavar="SEED",
    )
    parser.flag("--processes", "programs at a time", type=whole(1), default=1, metavar="N")
    parser.flag(
        "--threads", "threads of a training; changes the rounding", type=whole(1), default=1, metavar="N"
    )
    _add_choices(parser)
    return parse_command(parser, argv, only=DATA)


def _train(argv: list[str], *, extends: bool) -> int:
    """Train models with programs, and write the rows."""
    arguments, settings = parse(argv, extends=extends)
    from ...transfer.bench_rows import merge_rows, write_rows
    from ..load_config import load_rows

    known = load_rows(arguments.rows) if extends else []
    rows = merge_rows([known, _run_new(arguments, settings, known)])
    write_rows(rows, arguments.output_dir / ROWS)
    say(f"{_format_table(rows, 10)}\n{arguments.output_dir / ROWS}: {counted(len(rows), 'row')}\n")
    return 0


def choose_trials(arguments: argparse.Namespace, bench: Bench) -> list[Trial]:
    """Return the trials of the programs, seeds, models and data that the flags of `run` choose."""
    from ...transfer.bench_run import list_programs

    return bench.trials(
        list_programs(arguments.program, arguments.drawn, arguments.draw_seed),
        list(dict.fromkeys(arguments.seeds)),
        arguments.backbone,
        arguments.data,
        LOCAL[arguments.local],
    )


def _run_new(arguments: argparse.Namespace, settings: list[Setting], known: Sequence[Row]) -> list[Row]:
    """Run the trials that have no known row."""
    from ...transfer.bench_run import run_bench
    from ..load_config import load_bench

    bench = load_bench(arguments.config, settings)
    there = {row.key for row in known}
    new = [
        trial
        for trial in choose_trials(arguments, bench)
        if (
            trial.data, trial.backbone, trial.hash, trial.seed, trial.local, bench.digest(trial.backbone, trial.data)
        ) not in there
    ]  # fmt: skip
    how = {"processes": arguments.processes, "threads": arguments.threads}
    return run_bench(bench, new, arguments.output_dir, tell=tell, **how)


def _merge(argv: list[str]) -> int:
    parser = _parser("merge", "ROWS ROWS ... --out FILE")
    parser.add_argument("rows", metavar="ROWS", type=Path, nargs="+", help=ROWS_HELP)
    parser.flag("--out", "file to write: .jsonl or .parquet", type=Path, required=True, metavar="FILE")
    arguments = parser.parse_args(argv)
    from ...transfer.bench_rows import merge_rows, write_rows
    from ..load_config import load_rows

    rows = merge_rows(load_rows(path) for path in arguments.rows)
    write_rows(rows, arguments.out)
    say(f"{arguments.out}: {counted(len(rows), 'row')}\n")
    return 0


def _query(argv: list[str]) -> int:
    parser = _parser("query", "ROWS [--flag value ...]")
    _add_source(parser)
    _add_choices(parser)
    parser.flag("--status", "only rows of this status", choices=["trained", "refused", "failed"])
    parser.flag("--top", "rows to print; 0 for all", type=whole(0), default=20, metavar="N")
    parser.switch("--json", "print JSON Lines in place of a table")
    arguments = parser.parse_args(argv)
    from ...transfer.bench_rows import best_first, row_text

    rows = best_first([row for row in _choose_rows(arguments) if arguments.status in (None, row.status)])
    shown = rows[: arguments.top or len(rows)]
    if arguments.json:
        say("".join(row_text(row) for row in shown))
        return 0
    say(f"{_format_table(rows, arguments.top or len(rows))}{len(shown)} of {counted(len(rows), 'row')}\n")
    return 0


def _choose_rows(arguments: argparse.Namespace) -> list[Row]:
    """Return the rows of a file that the flags choose. Raises ConfigError: there are none."""
    from ..load_config import load_rows

    rows = [row for row in load_rows(arguments.rows) if _is_chosen(row, arguments)]
    if not rows:
        raise ConfigError(
            f"{arguments.rows} has no row that --program, --backbone, --data and --local choose"
        )
    return rows


def _is_chosen(row: Row, arguments: argparse.Namespace) -> bool:
    return (
        (not arguments.backbone or row.backbone in arguments.backbone)
        and (not arguments.data or row.data in arguments.data)
        and row.local in LOCAL[arguments.local]
        and arguments.program in (None, row.program, row.name, row.hash)
    )


def _verify(argv: list[str]) -> int:
    parser = _parser("verify", "ROWS [--sample N] [--flag value ...]")
    _add_source(parser)
    _add_choices(parser)
    parser.flag("--sample", "rows to run again", type=whole(1), default=5, metavar="N")
    parser.flag("--sample_seed", "seed of the choice", type=int, default=0, metavar="S")
    text = "the file that the rows were made with (default: their recipe, if it comes with the package)"
    parser.flag("--config", text, metavar="CONFIG")
    arguments, settings = parse_command(parser, argv, only=DATA)
    from ...transfer.bench_run import pick_sample, verify_rows
    from ..load_config import load_bench, recipe_names

    differ, sample = [], pick_sample(_choose_rows(arguments), arguments.sample, arguments.sample_seed)
    for recipe in dict.fromkeys(row.recipe for row in sample):
        if not arguments.config and recipe not in recipe_names():  # a row must not choose what runs here
            raise ConfigError(
                f"{arguments.rows} names the recipe {recipe!r}, which does not come with the package: give the file "
                "that its rows were made with as --config"
            )
        bench = load_bench(arguments.config or recipe, settings)
        differ += verify_rows(bench, [row for row in sample if row.recipe == recipe], tell)
    if differ:
        raise RunFailedError(f"{len(differ)} of {counted(len(sample), 'row')} differ: {'; '.join(differ)}")
    say(f"{counted(len(sample), 'row')} agree{'s' if len(sample) == 1 else ''}\n")
    return 0


def _add_source(parser: Parser) -> None:
    parser.add_argument("rows", metavar="ROWS", type=Path, help=ROWS_HELP)
    parser.flag("--program", "only this program: its text, its name or its hash", metavar="TEXT")


def _format_table(rows: Sequence[Row], count: int) -> str:
    """Return the best rows as a table."""
    from ...transfer.analysis.report.tables import aligned
    from ...transfer.bench_rows import best_first

    table = [
        ["top-1", "model", "data", "seed", "convolution", "parameters", "multiply-adds", "ms", "program"]
    ]
    for row in best_first(rows)[:count]:
        top1 = row.status if row.top1 is None else f"{row.top1:.2f}"
        cost = [
            _format_number(row.parameters),
            _format_number(row.macs),
            "-" if row.latency is None else f"{row.latency:g}",
        ]
        text = row.program if len(row.program) <= SHORT else f"{row.program[: SHORT - 3]}..."
        program = f"{row.name}: {text}" if row.name else text
        convolution = "with" if row.local else "without"
        table.append([top1, row.backbone, row.data, str(row.seed), convolution, *cost, program])
    return aligned(table, right=(0, 3, 5, 6, 7))


def _format_number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


ACTIONS = {
    "run": Action("train small models with each program, and write a row for each training", _run),
    "extend": Action(
        "the same, for the programs, models and seeds that a file of rows does not have yet", _extend
    ),
    "merge": Action("write the rows of several files as one; rows of the same training must agree", _merge),
    "query": Action("print the rows of a file as a table, the best first", _query),
    "verify": Action("run some rows of a file again, and compare", _verify),
}
