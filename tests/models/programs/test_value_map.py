"""Primitives against numpy, maps of programs against one-hot values, and the checks of candidates."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import erf

import numpy as np
import pytest
import torch
from graftvit.models.programs.drawing import draw_program
from graftvit.models.programs.genotypes import Genotype
from graftvit.models.programs.primitives import ONE, PRIMITIVES, SCALAR, D, N, Shape
from graftvit.models.programs.program import FOUND, LINEAR, Program, ProgramError, parse_program
from graftvit.models.programs.program_checks import CHECKS, Candidate, check, count_refusals
from graftvit.models.programs.value_map import (
    Part,
    apply_part,
    map_parts,
    nonnegative_map,
    rows_sum_to_one,
    why_no_map,
)
from numpy.typing import NDArray
from torch import Tensor

SIZES = [(7, 4), (4, 4), (3, 5), (1, 2)]
SOFTMAX = "mm(softmax(nt(scale(q) k)) v)"
MAPPED = [
    "v", "neg(scale(v))", SOFTMAX, LINEAR, "mm(softmax(q) tn(softmax(k) v))",
    "mm(softmax(q) mm(softmax(t(k)) v))", "add(mul(v dist(q k)) mm(q tn(k v)))", "sub(v mean(v))",
    "sub(mean(v) v)", "add(v sum(mul(v dist(q k))))", "mul(sum(v) dist(q k))",
    "mul(mul(mean(v) one) dist(q k))", "mul(v cosine(q k))", "mul(mm(q tn(k v)) tileinv(dist(q k) v))",
    "mm(l2(nt(relu(q) k)) sub(v mm(softmax(nt(q k)) v)))",
    "mul(mm(exp(nt(q k)) v) recip(t(sum(t(exp(nt(q k)))))))",
    "mul(mm(exp(nt(q k)) mul(v dist(q k))) dist(k q))", "mm(q t(mul(t(tn(k v)) minmax(sum(q)))))",
    "mm(zscore(q) t(add(tn(v k) neg(tn(v q)))))", "mm(q t(mm(t(scale(tn(k v))) softmax(tn(k q)))))",
    "mm(q t(nt(t(mul(tn(k v) t(sum(k)))) tn(q k))))", "mm(q t(mul(tn(v k) sum(q))))",
    "mm(cat(q k) tn(cat(k q) v))", "mul(mm(nt(sum(q) k) v) dist(q k))",
]  # fmt: skip
REASONS = {
    "q": "it does not read V",
    "relu(v)": "relu(v) is not linear in V",
    "mul(q v)": "mul(q v) weighs the channels of V, each in another way",
    "mul(v sum(q))": "mul(sum(q) v) weighs the channels of V, each in another way",
    "mul(v sum(v))": "mul(sum(v) v) multiplies values of V with each other",
    "mm(v tn(v k))": "multiplies values of V with each other",
    "mm(v tn(q k))": "mm(v tn(q k)) mixes the channels of V",
    "mm(q tn(v k))": "mm(q tn(v k)) mixes the channels of V",
    "nt(q tn(k v))": "mm(q tn(v k)) mixes the channels of V",
    "mm(nt(q v) k)": "nt(q v) mixes the channels of V",
    "mul(q t(sum(t(v))))": "sum(t(v)) adds the channels of V",
    "mm(q t(mul(tn(v k) t(sum(q)))))": "mul(t(sum(q)) tn(v k)) weighs the channels of V, each in another way",
    "mm(q add(tn(v k) tn(k v)))": "add(tn(k v) tn(v k)) adds rows of V to channels of V",
    "add(q v)": "add(q v) adds a value that does not come from V",
    "sub(v one)": "adds a value that does not come from V",
    "headsum(v)": "headsum(v) adds the heads of V",
    "mm(cat(q v) tn(cat(q v) k))": "cat(q v) puts other columns beside those of V",
    "mul(q tileinv(dist(q v) v))": "dist(q v) is not linear in V",
    "mul(q tileinv(nt(v sum(k)) q))": "nt(v sum(k)) mixes the channels of V",
    "mul(q tileinv(dist(q k) v))": "it does not read V",
}


def inputs(tokens: int, width: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 2, 3, tokens, width, generator=generator, dtype=torch.float64)
    return list(x.unbind(0))


def applied(parts: list[Part], v: Tensor) -> Tensor:
    return torch.stack([apply_part(part, v) for part in parts]).sum(0)


def one_hot_map(program: Program, q: Tensor, k: Tensor, channel: int) -> Tensor:
    """Column j is `channel` of the output for values that are 1 at that channel of token j, and 0 elsewhere."""
    columns = []
    for token in range(q.shape[2]):
        v = torch.zeros_like(q)
        v[:, :, token, channel] = 1
        out = program(q=q, k=k, v=v)
        others = [each for each in range(q.shape[3]) if each != channel]
        assert not out[..., others].any(), "other channels are not reached"
        columns.append(out[..., channel])
    return torch.stack(columns, -1)


@pytest.mark.parametrize("text", MAPPED)
@pytest.mark.parametrize(("tokens", "width"), SIZES)
def test_the_map_is_what_one_hot_values_show(text: str, tokens: int, width: int) -> None:
    program = parse_program(text)
    q, k, v = inputs(tokens, width)
    eye = torch.eye(tokens, dtype=q.dtype).expand(2, 3, -1, -1)
    found = applied(map_parts(program, q, k, torch.empty_like(v)), eye)
    for channel in (0, width - 1):
        torch.testing.assert_close(found, one_hot_map(program, q, k, channel), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found @ v, program(q=q, k=k, v=v), rtol=1e-9, atol=1e-12)


def test_a_program_of_linear_cost_has_no_large_factor() -> None:
    for text in MAPPED:
        program = parse_program(text)
        for part in map_parts(program, *inputs(11, 3)):
            factors = [x for x in (part.left, part.right) if x is not None]
            assert program.order > 1 or all(x.shape[3] < 11 for x in factors), text


@pytest.mark.parametrize("text", REASONS)
def test_a_program_without_a_map_says_why(text: str) -> None:
    program = parse_program(text)
    assert REASONS[text] in why_no_map(program)
    with pytest.raises(ProgramError) as caught:
        map_parts(program, *inputs(3, 2))
    assert REASONS[text] in str(caught.value)


def is_a_map_of_the_values(program: Program) -> bool:
    """Whether values of other channels stay apart, sums and multiples stay, and equal channels give equal outputs."""
    q, k, v = inputs(6, 4)
    other = inputs(6, 4, seed=1)[2]

    def out(values: Tensor) -> Tensor:
        return program(q=q, k=k, v=values)

    pairs = [(out(v + 2 * other), out(v) + 2 * out(other)), (out(v.roll(1, 3)), out(v).roll(1, 3))]
    pairs += [(out(v)[..., :1].expand_as(v), out(v[..., :1].expand_as(v)))]
    pairs += [(out(v * torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1))[:, 1:], torch.zeros_like(v)[:, 1:])]
    return all(torch.allclose(found, wanted, rtol=1e-7, atol=1e-9) for found, wanted in pairs)


def test_drawn_programs_have_a_map_exactly_where_they_act_as_one() -> None:
    source = random.Random(2)
    programs = {draw_program(source, depth) for _ in range(100) for depth in (1, 2, 3, 4)}
    mapped = {program for program in programs if not why_no_map(program)}
    assert len(mapped) > 10
    for program in programs:
        q, k, v = inputs(6, 4)
        if program in mapped:
            parts = map_parts(program, q, k, v)
            torch.testing.assert_close(
                applied(parts, v), program(q=q, k=k, v=v), rtol=1e-9, atol=1e-9, equal_nan=True
            )
        elif program(q=q, k=k, v=v).any():
            assert not is_a_map_of_the_values(program), f"{program.text}: {why_no_map(program)}"


@pytest.mark.parametrize("text", MAPPED)
def test_what_a_formula_shows_of_its_map_holds(text: str) -> None:
    program = parse_program(text)
    q, k, v = (3 * x for x in inputs(7, 4))
    found = applied(map_parts(program, q, k, v), torch.eye(7, dtype=q.dtype).expand(2, 3, -1, -1))
    assert not nonnegative_map(program) or bool((found >= 0).all())
    near = bool((found.sum(-1) - 1).abs().max() < 1e-3)
    assert rows_sum_to_one(program) is near, "the formula shows it in these programs"


def test_the_formula_shows_which_maps_are_nonnegative() -> None:
    shown = {text for text in MAPPED if nonnegative_map(parse_program(text))}
    assert shown == {
        "v",
        SOFTMAX,
        LINEAR,
        "mm(softmax(q) tn(softmax(k) v))",
        "mm(softmax(q) mm(softmax(t(k)) v))",
        "add(v sum(mul(v dist(q k))))",
        "mul(sum(v) dist(q k))",
        "mul(mul(mean(v) one) dist(q k))",
        "mul(mm(exp(nt(q k)) v) recip(t(sum(t(exp(nt(q k)))))))",
        "mul(mm(exp(nt(q k)) mul(v dist(q k))) dist(k q))",
    }
    assert not nonnegative_map(parse_program("mul(v cosine(q k))"))
    assert nonnegative_map(parse_program("mul(v cosine(relu(q) abs(k)))"))
    assert nonnegative_map(parse_program("mm(mul(nt(q k) nt(q k)) v)")), "a square"


def test_no_found_program_has_a_map() -> None:
    assert all(why_no_map(parse_program(text)) for text in FOUND.values())


# Every primitive computes its formula, image by image and head by head, as numpy computes it.


Array = NDArray[np.float64]
TOKENS, WIDTH, HEADS = 7, 4, 3


def norm(x: Array, axis: int) -> Array:
    return x / np.maximum(np.sqrt((x**2).sum(axis, keepdims=True)), 1e-12)


def soft(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


A_HEAD: dict[str, Callable[..., Array]] = {
    "softmax": soft,
    "log": lambda x: np.log(np.maximum(x, 0) + 1e-9),
    "abslog": lambda x: np.log(np.where(x == 0, 1, np.abs(x))),
    "abs": np.abs,
    "softsign": lambda x: x / (1 + np.abs(x)),
    "recip": lambda x: 1 / (x + 1e-6),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "logsoftmax": lambda x: np.log(soft(x)),
    "sqrt": lambda x: np.sqrt(np.maximum(x, 0)),
    "neg": lambda x: -x,
    "sign": np.sign,
    "scale": lambda x: x / np.sqrt(x.shape[-1]),
    "elu1": lambda x: np.where(x > 0, x + 1, np.exp(x)),
    "relu": lambda x: np.maximum(x, 0),
    "exp": np.exp,
    "cosigmoid": lambda x: 1 / (1 + np.exp(x)),
    "gelu": lambda x: x * (1 + np.vectorize(erf)(x / np.sqrt(2))) / 2,
    "l2": lambda x: norm(x, -1),
    "l2t": lambda x: norm(x, -2),
    "l1": lambda x: x / np.abs(x).sum(-1, keepdims=True),
    "sumnorm": lambda x: x / x.sum(-1, keepdims=True),
    "layernorm": lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5),
    "t": lambda x: x.T,
    "sum": lambda x: x.sum(0, keepdims=True),
    "mean": lambda x: x.mean(0, keepdims=True),
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "max": np.maximum,
    "mm": lambda a, b: a @ b,
    "tn": lambda a, b: a.T @ b,
    "nt": lambda a, b: a @ b.T,
    "dist": lambda a, b: np.sqrt(((a - b + 1e-6) ** 2).sum(-1, keepdims=True)),
    "cat": lambda a, b: np.concatenate([a, b], -1),
    "tileinv": lambda a, b: np.repeat(1 / (a + 1e-8), b.shape[1], 1),
    "one": lambda x: np.ones((1, 1)),
}
"""Of one head."""
AN_IMAGE: dict[str, Callable[..., Array]] = {
    "zscore": lambda x: (x - x.mean()) / x.std(ddof=1),
    "minmax": lambda x: (x - x.min()) / (x.max() - x.min() + 1e-9),
    "headsum": lambda x: np.broadcast_to(x.sum(0), x.shape),
    "cosine": lambda a, b: np.full((HEADS, 1, 1), (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum())),
}
"""Of all heads of an image, (H, rows, cols)."""
SECOND = {"mm": Shape(D, N), "tileinv": Shape(N, D), "cat": Shape(N, ONE)}
FIRST = {"tileinv": Shape(N, ONE)}


def draw(shape: Shape, seed: int) -> Tensor:
    size = (2, HEADS, shape.rows.at(TOKENS, WIDTH), shape.cols.at(TOKENS, WIDTH))
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, :, 0, 0] = 0  # where a guard shows
    return x


def test_every_primitive_has_a_reference() -> None:
    assert set(A_HEAD) | set(AN_IMAGE) == set(PRIMITIVES)
    assert {name for name, row in PRIMITIVES.items() if row.mixes_heads} == set(AN_IMAGE)


@pytest.mark.parametrize("name", PRIMITIVES)
def test_a_primitive_is_its_formula(name: str) -> None:
    row = PRIMITIVES[name]
    shapes = [FIRST.get(name, Shape(N, D)), SECOND.get(name, Shape(N, D))][: row.arity]
    operands = [draw(shape, seed) for seed, shape in enumerate(shapes)]
    given = operands or [draw(Shape(N, D), 0)]
    out = row.run(*given)
    arrays = [x.numpy() for x in given]
    if name in A_HEAD:
        images = [[A_HEAD[name](*(x[b, h] for x in arrays)) for h in range(HEADS)] for b in range(2)]
    else:
        images = [AN_IMAGE[name](*(x[b] for x in arrays)) for b in range(2)]
    torch.testing.assert_close(out, torch.tensor(np.array(images)), rtol=1e-9, atol=1e-9)
    shape = row.shape(*shapes)
    assert shape is not None
    assert out.shape[2:] == (shape.rows.at(TOKENS, WIDTH), shape.cols.at(TOKENS, WIDTH))
    if row.commutes:
        assert torch.equal(out, row.run(*operands[::-1]))


@pytest.mark.parametrize("name", PRIMITIVES)
def test_gradients_are_finite_at_zero_and_where_all_is_equal(name: str) -> None:
    row = PRIMITIVES[name]
    shapes = [FIRST.get(name, Shape(N, D)), SECOND.get(name, Shape(N, D))][: row.arity]
    if not shapes or name in ("sumnorm", "dist"):  # a number; 0 / 0; a root that an epsilon keeps off zero
        return
    fill = 0.5 if name == "tileinv" else 0.0
    operands = [torch.full_like(draw(shape, 0), fill).requires_grad_() for shape in shapes]
    for gradient in torch.autograd.grad(row.run(*operands).sum(), operands, allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


def test_products_cost_what_they_multiply() -> None:
    left, right = Shape(N, D), Shape(N, D)
    assert str(PRIMITIVES["tn"].products(left, right)) == "N D^2"
    assert str(PRIMITIVES["nt"].products(left, right)) == "N^2 D"
    assert str(PRIMITIVES["mm"].products(left, Shape(D, ONE))) == "N D"
    assert PRIMITIVES["mm"].shape(left, right) is None
    assert PRIMITIVES["zscore"].shape(SCALAR) is None
    assert str(PRIMITIVES["cat"].shape(left, Shape(N, ONE))) == "N×D + 1"


# The checks: for each a candidate that it is the first to refuse, and what passes all.


def running_mean(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A function of the order of the tokens, which no program is."""
    places = torch.arange(1, q.shape[2] + 1, dtype=q.dtype)[:, None]
    return torch.tanh(q + (k * v).cumsum(2) / places)


TRIAL_105 = Genotype("i3n303", ((16,), (0, 13), (0, 25), (6,), (0,), (25, 0)), (6, 3, 2))
TRIAL_140 = Genotype("i3n302", ((16,), (15,), (0, 5), (9, 0), (20,), (25,)), (5, 5, 0))
OVERFLOWS = "l2(mul(exp(exp(add(one add(one one)))) mm(l2(q) l2(tn(k v)))))"
CHECKS_FIRST = {
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
    assert list(CHECKS_FIRST) == [each.name for each in CHECKS]


@pytest.mark.parametrize("name", CHECKS_FIRST)
def test_a_check_refuses_first(name: str) -> None:
    source, reason = CHECKS_FIRST[name]
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
