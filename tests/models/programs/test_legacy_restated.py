"""Random genotypes of the whole index space: `run_legacy` against a restatement of AttnZero's operators in numpy."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from graftvit.models.programs.genotypes import BINARY, GRAPHS, UNARY, Genotype, run_legacy
from graftvit.models.programs.program import ProgramError
from support.models.attnzero_restated import BINARY as RESTATED_BINARY
from support.models.attnzero_restated import UNARY as RESTATED_UNARY
from support.models.attnzero_restated import Array, restated

SHAPES = [(3, 2, 21, 16), (1, 2, 21, 16), (2, 2, 8, 8), (3, 3, 3, 3)]
"""As published numbers have them, one image, and as many tokens as channels (as heads, as images)."""
VALID = 74


def draw(source: random.Random) -> Genotype:
    """A genotype with every operator as likely as any other, or mostly without unary operators."""
    graph = source.choice(list(GRAPHS))
    count = GRAPHS[graph].count(".")
    weights = [source.choice([1.0, 16.0]), *[1.0] * 27]
    chains = [tuple(source.choices(range(28), weights, k=source.randint(1, 3))) for _ in range(2 * count)]
    return Genotype(graph, tuple(chains), tuple(source.randrange(10) for _ in range(count)))


def drawn_inputs(shape: tuple[int, ...]) -> Array:
    inputs: Array = (
        np.random.default_rng(0).standard_normal((3, *shape))
        * np.array([1, 2, 0.5])[:, None, None, None, None]
    )
    inputs[0, :, :, 1] = inputs[1, 0, :, :, 0] = 0.0
    return inputs


def is_steady(genotype: Genotype, wanted: Array, bench: bool, shape: tuple[int, ...]) -> bool:
    """Return whether rounding cannot decide the numbers.

    Inputs that differ in the 13th digit, and a calculation with more digits, give the same.
    """
    inputs = drawn_inputs(shape)
    for seed in (1, 2):
        moved = inputs * (1 + 1e-13 * np.random.default_rng(seed).standard_normal(inputs.shape))
        more: Array = moved.astype(np.longdouble)
        again = restated(genotype.graph_type, genotype.unary_op, genotype.binary_op, *more, bench=bench)
        if not np.allclose(again.astype(float), wanted, rtol=1e-8, atol=1e-10, equal_nan=True):
            return False
    return True


def both(genotype: Genotype, shape: tuple[int, ...], bench: bool) -> tuple[Array | None, Array | None]:
    """What the two give; None where one raises."""
    inputs = drawn_inputs(shape)
    try:
        wanted = restated(genotype.graph_type, genotype.unary_op, genotype.binary_op, *inputs, bench=bench)
    except (ValueError, IndexError):
        wanted = None
    try:
        q, k, v = torch.from_numpy(inputs)
        found = run_legacy(genotype, q, k, v, bench=bench).numpy()
    except ProgramError:
        found = None
    return found, wanted


def test_the_restatement_has_every_operator() -> None:
    assert (list(RESTATED_UNARY), list(RESTATED_BINARY)) == (
        list(range(len(UNARY))),
        list(range(len(BINARY))),
    )


def compare(seed: int, wanted_count: int, shapes: list[tuple[int, ...]]) -> int:
    """Compare genotypes until as many have an output in each shape; return how many were drawn."""
    source, drawn = random.Random(seed), 0
    valid = dict.fromkeys(shapes, 0)
    while min(valid.values()) < wanted_count:
        genotype, drawn = draw(source), drawn + 1
        for shape in shapes:
            found, wanted = both(genotype, shape, bench=bool(drawn % 2))
            assert (found is None) == (wanted is None), (genotype, shape)
            if found is not None and wanted is not None:
                assert found.shape == wanted.shape, (genotype, shape)
                if not is_steady(genotype, wanted, bool(drawn % 2), shape):
                    continue
                np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-8, err_msg=str(genotype))
                valid[shape] += 1
    return drawn


@pytest.mark.filterwarnings("ignore:std():UserWarning")
def test_random_genotypes_give_the_restated_numbers() -> None:
    assert compare(0, VALID // 3, SHAPES[:2]) > VALID // 3


@pytest.mark.parametrize("bench", [False, True])
def test_a_chain_that_overwrites_what_another_reads_runs_in_the_order_of_the_code(bench: bool) -> None:
    genotype = Genotype("i3n301", ((10,), (0,), (19,), (0,), (4,), (0,)), (3, 2, 0))
    found, wanted = both(genotype, (3, 3, 3, 3), bench)
    other, _ = both(genotype, (3, 3, 3, 3), not bench)
    assert found is not None
    assert wanted is not None
    assert other is not None
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-8)
    assert np.abs(found - other).max() > 0.1  # where the operand is zero, operator 4 writes ones


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:std():UserWarning")
def test_many_random_genotypes_give_the_restated_numbers() -> None:
    assert compare(1, 2 * VALID, SHAPES) > 2 * VALID
