"""The checks: for each a candidate that it is the first to refuse, and what passes all."""

from __future__ import annotations

import pytest
import torch
from graftvit.models.programs.genotypes import Genotype
from graftvit.models.programs.program import FOUND, LINEAR
from graftvit.models.programs.program_checks import CHECKS, Candidate, check, count_refusals
from torch import Tensor


def running_mean(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A function of the order of the tokens, which no program is."""
    places = torch.arange(1, q.shape[2] + 1, dtype=q.dtype)[:, None]
    return torch.tanh(q + (k * v).cumsum(2) / places)


TRIAL_105 = Genotype("i3n303", ((16,), (0, 13), (0, 25), (6,), (0,), (25, 0)), (6, 3, 2))
TRIAL_140 = Genotype("i3n302", ((16,), (15,), (0, 5), (9, 0), (20,), (25,)), (5, 5, 0))
OVERFLOWS = "l2(mul(exp(exp(add(one add(one one)))) mm(l2(q) l2(tn(k v)))))"
FIRST = {
    "types": ("mm(q k)", "mm is not defined for N×D and N×D"),
    "finite": ("add(mm(q tn(k v)) exp(exp(exp(q))))", "not finite for inputs of size 1"),
    "gradients": ("mm(q tn(sign(k) v))", "K gets no gradient"),
    "batch": (TRIAL_105, "an image alone gives another output than in a batch of three"),
    "sizes": (TRIAL_140, "with as many tokens as channels it is another formula"),
    "mixing": ("mul(add(q k) v)", "no token depends on another token"),
    "permutation": (Candidate("running mean", running_mean), "tokens in another order"),
    "cost": ("mm(softmax(nt(scale(q) k)) v)", "it costs 2 N^2 D multiply-adds"),
    "stability": ("mm(q tn(k v))", "from 49 to 9,216 tokens the size of the output changes by a factor of 13"),
    "triviality": ("add(q mul(log(one) mm(l2(q) l2(tn(k v)))))", "another K hardly changes the output"),
    "half": ("l2(mul(recip(log(one)) mm(q tn(k v))))", "computed in float16"),
    "training": ("mul(exp(exp(add(one one))) mm(l2(q) l2(tn(k v))))", "of the variance of softmax attention is left"),
}  # fmt: skip
"""For each check in its order, what it is the first to refuse. The batch, the sizes and the order of tokens cannot
matter to a program: here they do to AttnZero's code and to a function."""


def test_every_check_has_a_candidate_in_the_order_of_the_checks() -> None:
    assert list(FIRST) == [each.name for each in CHECKS]


@pytest.mark.parametrize("name", FIRST)
def test_a_check_refuses_first(name: str) -> None:
    source, reason = FIRST[name]
    verdict = check(source)
    assert (verdict.check, verdict.passed) == (name, False)
    assert reason in verdict.reason
    assert verdict.raised is (name == "types")
    assert check(source) == verdict, "a verdict does not change"


@pytest.mark.parametrize("text", [FOUND["attnzero_105"], FOUND["attnzero_140"], LINEAR])
def test_good_programs_pass(text: str) -> None:
    assert check(text).passed


@pytest.mark.parametrize(
    ("source", "name", "reason"),
    [
        ("q", "gradients", "K gets no gradient"),
        ("add(exp(mul(q q)) exp(mul(k k)))", "finite", "size 4"),
        (OVERFLOWS, "half", "computed in float16 the output is not finite"),
        (Genotype("i3n2", ((0,), (0,), (0,), (0,)), (3, 2)), "types", "cannot be computed"),
        (Genotype("i3n2", ((0,), (0,), (0,), (22,)), (0, 0)), "types", "is (1, 2, 2, 49, 16) and not"),
        (Genotype("i3n2", ((2, 11), (0,), (0,), (0,)), (0, 0)), "gradients", "no backward pass"),
        (Genotype("i3n305", ((20, 0), (0,), (0, 2), (14, 0), (6, 0), (0,)), (2, 0, 2)), "batch", "an image alone"),
        (Candidate("constant", lambda q, k, v: torch.ones_like(q)), "gradients", "no backward pass"),
    ],
)  # fmt: skip
def test_reasons_are_kept(source: str | Genotype | Candidate, name: str, reason: str) -> None:
    verdict = check(source)
    assert verdict.check == name
    assert reason in verdict.reason


def test_refusals_are_counted_in_the_order_of_the_checks() -> None:
    verdicts = [check(text) for text in ("q", "mm(q k)", "v", LINEAR)]
    counted = count_refusals(verdicts)
    assert list(counted) == [each.name for each in CHECKS]
    assert [len(counted[name]) for name in ("types", "finite", "gradients")] == [1, 0, 2]
    assert sum(map(len, counted.values())) == 3
