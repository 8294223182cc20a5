"""`graftvit programs draw | check | search | bench`: attention programs, written as formulas."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from ...models.errors import ConfigError, did_you_mean
from ...transfer.analysis.report.tables import aligned
from ..flags import Action, command_parser, run_action, whole
from ..say import hint, say
from ..submitted import Work
from . import bench, search

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...models.programs.program_checks import Verdict

EXAMPLES = (
    "graftvit programs draw --count 200 --seed 1",
    "graftvit programs check attnzero_105",
    "graftvit programs check 'mm(softmax(q) mm(softmax(t(k)) v))'",
    *search.EXAMPLES[:1],
    *bench.EXAMPLES[:1],
)
WIDEST = 90
"""Characters of a reason in the table."""


def run(argv: list[str]) -> int:
    """Run one action."""
    return run_action("programs", argv, ACTIONS, EXAMPLES)


def check(argv: list[str], *, here: bool = True) -> Work:
    """Check the arguments of `search` and `bench`, the actions that can be submitted."""
    actions = {"search": search.check, "bench": bench.check}
    if (action := next(iter(argv), "")) not in actions:
        raise ConfigError(
            f"`{hint('programs', *argv[:1])}` cannot be submitted: of its actions only `search` and `bench` can"
        )
    return actions[action](argv[1:], here=here)


def _draw(argv: list[str]) -> int:
    """Print the outcome of checks of drawn programs."""
    parser = command_parser(
        "programs draw",
        "Draw attention programs, check each, and print those that pass and the reasons against the others.",
        EXAMPLES,
        "[--count N] [--seed S]",
    )
    parser.flag("--count", "programs to draw", type=whole(1, bench.MOST), default=100, metavar="N")
    parser.flag("--seed", "seed of the draws", type=int, default=0, metavar="S")
    arguments = parser.parse_args(argv)
    say(_format_survey(arguments.count, arguments.seed))
    return 0


def _check(argv: list[str]) -> int:
    """Print one program in all its forms."""
    parser = command_parser(
        "programs check",
        "Explain one attention program: its cost, LaTeX, PyTorch and the first check that it fails.",
        EXAMPLES,
        "PROGRAM",
    )
    parser.add_argument("program", metavar="PROGRAM", help="text of a program, or attnzero_...")
    say(_explain(parser.parse_args(argv).program))
    return 0


def _format_survey(count: int, seed: int) -> str:
    """Draw and check programs; return the table of refusals and the programs that pass."""
    from ...models.programs.drawing import draw_program
    from ...models.programs.program_checks import CHECKS, check, count_refusals

    random = Random(seed)
    verdicts = [check(draw_program(random)) for _ in range(count)]
    refused = count_refusals(verdicts)
    passed = [verdict for verdict in verdicts if verdict.passed]
    rows = [["check", "refused", "condition", "first reason"]]
    for each in CHECKS:
        reasons = refused[each.name]
        rows.append([each.name, str(len(reasons)), each.condition, _shorten(reasons)])
    running = count - len(refused[CHECKS[0].name])
    head = (
        f"{count:,} programs drawn with seed {seed}: {running:,} do not raise ({100 * running / count:.1f} %), "
        f"{len(passed):,} pass all checks ({100 * len(passed) / count:.1f} %)\n"
    )
    return "\n".join([head, aligned(rows, right=(1,)), *(verdict.name for verdict in passed), ""])


def _shorten(refused: Sequence[Verdict]) -> str:
    if not refused:
        return "-"
    reason = refused[0].reason
    return reason if len(reason) <= WIDEST else f"{reason[: WIDEST - 3]}..."


def _explain(text: str) -> str:
    """Return the canonical text, identity, cost, LaTeX, code and verdict of one program."""
    from ...models.programs.program import FOUND, latex, parse_program, torch_code
    from ...models.programs.program_checks import check as check_program
    from ...models.programs.value_map import why_no_map

    if text.startswith("attnzero") and text not in FOUND:
        raise ConfigError(f"unknown program {text!r}; {did_you_mean(text, FOUND)}")
    program = parse_program(FOUND.get(text, text))
    verdict = check_program(program)
    heads = "depends on other heads of the image" if program.mixes_heads else "is independent of other heads"
    why = why_no_map(program)
    has_map = f"none: {why}" if why else "the output of a head is M V"
    outcome = "passes all checks" if verdict.passed else f"fails {verdict.check}: {verdict.reason}"
    return (
        f"program   {program.text}\nhash      {program.hash}\nreads     {', '.join(program.inputs)}\n"
        f"products  {program.products} multiply-adds a head\nentries   {program.entries} a head\n"
        f"a head    {heads}\na map     {has_map}\nchecks    {outcome}\n\n"
        f"LaTeX\n{latex(program)}\n\nPyTorch\n{torch_code(program)}"
    )


ACTIONS = {
    "draw": Action("draw programs and check them", _draw),
    "check": Action("explain one program: cost, LaTeX, PyTorch, the first check that it fails", _check),
    "search": Action(
        "search for programs that take over a teacher's attention, without training", search.run
    ),
    "bench": Action("a benchmark of programs: run, extend, merge, query, verify", bench.run),
}
