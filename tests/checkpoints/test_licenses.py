"""Which licence a student carries, and which one its user may name."""

from __future__ import annotations

import contextlib

import pytest
from graftvit.checkpoints.licences import (
    CONDITIONS,
    card_fields,
    carried,
    check_named,
    check_shareable,
    conditions,
    normal,
)
from graftvit.models.errors import CheckpointError
from hypothesis import given
from hypothesis import strategies as st

LAXER = [
    ("cc0-1.0", "mit"),
    ("mit", "apache-2.0"),
    ("bsd-3-clause", "apache-2.0"),
    ("apache-2.0", "cc-by-nc-4.0"),
    ("cc-by-4.0", "cc-by-sa-4.0"),
    ("cc-by-4.0", "cc-by-nc-4.0"),
    ("cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
    ("cc-by-sa-4.0", "cc-by-nc-sa-4.0"),
    ("cc-by-nd-4.0", "cc-by-nc-nd-4.0"),
    ("apache-2.0", "openrail"),
    ("apache-2.0", "gpl-3.0"),
    ("lgpl-3.0", "gpl-3.0"),
    ("gpl-3.0", "agpl-3.0"),
    ("mit", "dinov3-license"),
    ("apache-2.0", "llama3"),
    ("apache-2.0", "fair-noncommercial-research-license"),
    ("cc-by-nc-4.0", "fair-noncommercial-research-license"),
]
INCOMPARABLE = [
    ("gpl-3.0", "cc-by-nc-4.0"),
    ("gpl-2.0", "gpl-3.0"),
    ("cc-by-sa-4.0", "cc-by-nc-4.0"),
    ("openrail", "cc-by-nc-4.0"),
    ("gemma", "dinov3-license"),
    ("cc-by-nc-4.0", "a-licence-of-nobody"),
]
LICENCES = st.sampled_from(sorted(CONDITIONS))


@pytest.mark.parametrize(("laxer", "stricter"), LAXER)
def test_the_stricter_one_is_carried(laxer: str, stricter: str) -> None:
    assert carried(laxer, stricter) == carried(stricter, laxer) == stricter
    assert check_named(stricter, laxer) == stricter
    with pytest.raises(CheckpointError, match=f"{laxer} is laxer than {stricter}.*--confirm_licence"):
        check_named(laxer, stricter)
    assert check_named(laxer, stricter, confirmed=True) == laxer


@pytest.mark.parametrize(("one", "other"), INCOMPARABLE)
def test_neither_of_two_that_ask_different_things_is_carried(one: str, other: str) -> None:
    with pytest.raises(CheckpointError, match=f"{one} and {other}.*--confirm_licence"):
        carried(one, other)
    with pytest.raises(CheckpointError, match=f"{one} is not {other}"):
        check_named(one, other)
    assert check_named(one, other, confirmed=True) == one


def test_one_that_asks_all_that_two_others_ask_is_carried() -> None:
    assert carried("cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0") == "cc-by-nc-sa-4.0"


@pytest.mark.parametrize("unknown", [None, "", "unknown", "None", " Unknown "])
def test_an_unknown_licence_may_be_the_strictest(unknown: str | None) -> None:
    assert carried("mit", unknown) is None
    assert carried(unknown) is None
    with pytest.raises(CheckpointError, match=r"not known.*--confirm_licence"):
        check_named("mit", unknown)
    assert check_named("mit", unknown, confirmed=True) == "mit"


def test_nothing_is_carried_from_nothing() -> None:
    assert carried() is None
    assert check_named("mit") == "mit"


def test_a_user_may_not_unname_a_licence() -> None:
    assert check_named("unknown") is None
    with pytest.raises(CheckpointError, match="unknown is not mit"):
        check_named("unknown", "mit")


@pytest.mark.parametrize(
    ("written", "identifier"),
    [
        ("Apache-2.0", "apache-2.0"),
        ("apache 2.0", "apache-2.0"),
        ("CC-BY-NC-4.0", "cc-by-nc-4.0"),
        ("CC0", "cc0-1.0"),
        ("GPL-3.0-or-later", "gpl-3.0"),
        ("AGPL-3.0-only", "agpl-3.0"),
        ("LGPL-2.1-or-later", "lgpl-2.1"),
        ("BSD-3-Clause", "bsd-3-clause"),
    ],
)
def test_the_ways_of_writing_an_identifier(written: str, identifier: str) -> None:
    assert normal(written) == identifier
    assert check_named(written) == identifier


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("apache", "apache-2.0"),
        ("cc-by-nc", "cc-by-nc-4.0"),
        ("cc-by-sa", "cc-by-sa-4.0"),
        ("dinov3", "dinov3-license"),
    ],
)
def test_an_identifier_that_is_none_is_refused_with_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(CheckpointError, match="--licence") as caught:
        check_named(wrong, confirmed=True)
    assert repr(wrong) in str(caught.value)
    assert f"did you mean {nearest!r}?" in str(caught.value)


def test_the_sentence_names_the_place_and_what_is_dropped() -> None:
    with pytest.raises(CheckpointError, match=r"^README\.md mit is laxer.*'no commercial use'"):
        check_named("mit", "cc-by-nc-4.0", flag="README.md")


@pytest.mark.parametrize("licence", ["cc-by-nd-4.0", "cc-by-nc-nd-4.0"])
def test_no_derivatives_must_be_confirmed(licence: str) -> None:
    with pytest.raises(CheckpointError, match=f"{licence} lets nobody share"):
        check_shareable(licence, confirmed=False)
    check_shareable(licence, confirmed=True)
    check_shareable("cc-by-nc-4.0", confirmed=False)
    check_shareable(None, confirmed=False)


def test_a_card_calls_what_the_hub_does_not_list_other() -> None:
    assert card_fields("Apache-2.0") == {"license": "apache-2.0"}
    assert card_fields("llama3") == {"license": "llama3"}
    assert card_fields(None) == card_fields("unknown") == {}
    assert card_fields("a-licence") == {"license": "other", "license_name": "a-licence"}
    found = card_fields("dinov3-license")
    assert found.pop("license_link").startswith("https://ai.meta.com/")
    assert found == {"license": "other", "license_name": "dinov3-license"}


@given(LICENCES, LICENCES)
def test_what_is_carried_asks_all_that_was_asked(one: str, other: str) -> None:
    try:
        strictest = carried(one, other)
    except CheckpointError:
        assert not conditions(one) <= conditions(other)
        assert not conditions(other) <= conditions(one)
        return
    assert strictest in (one, other)
    assert conditions(one) | conditions(other) == conditions(strictest)
    assert check_named(strictest, one, other) == strictest


@given(st.text(max_size=30), st.text(max_size=30))
def test_no_text_ends_in_another_error(one: str, other: str) -> None:
    for action in (lambda: check_named(one, other), lambda: carried(one, other), lambda: card_fields(one)):
        with contextlib.suppress(CheckpointError):
            action()
