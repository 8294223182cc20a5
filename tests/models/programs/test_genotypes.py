"""Genotypes of AttnZero's code: its numbers, their programs, and the way back.

legacy_results.json has what that code (its imagenet/autoatten/operators) gave in float64 for the inputs below: shape,
finite entries, and three sums. Its first 16 rows are the published modules, elu + 1 and softmax; the others are draws
of its sampler that do not raise, outputs of odd shapes included.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graftvit.models.programs.genotypes import (
    BINARY,
    GRAPHS,
    UNARY,
    Genotype,
    export_program,
    import_genotype,
    run_legacy,
)
from graftvit.models.programs.program import FOUND, LINEAR, Program, ProgramError, parse_program
from support.models.attnzero_restated import BINARY as RESTATED_BINARY
from support.models.attnzero_restated import UNARY as RESTATED_UNARY
from support.models.attnzero_restated import Array, restated
from torch import Tensor

RESULTS: list[dict[str, Any]] = json.loads(Path(__file__).with_name("legacy_results.json").read_text())
NAMES = [
    "105", "140", "20", "25", "34", "40", "76", "80", "174", "228", "240", "272", "bench_1", "bench_2",
    "linear", "softmax",
]  # fmt: skip
PUBLISHED = {name: Genotype.read(row) for name, row in zip(NAMES, RESULTS, strict=False)}
SHAPE = (3, 2, 21, 16)


def inputs(shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    steps = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return [(steps * factor).sin().reshape(shape) * 1.7 for factor in (0.7, 1.1, 1.9)]


def typed(genotype: Genotype) -> Program | None:
    try:
        return import_genotype(genotype)
    except ProgramError:
        return None


@pytest.mark.parametrize("row", RESULTS, ids=lambda row: f"{row['graph_type']}-{row['binary_op']}")
def test_legacy_gives_the_numbers_of_attnzeros_code(row: dict[str, Any]) -> None:
    out = run_legacy(Genotype.read(row), *inputs())
    finite = out.isfinite()
    kept, steps = torch.where(finite, out, 0), torch.arange(out.numel(), dtype=torch.float64)
    sums = [kept.sum(), (kept * (steps * 0.3).cos().reshape(out.shape)).sum(), kept.abs().max()]
    assert list(out.shape) == row["shape"]
    assert int(finite.sum()) == row["finite"]
    for found, wanted in zip(sums, row["sums"], strict=True):
        assert float(found) == pytest.approx(wanted, rel=1e-7, abs=1e-7 * row["sums"][2] * out.numel() ** 0.5)


def z(x: Tensor) -> Tensor:
    return (x - x.mean()) / x.std()


def mm(x: Tensor) -> Tensor:
    return (x - x.min()) / (x.max() - x.min() + 1e-9)


def norm(x: Tensor, dim: int) -> Tensor:
    return x / x.norm(dim=dim, keepdim=True).clamp_min(1e-12)


def test_the_trials_are_their_published_formulas() -> None:
    q, k, v = inputs()
    b, d, phi = 3, 16, F.elu(k) + 1
    product = mm(v).transpose(2, 3) @ phi
    gathered = phi.transpose(2, 3) @ (v * d**-0.5)
    added = norm(q + norm(F.relu(k).sigmoid() + F.softsign(v), -2), -2)
    logs = torch.where(k == 0, 1, k.abs()).log()
    formulas = {
        "105": q * norm(norm(q, -1) @ z(product), -1),
        "140": norm(q, -2) + norm(v.abs() @ gathered.sigmoid().transpose(2, 3), -1),
        "20": (q.sigmoid() * k * F.softsign(v))[None],
        "25": (1 - (q * k.sign()).sigmoid()) * norm(v, -1),
        "34": z(norm(k, -2) * v) * (q.softmax(-1) + v.sign()),
        "40": q[..., None],
        "76": F.relu(q) + (-(b**0.5) * q * d**-0.5).softmax(-1),
        "80": v * d**-0.5,
        "228": (q + k).sigmoid() * (1 - v.sigmoid()),
        "240": added @ norm(v.transpose(2, 3) @ added, -2).transpose(2, 3),
        "272": F.softsign(q) + (v @ (v.transpose(2, 3) @ logs).sign().transpose(2, 3)).softmax(-1),
        "bench_1": F.elu(q) + 1 - b,
        "softmax": F.scaled_dot_product_attention(q, k, v),
    }
    for name, wanted in formulas.items():
        torch.testing.assert_close(run_legacy(PUBLISHED[name], q, k, v), wanted, msg=name)


LEFT_OUT = {  # formula: why its genotype gives other numbers
    "add(l2(one) sigmoid(q))": "it compares zeros with zeros",
    "mul(add(minmax(one) minmax(v)) sumnorm(minmax(one)))": "0 / 0, and the dimensions of a constant are not exported",
}
TYPED = [row for row in RESULTS if (program := typed(Genotype.read(row))) and program.text not in LEFT_OUT]


@pytest.mark.parametrize("row", TYPED, ids=lambda row: f"{row['graph_type']}-{row['binary_op']}")
def test_a_program_is_its_genotype_for_one_image(row: dict[str, Any]) -> None:
    """Also for other heads, widths and tokens than the numbers above have."""
    genotype = Genotype.read(row)
    program = import_genotype(genotype)
    for shape in ((1, 2, 21, 16), (1, 3, 8, 5), (1, 1, 4, 9)):
        q, k, v = inputs(shape)
        legacy = run_legacy(genotype, q, k, v)
        out = program(q=q, k=k, v=v)
        finite = legacy.isfinite()
        assert out.shape == legacy.shape
        torch.testing.assert_close(out[finite], legacy[finite], rtol=1e-9, atol=1e-9)
    assert import_genotype(export_program(program)) == program


def test_a_fair_part_of_the_numbers_has_a_program() -> None:
    assert sum(typed(Genotype.read(row)) is not None for row in RESULTS) == 28


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("20", "40")])
def test_the_found_programs_are_the_published_genotypes(name: str) -> None:
    code = {"linear": LINEAR, "softmax": "mm(softmax(nt(scale(q) k)) v)"}.get(name) or FOUND[
        f"attnzero_{name}"
    ]
    assert import_genotype(PUBLISHED[name]).text == parse_program(code).text == code


@pytest.mark.parametrize("name", ["105", "34"])
def test_legacy_depends_on_the_batch_and_a_program_does_not(name: str) -> None:
    q, k, v = inputs()
    one = [x[:1] for x in (q, k, v)]
    assert not torch.allclose(run_legacy(PUBLISHED[name], q, k, v)[:1], run_legacy(PUBLISHED[name], *one))
    program = import_genotype(PUBLISHED[name])
    whole, alone = program(q=q, k=k, v=v)[:1], program(**dict(zip("qkv", one, strict=True)))
    torch.testing.assert_close(whole, alone, rtol=1e-12, atol=1e-12)


def test_legacy_changes_its_formula_where_tokens_are_as_many_as_channels() -> None:
    """The hazard of contractions that are chosen by sizes; a program names them."""
    q, k, v = inputs((1, 2, 16, 16))
    legacy = run_legacy(PUBLISHED["140"], q, k, v)
    program = import_genotype(PUBLISHED["140"])
    assert not torch.allclose(legacy, program(q=q, k=k, v=v))
    gathered = (F.elu(k) + 1).transpose(2, 3) @ (v * 0.25)
    torch.testing.assert_close(
        program(q=q, k=k, v=v), norm(q, -2) + norm(v.abs() @ gathered.sigmoid().transpose(2, 3), -1)
    )


def genotype(graph: str, unary: list[list[int]], binary: list[int]) -> Genotype:
    return Genotype.read({"graph_type": graph, "unary_op": unary, "binary_op": binary})


def test_what_overwrites_its_operand_shows_in_the_graph_that_reads_it_again() -> None:
    one = genotype("i3n301", [[0], [0], [0], [0], [11], [0]], [0, 0, 2])
    q, k, v = inputs()
    clipped = F.relu(q + k)
    torch.testing.assert_close(run_legacy(one, q, k, v), (clipped + v) * clipped.sqrt())
    torch.testing.assert_close(run_legacy(one, q, k, v, bench=True), (q + k + v) * clipped.sqrt())
    assert torch.equal(q, inputs()[0]), "the inputs stay"
    program = import_genotype(one)
    torch.testing.assert_close(program(q=q, k=k, v=v), run_legacy(one, q, k, v))


@pytest.mark.parametrize(
    "unary",
    [
        [[0], [0], [0], [5], [1, 11, 6], [0]],  # overwritten through a transpose, read after it
        [[0], [0], [0], [11, 15], [1], [0]],  # a transpose of what the other chain overwrites
        [[9], [9], [0], [7], [27, 11, 21], [0]],  # the result of 27 is its operand
        [[9], [9], [0], [27, 15], [1, 27], [0]],
        [[0], [0], [0], [21, 11], [7], [0]],  # 11 overwrites a copy
        [[9], [0], [0], [9], [0], [4]],  # nothing reads the product again
    ],
)
def test_a_program_follows_memory_that_is_overwritten_through_views(unary: list[list[int]]) -> None:
    one = genotype("i3n301", unary, [5, 5, 5])
    q, k, v = inputs((1, 2, 21, 16))
    torch.testing.assert_close(import_genotype(one)(q=q, k=k, v=v), run_legacy(one, q, k, v))


def test_a_program_follows_a_vector_that_is_overwritten_as_a_column() -> None:
    one = genotype("i3n301", [[9], [9], [0], [18], [27, 18], [0]], [1, 2, 0])
    q, k, v = inputs((1, 2, 21, 16))
    torch.testing.assert_close(import_genotype(one)(q=q, k=k, v=v), run_legacy(one, q, k, v))


def test_the_score_of_a_transpose_stays_in_its_memory_order() -> None:
    """Later sums run in that order: where they cancel, as in AttnZero's code, another order is another number."""
    x = inputs()[0].transpose(2, 3)
    assert UNARY[6](x).stride() == x.stride()


@pytest.mark.parametrize(("unary", "binary", "reason"), [
    ([[9, 22], [0], [0], [0]], [2, 2], "22 of a matrix puts a dimension before the batch"),
    ([[18], [0], [0], [0]], [2, 2], "18 of a matrix adds a fifth dimension"),
    ([[0], [0], [23], [0]], [2, 2], "23 of a matrix takes the dimension of the heads away"),
    ([[17, 24], [0], [0], [0]], [2, 2], "24 of a vector has a width of 192"),
    ([[17, 20], [0], [0], [0]], [2, 2], "20 of a vector normalizes over heads"),
    ([[17, 15], [0], [0], [0]], [2, 2], "15 of a vector raises"),
    ([[0], [0], [0], [6]], [4, 2], "6 of a constant of 0 dimensions has no deviation"),
    ([[3, 14], [0], [0], [0]], [2, 2], "14 turns into 0 what is NaN in that code"),
    ([[0], [0], [0], [3, 9, 6]], [2, 2], "6 turns into 0 what is NaN in that code"),
    ([[0], [0], [0], [0]], [3, 2], "mm is not defined for N×D and N×D"),
    ([[17], [0], [0], [0]], [2, 2], "binary operator 2 of a vector D×1 and a matrix N×D"),
    ([[0], [0], [0], [0]], [2, 5], "a program gives N×D, and this one gives D×D"),
    ([[0], [0], [0], [0]], [2, 1], "the output is a vector"),
])  # fmt: skip
def test_a_genotype_without_a_program(unary: list[list[int]], binary: list[int], reason: str) -> None:
    with pytest.raises(ProgramError) as caught:
        import_genotype(genotype("i3n2", unary, binary))
    assert reason in str(caught.value)


NESTED: list[Any] = []
for _ in range(10_000):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"graph_type": "i3n9", "unary_op": [], "binary_op": []}, "unknown graph 'i3n9'; did you mean"),
        ({"graph_type": "i3n2", "unary_op": [[0]], "binary_op": [0, 0]}, "takes 4 unary chains and 2 binary"),
        (
            {"graph_type": "i3n2", "unary_op": [[28], [0], [0], [0]], "binary_op": [0, 0]},
            "numbers from 0 to 27",
        ),
        (
            {"graph_type": "i3n2", "unary_op": [[0], [0], [0], [0]], "binary_op": [0, 10]},
            "numbers from 0 to 9",
        ),
        (
            {"graph_type": "i3n2", "unary_op": [[0] * 17, [0], [0], [0]], "binary_op": [0, 0]},
            "up to 16 numbers",
        ),
        (
            {"graph_type": "i3n2", "unary_op": [True, [0], [0], [0]], "binary_op": [0, 0]},
            "a genotype has graph_type",
        ),
        ({"graph_type": "i3n2", "binary_op": [0, 0]}, "a genotype has graph_type"),
        ({"graph_type": {}, "unary_op": [[0]] * 4, "binary_op": [0, 0]}, "unknown graph {}; valid: i3n2"),
        ({"graph_type": "i3n2", "unary_op": [NESTED, [0], [0], [0]], "binary_op": [0, 0]}, "not [[[["),
        ({"graph_type": "i3n2", "unary_op": [[9] * 1_000] * 4, "binary_op": [0, 0]}, "not [9, 9, 9"),
    ],
)
def test_a_wrong_genotype_is_refused(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ProgramError) as caught:
        Genotype.read(given)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 200, "what is given may be huge"


def test_a_log_of_what_is_never_negative_has_a_program() -> None:
    one = genotype("i3n2", [[9, 3, 6], [5, 3, 14], [0], [0]], [2, 2])
    assert import_genotype(one).text == "mul(mul(sign(log(abs(k))) zscore(log(sigmoid(q)))) v)"


def test_legacy_says_that_a_genotype_raises() -> None:
    with pytest.raises(ProgramError, match="cannot be computed"):
        run_legacy(genotype("i3n2", [[0], [0], [0], [0]], [3, 2]), *inputs())
    with pytest.raises(ProgramError, match="as many tokens or as many channels"):
        run_legacy(genotype("i3n2", [[0], [0], [1], [0]], [9, 5]), *inputs((1, 2, 3, 4)))


def test_a_program_of_another_form_has_no_genotype() -> None:
    with pytest.raises(ProgramError, match="no way is found to write as one of AttnZero's graphs: gelu"):
        export_program(parse_program("gelu(q)"))
    assert export_program(parse_program(FOUND["attnzero_105"])).graph_type == "i3n303"


# Random genotypes of the whole index space: `run_legacy` against a restatement of AttnZero's operators in numpy.


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
