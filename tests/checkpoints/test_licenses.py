"""Which license a student carries, and which one its user may name."""

from __future__ import annotations

import contextlib

import pytest
from graftvit.checkpoints.licenses import card_fields, carried, check_named, check_shareable, normalize
from graftvit.models.errors import CheckpointError
from hypothesis import given
from hypothesis import strategies as st


def test_one_license_is_carried() -> None:
    assert carried("mit") == carried("MIT", "mit") == "mit"
    assert carried("a-license-of-nobody") == "a-license-of-nobody"


@pytest.mark.parametrize(("one", "other"), [("mit", "cc-by-nc-4.0"), ("gpl-3.0", "a-license-of-nobody")])
def test_the_user_chooses_between_two(one: str, other: str) -> None:
    with pytest.raises(CheckpointError, match=f"{one} and {other}.*--confirm_license"):
        carried(one, other)
    for named in (one, other, "apache-2.0"):
        with pytest.raises(CheckpointError, match=f"{named} is not .*--confirm_license"):
            check_named(named, one, other)
        assert check_named(named, one, other, confirmed=True) == named
    assert check_named(other, other, other) == other


@pytest.mark.parametrize("unknown", [None, "", "unknown", "None", " Unknown "])
def test_an_unknown_license_may_be_another_one(unknown: str | None) -> None:
    assert carried("mit", unknown) is None
    assert carried(unknown) is None
    with pytest.raises(CheckpointError, match=r"not known.*--confirm_license"):
        check_named("mit", unknown)
    assert check_named("mit", unknown, confirmed=True) == "mit"


def test_nothing_is_carried_from_nothing() -> None:
    assert carried() is None
    assert check_named("mit") == "mit"


def test_a_user_may_not_unname_a_license() -> None:
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
    assert normalize(written) == identifier
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
    with pytest.raises(CheckpointError, match="--license") as caught:
        check_named(wrong, confirmed=True)
    assert repr(wrong) in str(caught.value)
    assert f"did you mean {nearest!r}?" in str(caught.value)


def test_the_sentence_names_the_place() -> None:
    with pytest.raises(CheckpointError, match=r"^README\.md mit is not cc-by-nc-4\.0"):
        check_named("mit", "cc-by-nc-4.0", flag="README.md")


@pytest.mark.parametrize("license", ["cc-by-nd-4.0", "cc-by-nc-nd-4.0"])
def test_no_derivatives_must_be_confirmed(license: str) -> None:
    with pytest.raises(CheckpointError, match=f"{license} forbids sharing derivatives"):
        check_shareable(license, confirmed=False)
    check_shareable(license, confirmed=True)
    check_shareable("cc-by-nc-4.0", confirmed=False)
    check_shareable(None, confirmed=False)


def test_a_card_calls_what_the_hub_does_not_list_other() -> None:
    assert card_fields("Apache-2.0") == {"license": "apache-2.0"}
    assert card_fields("llama3") == {"license": "llama3"}
    assert card_fields(None) == card_fields("unknown") == {}
    assert card_fields("a-license") == {"license": "other", "license_name": "a-license"}
    found = card_fields("dinov3-license")
    assert found.pop("license_link").startswith("https://ai.meta.com/")
    assert found == {"license": "other", "license_name": "dinov3-license"}


@given(st.text(max_size=30), st.text(max_size=30))
def test_no_text_ends_in_another_error(one: str, other: str) -> None:
    for action in (lambda: check_named(one, other), lambda: carried(one, other), lambda: card_fields(one)):
        with contextlib.suppress(CheckpointError):
            action()
