"""Checks of candidates in a fixed order; a candidate is refused by the first that it fails, and the reason is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from . import program_probes as probes
from .early_training import untrainable
from .legacy import Genotype
from .program import Program, ProgramError
from .program_probes import Candidate, candidate_of
from .program_text import parse_program


@dataclass(frozen=True)
class Check:
    """A condition, and the probe that returns the reason against a candidate."""

    name: str
    condition: str
    probe: Callable[[Candidate], str]


CHECKS = (
    Check("types", "it is well formed, and its output is N×D", probes.wrong_shape),
    Check("finite", "outputs are finite for three seeds and sizes 0.1, 1 and 4", probes.not_finite),
    Check("gradients", "Q, K and V get finite gradients that are not zero", probes.bad_gradient),
    Check("batch", "an image gives the same alone and in a batch", probes.batch_dependent),
    Check("sizes", "it is the same formula where N = D", probes.other_formula),
    Check("mixing", "tokens depend on other tokens", probes.no_mixing),
    Check("permutation", "tokens in another order give the outputs in that order", probes.order_dependent),
    Check("cost", "time and memory are linear in N", probes.too_expensive),
    Check(
        "stability",
        "the size of the output changes by a factor between 0.1 and 10 from 49 to 9,216 tokens",
        probes.unstable,
    ),
    Check("triviality", "another Q, K or V changes the output", probes.trivial),
    Check("half", "float16 and bfloat16 agree with float32", probes.imprecise),
    Check("training", "a small layer learns softmax attention in 60 steps", untrainable),
)


@dataclass(frozen=True)
class Verdict:
    """The outcome for one candidate: the check that refused it and why; both are empty if it passed."""

    name: str
    check: str = ""
    reason: str = ""

    @property
    def passed(self) -> bool:
        return not self.check

    @property
    def raised(self) -> bool:
        """Return whether it could not be computed at all."""
        return self.check == CHECKS[0].name


def check(source: str | Program | Genotype | Candidate, checks: Sequence[Check] = CHECKS) -> Verdict:
    """Check the text of a program, a program, a genotype as AttnZero's code runs it, or another candidate."""
    if isinstance(source, str):
        try:
            source = parse_program(source)
        except ProgramError as error:
            return Verdict(str(source), CHECKS[0].name, str(error))
    candidate = source if isinstance(source, Candidate) else candidate_of(source)
    for each in checks:
        reason = each.probe(candidate)
        if reason:
            return Verdict(candidate.name, each.name, reason)
    return Verdict(candidate.name)


def count_refusals(verdicts: Iterable[Verdict]) -> dict[str, list[Verdict]]:
    """Return the refused candidates by check, in the order of the checks."""
    refused: dict[str, list[Verdict]] = {each.name: [] for each in CHECKS}
    for verdict in verdicts:
        if not verdict.passed:
            refused[verdict.check].append(verdict)
    return refused
