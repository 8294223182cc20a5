from __future__ import annotations

import math

import pytest
import yaml
from graftvit.models.plain_yaml import parse_yaml, write_yaml
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(("text", "value"), [
    ("1e-3", 1e-3), ("1.0e-3", 1e-3), ("-.5", -0.5), ("3.", 3.0), ("7", 7), ("-7", -7), ("0", 0),
    ("2:5", "2:5"), (":-6", ":-6"), ("first:6", "first:6"), ("no", "no"), ("on", "on"), ("true", True),
    ("False", False), ("null", None), ("~", None), ("", None), ("e", "e"), ("1e", "1e"),
    ("rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5-inc1"), ("[0.9, 0.95]", [0.9, 0.95]),
    ("{depth: 6}", {"depth": 6}),
])  # fmt: skip
def test_scalars_mean_what_people_expect(text: str, value: object) -> None:
    read = parse_yaml(text)
    assert read == value
    assert type(read) is type(value)


def test_a_revision_that_looks_like_a_number_stays_text() -> None:
    assert parse_yaml(write_yaml({"revision": "1234e56"})) == {"revision": "1234e56"}


def test_infinity_and_nan() -> None:
    assert parse_yaml(".inf") == math.inf
    assert math.isnan(parse_yaml(".nan"))


@pytest.mark.parametrize("text", ["a: 1\na: 2", "x: {b: 1, b: 1}"])
def test_a_key_given_twice_is_refused(text: str) -> None:
    with pytest.raises(yaml.YAMLError, match="given twice"):
        parse_yaml(text)


def test_no_python_object_is_built() -> None:
    with pytest.raises(yaml.YAMLError):
        parse_yaml("!!python/object/apply:os.system ['true']")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(plain)
def test_what_is_written_reads_back(value: object) -> None:
    assert parse_yaml(write_yaml(value)) == value
