"""The maps of programs that are linear in V, against the program's output for values that are one-hot."""

from __future__ import annotations

import random

import pytest
import torch
from graftvit.models.programs.drawing import draw_program
from graftvit.models.programs.program import FOUND, LINEAR, Program, ProgramError, parse_program
from graftvit.models.programs.value_map import (
    Part,
    apply_part,
    map_parts,
    nonnegative_map,
    rows_sum_to_one,
    why_no_map,
)
from torch import Tensor

SIZES = [(7, 4), (4, 4), (3, 5), (1, 2)]
SOFTMAX = "mm(softmax(nt(scale(q) k)) v)"
MAPPED = [
    "v",
    "neg(scale(v))",
    SOFTMAX,
    LINEAR,
    "mm(softmax(q) tn(softmax(k) v))",
    "mm(softmax(q) mm(softmax(t(k)) v))",
    "add(mul(v dist(q k)) mm(q tn(k v)))",
    "sub(v mean(v))",
    "sub(mean(v) v)",
    "add(v sum(mul(v dist(q k))))",
    "mul(sum(v) dist(q k))",
    "mul(mul(mean(v) one) dist(q k))",
    "mul(v cosine(q k))",
    "mul(mm(q tn(k v)) tileinv(dist(q k) v))",
    "mm(l2(nt(relu(q) k)) sub(v mm(softmax(nt(q k)) v)))",
    "mul(mm(exp(nt(q k)) v) recip(t(sum(t(exp(nt(q k)))))))",
    "mul(mm(exp(nt(q k)) mul(v dist(q k))) dist(k q))",
    "mm(q t(mul(t(tn(k v)) minmax(sum(q)))))",
    "mm(zscore(q) t(add(tn(v k) neg(tn(v q)))))",
    "mm(q t(mm(t(scale(tn(k v))) softmax(tn(k q)))))",
    "mm(q t(nt(t(mul(tn(k v) t(sum(k)))) tn(q k))))",
    "mm(q t(mul(tn(v k) sum(q))))",
    "mm(cat(q k) tn(cat(k q) v))",
    "mul(mm(nt(sum(q) k) v) dist(q k))",
]
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
