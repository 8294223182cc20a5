"""Plans: text, mapping, and back."""

from __future__ import annotations

import pytest
from graftvit.models.errors import ConfigError
from graftvit.models.layer_plan import Choice
from graftvit.models.plan_syntax import layer_numbers, parse_plan, plan_text
from hypothesis import given
from hypothesis import strategies as st


def operators(plan: object, depth: int = 12) -> list[str]:
    return [str(choice) for choice in parse_plan(plan, depth)]  # type: ignore[arg-type]


def test_later_entries_hold_and_unnamed_layers_are_kept() -> None:
    assert operators("*: linear; 9-11: softmax") == ["linear"] * 9 + ["softmax"] * 3
    assert operators("1: linear", 3) == ["softmax", "linear", "softmax"]
    assert operators("*: linear; -1: keep", 3) == ["linear", "linear", "softmax"]
    assert operators("-2--1, 0: linear", 4) == ["linear", "softmax", "linear", "linear"]
    assert operators({"*": "linear", 0: "keep"}, 2) == ["softmax", "linear"]


def test_options() -> None:
    (choice,) = parse_plan("*: linear(feature=relu)", 1)
    assert choice == Choice("linear", {"feature": "relu"})
    assert parse_plan("0: x(a=1, b=0.5, c=true, d=text)", 1)[0].options == {
        "a": 1, "b": 0.5, "c": True, "d": "text",
    }  # fmt: skip


def test_options_mean_what_they_mean_in_a_config() -> None:
    assert parse_plan("0: x(a=1e-3, b=no, c=2:5)", 1)[0].options == {"a": 1e-3, "b": "no", "c": "2:5"}


def test_a_number_sign_within_quotes_or_a_word_is_text() -> None:
    assert parse_plan("0: x(a='b # c', d=e#f)", 1)[0].options == {"a": "b # c", "d": "e#f"}


def test_a_long_text_stays_whole() -> None:
    choice = Choice("x", {"y": "a word " * 20 + "and an end"})
    assert parse_plan(plan_text((choice,)), 1) == (choice,)


@pytest.mark.parametrize(("plan", "words"), [
    ("", "the plan '' is empty"),
    ("linear", "has no colon"),
    ("x: linear", "'x' is not a layer"),
    ("1.5: linear", "'1.5' is not a layer"),
    ("12: linear", "there is no layer 12; the model has layers 0 to 11"),
    ("-13: linear", "there is no layer -13"),
    ("5-3: linear", "the range '5-3' is empty"),
    ("*: Linear!", "'Linear!' is not an operator"),
    ("*: linear(relu)", "'relu' is not an option; write name=value"),
    ("*:", "'' is not an operator"),
    ("*: program(code=q, code=v)", "'program(code=q, code=v)' gives code twice"),
    ("*: program(code=mm(q, tn(k v)))", "'tn(k v))' is not an option; write name=value; a comma ends an option"),
    ("*: program(code=mm(q tn(k v)) # x)", "what follows # would be lost"),
    ("*: program(code='a # b' # c)", "what follows # would be lost"),
])  # fmt: skip
def test_mistakes_are_named(plan: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_plan(plan, 12)
    assert words in str(caught.value)


def test_a_misspelt_merge_is_answered_with_the_word() -> None:
    with pytest.raises(ConfigError, match=r"'merges' is not a layer; write .* merge"):
        parse_plan("merges: deformable", (1, 1))


CHOICES = st.sampled_from(
    [Choice("softmax"), Choice("linear"), Choice("linear", {"feature": "relu", "x": 1.5, "y": "true"})]
)


@given(st.lists(CHOICES, min_size=1, max_size=8))
def test_text_gives_the_same_choices_back(choices: list[Choice]) -> None:
    assert parse_plan(plan_text(tuple(choices)), len(choices)) == tuple(choices)


def test_text_is_short() -> None:
    assert plan_text(parse_plan("*: linear", 12)) == "*: linear"
    assert plan_text(parse_plan("*: linear; 9-11: softmax", 12)) == "0-8: linear; 9-11: softmax"


def test_a_range_of_stages_is_all_their_layers() -> None:
    assert layer_numbers("stage2-4", [1, 2, 3, 1]) == [1, 2, 3, 4, 5, 6]
    assert layer_numbers("stage1-1,-1", [1, 2, 3, 1]) == [0, 6]
    assert parse_plan("stage1-2: linear", [1, 1, 1]) == parse_plan("0-1: linear", [1, 1, 1])


def test_a_stage_without_attention_is_refused_as_one() -> None:
    with pytest.raises(ConfigError, match="stage 1 of the model has no layer with attention"):
        layer_numbers("stage1", [0, 2])


@pytest.mark.parametrize("words", ["stage3-2", "stage0-1", "stage2-5"])
def test_a_range_without_stages_is_refused(words: str) -> None:
    with pytest.raises(ConfigError, match=f"{words}.*has stages 1 to 4"):
        layer_numbers(words, [1, 2, 3, 1])
