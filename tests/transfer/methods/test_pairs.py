"""The grammar of `transfer.layers`."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
from graftvit.models.copying.tape import LayerPair
from graftvit.models.errors import TransferError
from graftvit.transfer.methods.pairs import resolve_layers
from hypothesis import given
from hypothesis import strategies as st

DEPTHS = st.integers(1, 40)


def students(layers: object, depth: int = 24) -> list[int]:
    pairs = resolve_layers(layers, [depth], [depth])  # type: ignore[arg-type]
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
        ("7", [7]),
        ([0, -2], [0, 22]),
        ([(4, 4), (-1, -1)], [4, 23]),
    ],
)
def test_grammar_with_equal_depth(layers: object, expected: list[int]) -> None:
    assert students(layers) == expected


def test_end_layer_minus_six_is_the_first_eighteen_of_twenty_four() -> None:
    assert [pair.student for pair in resolve_layers(":-6", [24], [24])] == list(range(18))


def test_pairs_join_any_teacher_layer_to_any_student_layer() -> None:
    expected = (LayerPair(2, 0), LayerPair(5, 1), LayerPair(23, 11))
    assert resolve_layers("5>1,2>0,-1>-1", [24], [12]) == expected
    assert resolve_layers([(5, 1), (2, 0), (-1, -1)], [24], [12]) == expected


def test_one_teacher_layer_may_serve_two_student_layers() -> None:
    assert resolve_layers("1>0,1>1", [2], [4]) == (LayerPair(1, 0), LayerPair(1, 1))


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
    text = ",".join(map(str, chosen))
    negative = [layer - student for layer in chosen]
    pairs = resolve_layers(text, [teacher], [student])
    assert (
        pairs
        == resolve_layers(chosen, [teacher], [student])
        == resolve_layers(negative, [teacher], [student])
    )
    assert [pair.student for pair in pairs] == sorted(chosen)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("24", "layer 24 of the student"),
        ("-25", "layer -25 of the student"),
        ([3, 24], "layer 24 of the student"),
        ("24>0", "layer 24 of the teacher"),
        ("0>24", "layer 24 of the student"),
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
    ],
)
def test_mistakes_name_the_key_and_the_valid_values(layers: object, message: str) -> None:
    with pytest.raises(TransferError, match=message) as caught:
        resolve_layers(layers, [24], [24])  # type: ignore[arg-type]
    assert f"transfer.layers={layers!r}" in str(caught.value)


@pytest.mark.parametrize("layers", [":-6", "first:6", [0, 6]])
def test_a_student_that_is_too_shallow_is_told_what_to_give(layers: str | list[int]) -> None:
    with pytest.raises(TransferError, match="another --layers, such as all"):
        resolve_layers(layers, [24], [2])


def test_the_examples_of_the_guide_hold() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "layers-and-heads.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`>]+)` \| ([\d, to]+) \|$", guide, flags=re.MULTILINE)
    assert len(rows) == 11
    for layers, expected in rows:
        depths = [2, 2, 6, 2] if "stage" in layers else [12]
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
    ("layers", "said"),
    [
        ("stage3", "names stage3 of the student, which has stage1 to stage2"),
        ("stage0", "names stage0 of the student"),
        ("stage3>stage1", "names stage3 of the teacher, which has stage1 to stage2"),
        ("stage1,stage1>stage2", "mixes stages and pairs of stages"),
        ("stage1,stage1", "names layer 0 of the student more than once"),
        ("stage1,0", "is not a choice of layers"),
        ("stage1.2-9", "names stage1.2-9 of the student, whose stage1 has layers 0 to"),
        ("stage1.1-0", "names stage1.1-0 of the student"),
    ],
)
def test_a_wrong_stage_is_refused(layers: str, said: str) -> None:
    with pytest.raises(TransferError, match=said):
        resolve_layers(layers, [1, 2], [2, 1])
