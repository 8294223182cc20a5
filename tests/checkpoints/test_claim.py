"""Which license a student is published under, and what a card that somebody wrote may say of it."""

from __future__ import annotations

from typing import Any

import pytest
from graftvit.checkpoints.card import claim_license, license_of_card
from graftvit.models.errors import CheckpointError


def config(own: str | None = None, **origins: Any) -> dict[str, Any]:
    """A config.json with the license of its weights, and of its teacher and its start where they are given."""
    made = {key: {"source": "x", "license": license} for key, license in origins.items()}
    return {"pretrained_cfg": {"license": own} if own else {}, "graftvit": made}


def card(head: str) -> str:
    return f"---\n{head}\n---\n# Mine\n"


@pytest.mark.parametrize(
    ("made", "license"),
    [
        (config(), None),
        (config(own="mit"), "mit"),
        (config(teacher="cc-by-nc-4.0"), "cc-by-nc-4.0"),
        (config(teacher="CC-BY-NC-4.0", init="cc-by-nc-4.0"), "cc-by-nc-4.0"),
        (config(own="mit", teacher="mit"), "mit"),
        (config(teacher=None), None),
        (config(teacher="mit", init=None), None),
        (config(own="cc-by-nc-4.0", teacher=None), "cc-by-nc-4.0"),
        ({}, None),
        ({"graftvit": None, "pretrained_cfg": None}, None),
    ],
)
def test_what_is_carried(made: dict[str, Any], license: str | None) -> None:
    assert claim_license(made, None, confirmed=False).license == license


def test_another_one_must_be_confirmed() -> None:
    made = config(teacher="cc-by-nc-4.0")
    with pytest.raises(CheckpointError, match=r"--license mit is not cc-by-nc-4\.0"):
        claim_license(made, "mit", confirmed=False)
    assert claim_license(made, "mit", confirmed=True).license == "mit"
    assert claim_license(made, "CC-BY-NC-4.0", confirmed=False).license == "cc-by-nc-4.0"


def test_weights_that_let_nobody_share_must_be_confirmed_even_without_a_name() -> None:
    made = config(teacher="cc-by-nc-nd-4.0")
    with pytest.raises(CheckpointError, match="forbids sharing derivatives"):
        claim_license(made, None, confirmed=False)
    assert claim_license(made, None, confirmed=True).license == "cc-by-nc-nd-4.0"


def test_two_licenses_ask_for_a_choice() -> None:
    made = config(teacher="gpl-3.0", init="cc-by-nc-4.0")
    with pytest.raises(CheckpointError, match=r"gpl-3\.0 and cc-by-nc-4\.0.*--confirm_license"):
        claim_license(made, None, confirmed=False)
    with pytest.raises(CheckpointError, match=r"gpl-3\.0 is not cc-by-nc-4\.0"):
        claim_license(made, "gpl-3.0", confirmed=False)
    assert claim_license(made, "gpl-3.0", confirmed=True).license == "gpl-3.0"


@pytest.mark.parametrize(
    ("head", "license"),
    [
        ("license: cc-by-nc-4.0", "cc-by-nc-4.0"),
        ("license: CC-BY-NC-4.0", "cc-by-nc-4.0"),
        ("license: [cc-by-nc-4.0]", "cc-by-nc-4.0"),
    ],
)
def test_a_written_card_decides_where_the_user_names_none(head: str, license: str) -> None:
    claim = claim_license(config(teacher="cc-by-nc-4.0"), None, confirmed=False)
    assert license_of_card(card(head), claim, "README.md") == license


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ("license: mit", "the license in README.md mit is not cc-by-nc-4.0"),
        ("license: [cc-by-nc-4.0, mit]", "mit is not cc-by-nc-4.0"),
        ("license: unknown", "unknown is not cc-by-nc-4.0"),
        ("tags: [a]", "README.md names no license.*`license: cc-by-nc-4.0`"),
        ("license: lgpl-9", "'lgpl-9' is no license identifier of the hub: did you mean 'lgpl'"),
        ("license: other\nlicense_name: dinov3-license", "dinov3-license is not cc-by-nc-4.0"),
        ("license: {a: b}", "is no license identifier"),
        ("license: [", "the head of README.md is damaged"),
        ("- a", "the head of README.md is damaged"),
        ("", "names no license"),
    ],
)
def test_a_written_card_that_may_not_go_up(head: str, words: str) -> None:
    claim = claim_license(config(teacher="cc-by-nc-4.0"), None, confirmed=False)
    with pytest.raises(CheckpointError, match=words):
        license_of_card(card(head), claim, "README.md")


def test_a_card_without_a_head_names_no_license() -> None:
    claim = claim_license(config(teacher="mit"), None, confirmed=False)
    with pytest.raises(CheckpointError, match="names no license"):
        license_of_card("# Mine\n", claim, "README.md")


def test_a_card_and_the_user_must_say_the_same() -> None:
    claim = claim_license(config(), "mit", confirmed=False)
    with pytest.raises(CheckpointError, match=r"is apache-2\.0, but the student would be pushed under mit"):
        license_of_card(card("license: apache-2.0"), claim, "README.md")
    assert license_of_card(card("license: MIT"), claim, "README.md") == "mit"


def test_what_is_confirmed_goes_up() -> None:
    made = config(teacher="cc-by-nc-4.0")
    assert (
        license_of_card(card("license: mit"), claim_license(made, None, confirmed=True), "README.md") == "mit"
    )
    claim = claim_license(made, None, confirmed=True)
    assert license_of_card(card("tags: [a]"), claim, "README.md") == "cc-by-nc-4.0"


@pytest.mark.parametrize("name", ["dinov3-license", "a-license-of-nobody"])
def test_a_license_that_the_hub_does_not_list_is_known_by_its_name(name: str) -> None:
    claim = claim_license(config(teacher=name), None, confirmed=False)
    assert license_of_card(card(f"license: other\nlicense_name: {name}"), claim, "README.md") == name


@pytest.mark.parametrize(
    "head", ["a: " + "[" * 20_000, "&a [*a]", "a: !!bool x", "license: !!timestamp x", "- 1"]
)
def test_a_head_that_is_no_metadata_is_refused(head: str) -> None:
    with pytest.raises(CheckpointError, match=r"^the head of README\.md is damaged: "):
        license_of_card(
            f"---\n{head}\n---\n# x\n", claim_license(config("mit"), None, confirmed=False), "README.md"
        )
