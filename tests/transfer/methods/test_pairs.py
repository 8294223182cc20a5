"""The grammars of `transfer.layers` and `transfer.heads`, and heads assigned by measured map distance."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from graftvit.models.copying.tape import HeadMap, LayerPair
from graftvit.models.errors import TransferError
from graftvit.transfer.methods import heads as heads_module
from graftvit.transfer.methods.heads import map_distance, match_heads, resolve_heads
from graftvit.transfer.methods.pairs import resolve_layers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

DEPTHS = st.integers(1, 40)


def students(layers: object, depth: int = 24) -> list[int]:
    pairs = resolve_layers(layers, [depth], [depth])
    assert all(pair.teacher == pair.student for pair in pairs)
    return [pair.student for pair in pairs]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", list(range(24))),
        ("first:3", [0, 1, 2]),
        ("last:3", [21, 22, 23]),
        ("every:6", [5, 11, 17, 23]),
        ("every:7", [2, 9, 16, 23]),
        ("every:24", [23]),
        (":-6", list(range(18))),
        ("-6:", list(range(18, 24))),
        ("2:5", [2, 3, 4]),
        (":", list(range(24))),
        ("0,3,-1", [0, 3, 23]),
        (" 5 , 1 ", [1, 5]),
        ("3-5", [3, 4, 5]),
        ("0-2,5", [0, 1, 2, 5]),
        ("9 - 11, -2--1", [9, 10, 11, 22, 23]),
        ("7", [7]),
        ([0, -2], [0, 22]),
        ([(4, 4), (-1, -1)], [4, 23]),
    ],
)
def test_grammar_with_equal_depth(layers: object, expected: list[int]) -> None:
    assert students(layers) == expected


def test_pairs_join_any_teacher_layer_to_any_student_layer() -> None:
    expected = (LayerPair(2, 0), LayerPair(5, 1), LayerPair(23, 11))
    assert resolve_layers("5>1,2>0,-1>-1", [24], [12]) == expected
    assert resolve_layers([(5, 1), (2, 0), (-1, -1)], [24], [12]) == expected
    assert resolve_layers("1>0,1>1", [2], [4]) == (LayerPair(1, 0), LayerPair(1, 1))
    for layers in (":-6", "first:6", [0, 6]):
        with pytest.raises(TransferError, match=r"another --layers \(in Python layers\), such as all"):
            resolve_layers(layers, [24], [2])


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        (24, 12, [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23]),
        (4, 6, [0, 1, 1, 2, 3, 3]),
        (12, 5, [2, 4, 7, 9, 11]),
    ],
)
def test_unequal_depth_spreads_the_teacher(teacher: int, student: int, expected: list[int]) -> None:
    assert [pair.teacher for pair in resolve_layers("all", [teacher], [student])] == expected


@given(DEPTHS, DEPTHS)
def test_spread_matches_the_formula_and_keeps_order(teacher: int, student: int) -> None:
    pairs = resolve_layers("all", [teacher], [student])
    assert [p.teacher for p in pairs] == [math.ceil((s + 1) * teacher / student) - 1 for s in range(student)]
    assert pairs[-1] == LayerPair(teacher - 1, student - 1)
    assert all(a.teacher <= b.teacher for a, b in pairwise(pairs))
    assert teacher < student or len({p.teacher for p in pairs}) == student


@given(DEPTHS, st.data())
def test_slices_follow_python(depth: int, data: st.DataObject) -> None:
    bound = st.none() | st.integers(-depth, depth)
    start, stop = data.draw(bound), data.draw(bound)
    text = f"{'' if start is None else start}:{'' if stop is None else stop}"
    expected = list(range(depth))[start:stop]
    if expected:
        assert students(text, depth) == expected
    else:
        with pytest.raises(TransferError, match="selects no layer"):
            resolve_layers(text, [depth], [depth])


@given(DEPTHS, st.data())
def test_counted_forms_agree_with_slices(depth: int, data: st.DataObject) -> None:
    number = data.draw(st.integers(1, depth))
    assert students(f"first:{number}", depth) == students(f":{number}", depth)
    assert students(f"last:{number}", depth) == students(f"-{number}:", depth)
    every = students(f"every:{number}", depth)
    assert every[-1] == depth - 1
    assert all(b - a == number for a, b in pairwise(every))
    if depth % number == 0:
        assert every == list(range(number - 1, depth, number))


@given(DEPTHS, DEPTHS, st.data())
def test_list_and_text_are_one_thing(teacher: int, student: int, data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, student - 1), min_size=1, unique=True))
    forms = [",".join(map(str, chosen)), chosen, [layer - student for layer in chosen]]
    first, *others = [resolve_layers(form, [teacher], [student]) for form in forms]
    assert others == [first, first]
    assert [pair.student for pair in first] == sorted(chosen)


SHALLOW = [1, 2], [2, 1]  # layers of each stage of a teacher and a student


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("24", "of the student: there is no layer 24"),
        ("-25", "of the student: there is no layer -25"),
        ([3, 24], "layer 24 of the student"),
        ("24>0", "of the teacher: there is no layer 24"),
        ("0>24", "of the student: there is no layer 24"),
        ("20-24", "of the student: there is no layer 24"),
        ("5-3", "the range '5-3' is empty"),
        ("3-5,4", "layer 4 of the student more than once"),
        ("3,3", "layer 3 of the student more than once"),
        ("3,-21", "layer 3 of the student more than once"),
        ("0>1,2>1", "layer 1 of the student more than once"),
        ("first:0", "1 to 24"),
        ("last:25", "1 to 24"),
        ("every:0", "1 to 24"),
        ("every:-2", "1 to 24"),
        (":25", "-24 to 24"),
        ("5:5", "selects no layer"),
        ([], "selects no layer"),
        ("frist:3", "valid: all, first:N"),
        ("", "valid: all, first:N"),
        ("1,,2", "valid: all, first:N"),
        ("1>2,3", "valid: all, first:N"),
        ("0:8:2", "valid: all, first:N"),
        ([(1, 2, 3)], "a pair is"),
        ("stage3", "of the student: there is no stage 3; the model has stages 1 to 2"),
        ("stage0", "of the student: there is no stage 0"),
        ("stage3>stage1", "of the teacher: there is no stage 3"),
        ("stage1,stage1>stage2", "valid: all, first:N"),
        ("stage1,stage1", "names layer 0 of the student more than once"),
        ("stage1,0", "names layer 0 of the student more than once"),
        ("stage1.2-9", "'stage1.2-9' has no layers; stage 1 of the model has layers 0 to"),
        ("stage1.1-0", "'stage1.1-0' has no layers"),
    ],
)
def test_mistakes_name_the_key_and_the_valid_values(layers: Any, message: str) -> None:
    depths = SHALLOW if "stage" in str(layers) else ([24], [24])
    with pytest.raises(TransferError, match=message) as caught:
        resolve_layers(layers, *depths)
    assert f"transfer.layers={layers!r}" in str(caught.value)


def test_the_examples_of_the_guide_hold() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "layers-and-heads.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`>]+)` \| ([\d, to]+) \|$", guide, flags=re.MULTILINE)
    assert len(rows) == 14
    for layers, expected in rows:
        depths = [2, 2, 6, 2] if "stage" in str(layers) else [12]
        chosen = [pair.student for pair in resolve_layers(layers, depths, depths)]
        if " to " in expected:
            first, last = map(int, expected.split(" to "))
            assert chosen == list(range(first, last + 1)), layers
        else:
            assert chosen == [int(layer) for layer in expected.split(",")], layers


@pytest.mark.parametrize(
    ("layers", "teacher", "student", "expected"),
    [
        ("all", [2, 2], [1, 2], [(1, 0), (2, 1), (3, 2)]),
        ("all", [1, 4], [2, 2], [(0, 0), (0, 1), (2, 2), (4, 3)]),
        ("-1", [1, 4], [2, 2], [(4, 3)]),
        ("all", [4], [1, 1], [(1, 0), (3, 1)]),
        ("stage2", [1, 4], [2, 2], [(2, 2), (4, 3)]),
        ("stage1, stage2", [1, 1], [1, 1], [(0, 0), (1, 1)]),
        ("stage1", [4], [4], [(0, 0), (1, 1), (2, 2), (3, 3)]),
        ("stage1>stage2", [6], [3, 2], [(2, 3), (5, 4)]),
        ("stage2>stage1,stage1>stage2", [1, 2], [2, 1], [(1, 0), (2, 1), (0, 2)]),
        ("stage2.1", [1, 3], [1, 3], [(2, 2)]),
        ("stage1, stage2.0-1", [1, 3], [1, 3], [(0, 0), (1, 1), (2, 2)]),
        ("stage2.1-2>stage2.0-1", [1, 3], [1, 3], [(2, 1), (3, 2)]),
    ],
)
def test_stages(layers: str, teacher: list[int], student: list[int], expected: list[tuple[int, int]]) -> None:
    assert resolve_layers(layers, teacher, student) == tuple(LayerPair(*pair) for pair in expected)


@pytest.mark.parametrize(
    ("heads", "teacher", "student", "groups"),
    [
        ("all", 3, 3, ((0,), (1,), (2,))),
        ("0,1", 4, 2, ((0,), (1,))),
        *((heads, 6, 6, ((0,), (1,), None, None, (4,), None)) for heads in ("0,1,4", [4, 0, 1], "0, 1, -2")),
        ("mean", 6, 2, ((0, 1, 2), (3, 4, 5))),
        ("mean", 2, 6, ((0,), (0,), (0,), (1,), (1,), (1,))),
        ("3>0,1>2", 4, 3, ((3,), None, (1,))),
        ("3>0, 1>0, -1>-1", 4, 2, ((3, 1), (3,))),
    ],
)
def test_heads_are_grouped(
    heads: str | list[int], teacher: int, student: int, groups: tuple[tuple[int, ...] | None, ...]
) -> None:
    mapping = resolve_heads(heads, teacher, student)
    assert mapping == HeadMap(groups, teacher)
    assert mapping.student_heads == tuple(head for head, group in enumerate(groups) if group)
    assert mapping.targets == tuple(group for group in groups if group)
    assert mapping.is_identity == (heads == "all")
    assert mapping.is_grouped == any(group and len(group) > 1 for group in groups)


@given(st.integers(1, 8), st.integers(1, 4), st.booleans())
def test_mean_uses_every_teacher_head_equally(small: int, factor: int, teacher_is_larger: bool) -> None:
    teacher, student = (small * factor, small) if teacher_is_larger else (small, small * factor)
    used = [head for group in resolve_heads("mean", teacher, student).targets for head in group]
    assert used == sorted(used)
    assert {used.count(head) for head in range(teacher)} == {1 if teacher_is_larger else factor}
    assert resolve_heads("mean", small, small).is_identity


@pytest.mark.parametrize(
    ("heads", "teacher", "student", "message"),
    [
        ("all", 6, 3, "'mean'.*'match'"),
        ("mean", 6, 4, "teacher has 6 and the student 4"),
        ("mean", 4, 6, "teacher has 4 and the student 6"),
        ("0,6", 6, 6, "head 6"),
        ("0,4", 6, 4, "head 4"),
        ("-1", 6, 4, "from the end"),
        ("1,1", 6, 6, "head 1 more than once"),
        ("1,-5", 6, 6, "head 1 more than once"),
        ("6>0", 6, 4, "head 6 of the teacher"),
        ("0>4", 6, 4, "head 4 of the student"),
        ("1>0,1>0", 6, 4, "head 1 more than once"),
        ("match", 6, 6, "calibration batch"),
        ("maen", 6, 6, "valid: all"),
        ("", 6, 6, "valid: all"),
        ([], 6, 6, "selects no head"),
    ],
)
def test_mistakes_name_the_key(heads: str | list[int], teacher: int, student: int, message: str) -> None:
    with pytest.raises(TransferError, match=message) as caught:
        resolve_heads(heads, teacher, student)
    assert f"transfer.heads={heads!r}" in str(caught.value)


def dense_distance(q_t: Tensor, k_t: Tensor, q_s: Tensor, k_s: Tensor, *scales: float) -> Tensor:
    pairs = ((q_t, k_t), (q_s, k_s))
    map_t, map_s = (
        (s * q.double() @ k.double().transpose(-2, -1)).softmax(-1)
        for (q, k), s in zip(pairs, scales, strict=True)
    )
    return (map_t[:, :, None] - map_s[:, None]).square().sum(-1).mean((0, 3))


@pytest.mark.parametrize("chunk", [1, 200, 2**22])
def test_distance_is_the_dense_one_whatever_the_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads_module, "CHUNK_ELEMENTS", chunk)
    generator = torch.Generator().manual_seed(0)
    q_t, k_t = torch.randn(2, 2, 4, 7, 8, generator=generator).unbind(0)
    q_s, k_s = torch.randn(2, 2, 3, 7, 5, generator=generator).unbind(0)
    measured = map_distance(q_t, k_t, q_s, k_s, 0.4, 0.7)
    torch.testing.assert_close(
        measured.double(), dense_distance(q_t, k_t, q_s, k_s, 0.4, 0.7), rtol=1e-5, atol=1e-7
    )


def test_distance_of_a_map_to_itself_is_zero_and_a_bias_counts() -> None:
    q, k = torch.randn(2, 1, 2, 6, 4, generator=torch.Generator().manual_seed(1)).unbind(0)
    bias = torch.zeros(2, 6, 6)
    bias[0, :, 0] = 3.0
    plain = map_distance(q, k, q, k, 0.5, 0.5)
    assert plain.diagonal().eq(0).all()
    biased = map_distance(q, k, q, k, 0.5, 0.5, bias_t=bias)
    assert biased[0, 0] > 0.01
    assert biased[1, 1] == 0
    assert map_distance(q, k, q, k, 0.5, 0.5, bias_t=bias, bias_s=bias).diagonal().eq(0).all()


@pytest.mark.parametrize("order", [[2, 0, 3, 1], [1, 3], [0, 1, 2, 3]])
def test_match_finds_a_permutation_of_heads(order: list[int]) -> None:
    q, k = torch.randn(2, 3, 4, 6, 4, generator=torch.Generator().manual_seed(2)).unbind(0)
    distance = map_distance(q, k, q[:, order], k[:, order], 0.5, 0.5)
    assert match_heads(distance) == HeadMap(tuple((head,) for head in order), 4)


def test_match_minimizes_the_total_and_leaves_surplus_student_heads_alone() -> None:
    assert match_heads(torch.tensor([[0.0, 1.0], [1.0, 10.0]])).groups == ((1,), (0,))
    distance = torch.tensor([[5.0, 0.0, 5.0], [5.0, 5.0, 0.1]])
    assert match_heads(distance) == HeadMap((None, (0,), (1,)), 2)
    with pytest.raises(TransferError, match="not finite"):
        match_heads(torch.tensor([[float("nan"), 1.0], [1.0, 0.0]]))
