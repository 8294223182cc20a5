"""`graftvit programs [PROGRAM]`: draw attention programs and check them, or explain one."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from ...models.errors import ConfigError, did_you_mean
from ...transfer.analysis.report.tables import aligned
from ..flags import command_parser
from ..say import say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...models.programs.program_checks import Verdict

COUNT, MOST = 100, 100_000
WIDEST = 90
"""Characters of a reason in the table."""


def run(argv: list[str]) -> int:
    """Print the outcome of checks of drawn programs, or one program in all its forms."""
    parser = command_parser(
        "programs",
        "Draw attention programs, check each, and print the part that passes and the reasons against the others; or "
        "explain one program: its cost, LaTeX, PyTorch and the first check that it fails.",
        [
            "graftvit programs --count 200 --seed 1",
            "graftvit programs attnzero_105",
            "graftvit programs 'mm(softmax(q) mm(softmax(t(k)) v))'",
        ],
        usage="[PROGRAM] [--count N] [--seed S]",
    )
    parser.add_argument("program", nargs="?", metavar="PROGRAM", help="text of a program, or attnzero_...")
    parser.add_argument("--count", type=int, metavar="N", help=f"programs to draw (default: {COUNT})")
    parser.add_argument("--seed", type=int, metavar="S", help="seed of the draws (default: 0)")
    arguments = parser.parse_args(argv)
    program, count, seed = arguments.program, arguments.count, arguments.seed
    if program is not None and (count, seed) != (None, None):
        raise ConfigError(
            f"--count and --seed are of drawn programs: leave them out, or leave {program!r} out"
        )
    if count is not None and not 1 <= count <= MOST:
        raise ConfigError(f"--count {count}: give a number from 1 to {MOST:,}")
    say(_survey(count or COUNT, seed or 0) if program is None else _explained(program))
    return 0


def _survey(count: int, seed: int) -> str:
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
        rows.append([each.name, str(len(reasons)), each.condition, _cut(reasons)])
    running = count - len(refused[CHECKS[0].name])
    head = (
        f"{count:,} programs drawn with seed {seed}: {running:,} do not raise ({100 * running / count:.1f} %), "
        f"{len(passed):,} pass all checks ({100 * len(passed) / count:.1f} %)\n"
    )
    return "\n".join([head, aligned(rows, right=(1,)), *(verdict.name for verdict in passed), ""])


def _cut(refused: Sequence[Verdict]) -> str:
    if not refused:
        return "-"
    reason = refused[0].reason
    return reason if len(reason) <= WIDEST else f"{reason[: WIDEST - 3]}..."


def _explained(text: str) -> str:
    """Return the canonical text, identity, cost, LaTeX, code and verdict of one program."""
    from ...models.programs.program import FOUND, latex, parse_program, torch_code
    from ...models.programs.program_checks import check
    from ...models.programs.value_map import why_no_map

    if text.startswith("attnzero") and text not in FOUND:
        raise ConfigError(f"unknown program {text!r}; {did_you_mean(text, FOUND)}")
    program = parse_program(FOUND.get(text, text))
    verdict = check(program)
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
