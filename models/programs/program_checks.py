"""Checks of candidates in a fixed order; a candidate is refused by the first that it fails, and the reason is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
import torch.nn.functional as F
from torch import Tensor

from .genotypes import Genotype, import_genotype, run_legacy
from .program import INPUTS, Program, ProgramError, parse_program

# What a candidate for attention must withstand: each probe returns a reason against it, or an empty text.
#
# A candidate is a program, a genotype as AttnZero's code runs it, or any function of q, k and v. A program is
# independent of the batch, names its contractions and treats tokens alike by construction; the others need
# not.

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
HEADS, WIDTH = 2, 16
SCALES = (0.1, 1.0, 4.0)
SEEDS = (0, 1, 2)
FEW, MANY = 49, 9_216
FAST_GROWTH = 10.0
"""Between `FEW` and `MANY` tokens; a sum of independent terms grows by 13.7."""
HARDLY = 1e-3
ROUNDING = 0.2
"""Relative error in half precision."""


@dataclass(frozen=True)
class Candidate:
    """A function of q, k and v (B, H, N, D), with the program that it is meant to be, if there is one."""

    name: str
    run: Run
    program: Program | None = None


def candidate_of(source: Program | Genotype) -> Candidate:
    """Return the candidate of a program, or of a genotype as AttnZero's code runs it."""
    if isinstance(source, Program):
        return Candidate(source.text, lambda q, k, v: source(q=q, k=k, v=v), source)
    try:
        program = import_genotype(source)
    except ProgramError:
        program = None
    return Candidate(str(source.described()), lambda q, k, v: run_legacy(source, q, k, v), program)


def draw(
    seed: int, tokens: int = FEW, width: int = WIDTH, batch: int = 2, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Return q, k and v with normal entries."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, batch, HEADS, tokens, width, generator=generator, dtype=torch.float64)
    return list(x.to(dtype).unbind(0))


def distance(out: Tensor, wanted: Tensor) -> float:
    """Return ‖out − wanted‖ / ‖wanted‖."""
    wanted = wanted.double()
    return float((out.double() - wanted).norm() / wanted.norm().clamp_min(1e-300))


def wrong_shape(candidate: Candidate) -> str:
    q, k, v = draw(0)
    try:
        shape = candidate.run(q, k, v).shape
    except ProgramError as error:
        return str(error)
    return "" if shape == q.shape else f"the output is {tuple(shape)} and not {tuple(q.shape)}"


def not_finite(candidate: Candidate) -> str:
    for scale in SCALES:
        for seed in SEEDS:
            out = candidate.run(*(scale * x for x in draw(seed, dtype=torch.float32)))
            if not out.isfinite().all():
                return f"the output is not finite for inputs of size {scale:g}"
    return ""


def bad_gradient(candidate: Candidate) -> str:
    inputs = [x.requires_grad_() for x in draw(0)]
    try:
        out = candidate.run(*inputs)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        gradients = torch.autograd.grad(out, inputs, upstream, allow_unused=True)
    except RuntimeError as error:  # no input has a gradient, or an operand was overwritten
        return f"there is no backward pass: {str(error).splitlines()[0]}"
    for name, gradient in zip(INPUTS, gradients, strict=True):
        if gradient is None or not gradient.any():
            return f"{name.upper()} gets no gradient"
        if not gradient.isfinite().all():
            return f"the gradient of {name.upper()} is not finite"
    return ""


def batch_dependent(candidate: Candidate) -> str:
    inputs = draw(0, batch=3)
    whole = candidate.run(*inputs)
    for image in range(3):
        alone = candidate.run(*(x[image : image + 1] for x in inputs))
        if (far := distance(alone, whole[image : image + 1])) > 1e-9:
            return f"an image alone gives another output than in a batch of three, by {far:.1e}"
    return ""


def other_formula(candidate: Candidate) -> str:
    if candidate.program is None:
        return ""
    q, k, v = draw(0, tokens=WIDTH, batch=1)
    far = distance(candidate.run(q, k, v), candidate.program(q=q, k=k, v=v))
    return f"with as many tokens as channels it is another formula, by {far:.1e}" if far > 1e-9 else ""


def no_mixing(candidate: Candidate) -> str:
    inputs, others = draw(0), draw(1)
    changed = [torch.cat((new[:, :, :1], x[:, :, 1:]), 2) for x, new in zip(inputs, others, strict=True)]
    out, new = (candidate.run(*each)[:, :, 1:] for each in (inputs, changed))
    return "" if distance(new, out) > 1e-13 else "no token depends on another token"


def order_dependent(candidate: Candidate) -> str:
    inputs = draw(0)
    order = torch.randperm(FEW, generator=torch.Generator().manual_seed(0))
    far = distance(candidate.run(*(x[:, :, order] for x in inputs)), candidate.run(*inputs)[:, :, order])
    return f"tokens in another order give another output, by {far:.1e}" if far > 1e-8 else ""


def too_expensive(candidate: Candidate) -> str:
    program = candidate.program
    if program is None or program.order <= 1:
        return ""
    return f"it costs {program.products} multiply-adds and {program.entries} entries a head"


def unstable(candidate: Candidate) -> str:
    sizes = []
    for tokens in (FEW, MANY):
        q, k, v = draw(0, tokens, batch=1, dtype=torch.float32)
        sizes.append(float(candidate.run(q, k, v + 1).square().mean().sqrt()))
    growth = sizes[1] / max(sizes[0], 1e-30)
    if 1 / FAST_GROWTH <= growth <= FAST_GROWTH:
        return ""
    return f"from {FEW} to {MANY:,} tokens the size of the output changes by a factor of {growth:.2g}"


def trivial(candidate: Candidate) -> str:
    inputs, others = draw(0), draw(1)
    out = candidate.run(*inputs)
    for index, name in enumerate(INPUTS):
        changed = [*inputs[:index], others[index], *inputs[index + 1 :]]
        if distance(candidate.run(*changed), out) < HARDLY:
            return f"another {name.upper()} hardly changes the output"
    return ""


def imprecise(candidate: Candidate) -> str:
    inputs = draw(0, tokens=196)
    for dtype, name in ((torch.float16, "float16"), (torch.bfloat16, "bfloat16")):
        rounded = [x.to(dtype) for x in inputs]
        far = distance(candidate.run(*rounded), candidate.run(*(x.float() for x in rounded)))
        if not isfinite(far):
            return f"computed in {name} the output is not finite"
        if far > ROUNDING:
            return f"computed in {name} the output is off by {far:.1e}"
    return ""


# A short training: can the projections around a candidate learn what softmax attention computes?

IMAGES, TOKENS, CHANNELS = 16, 12, 16
STEPS, LEARNING_RATE = 60, 1e-2
FLOOR = 0.9
"""The part of the variance that may be left."""


def untrainable(candidate: Candidate) -> str:
    """Train the four projections of one layer to give the output of a layer of softmax attention."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(IMAGES, TOKENS, CHANNELS, generator=generator)
    teacher, student = torch.randn(2, 4, CHANNELS, CHANNELS, generator=generator) / CHANNELS**0.5
    wanted = _layer(F.scaled_dot_product_attention, teacher, x)
    weights = student.clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=LEARNING_RATE)
    left = torch.tensor(torch.inf)
    for _ in range(STEPS):
        loss = (_layer(candidate.run, weights, x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        left = loss.detach() / wanted.var()
    if float(left) < FLOOR:
        return ""
    return f"after {STEPS} steps {float(left):.2g} of the variance of softmax attention is left"


def _layer(run: Run, weights: Tensor, x: Tensor) -> Tensor:
    """Return the output of a layer with the projections `weights` (4, C, C) for tokens (B, N, C)."""
    q, k, v = ((x @ weight).unflatten(2, (HEADS, -1)).transpose(1, 2) for weight in weights[:3])
    return run(q, k, v).transpose(1, 2).flatten(2) @ weights[3]


@dataclass(frozen=True)
class Check:
    """A condition, and the probe that returns the reason against a candidate."""

    name: str
    condition: str
    probe: Callable[[Candidate], str]


CHECKS = (
    Check("types", "it is well formed, and its output is N×D", wrong_shape),
    Check("finite", "outputs are finite for three seeds and sizes 0.1, 1 and 4", not_finite),
    Check("gradients", "Q, K and V get finite gradients that are not zero", bad_gradient),
    Check("batch", "an image gives the same alone and in a batch", batch_dependent),
    Check("sizes", "it is the same formula where N = D", other_formula),
    Check("mixing", "tokens depend on other tokens", no_mixing),
    Check("permutation", "tokens in another order give the outputs in that order", order_dependent),
    Check("cost", "time and memory are linear in N", too_expensive),
    Check(
        "stability",
        "the size of the output changes by a factor between 0.1 and 10 from 49 to 9,216 tokens",
        unstable,
    ),
    Check("triviality", "another Q, K or V changes the output", trivial),
    Check("half", "float16 and bfloat16 agree with float32", imprecise),
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
