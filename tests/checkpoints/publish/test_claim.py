"""Which licence a student is published under, and what a card that somebody wrote may say of it."""

from __future__ import annotations

from typing import Any

import pytest
from graftvit.checkpoints.publish.claim import claim_licence, licence_of_card
from graftvit.models.errors import CheckpointError


def config(own: str | None = None, **origins: Any) -> dict[str, Any]:
    """A config.json with the licence of its weights, and of its teacher and its start where they are given."""
    made = {key: {"source": "x", "licence": licence} for key, licence in origins.items()}
    return {"pretrained_cfg": {"license": own} if own else {}, "graftvit": made}


def card(head: str) -> str:
    return f"---\n{head}\n---\n# Mine\n"


@pytest.mark.parametrize(
    ("made", "licence"),
    [
        (config(), None),
        (config(own="mit"), "mit"),
        (config(teacher="cc-by-nc-4.0"), "cc-by-nc-4.0"),
        (config(teacher="CC-BY-NC-4.0", init="apache-2.0"), "cc-by-nc-4.0"),
        (config(own="mit", teacher="cc-by-nc-4.0"), "cc-by-nc-4.0"),
        (config(teacher=None), None),
        (config(teacher="mit", init=None), None),
        (config(own="cc-by-nc-4.0", teacher=None), "cc-by-nc-4.0"),
        ({}, None),
        ({"graftvit": None, "pretrained_cfg": None}, None),
    ],
)
def test_what_is_carried(made: dict[str, Any], licence: str | None) -> None:
    assert claim_licence(made, None, confirmed=False).licence == licence


def test_a_laxer_one_must_be_confirmed() -> None:
    made = config(teacher="cc-by-nc-4.0")
    with pytest.raises(CheckpointError, match=r"--licence mit is laxer than cc-by-nc-4\.0"):
        claim_licence(made, "mit", confirmed=False)
    assert claim_licence(made, "mit", confirmed=True).licence == "mit"
    assert claim_licence(made, "cc-by-nc-sa-4.0", confirmed=False).licence == "cc-by-nc-sa-4.0"


def test_weights_that_let_nobody_share_must_be_confirmed_even_without_a_name() -> None:
    made = config(teacher="cc-by-nc-nd-4.0")
    with pytest.raises(CheckpointError, match="lets nobody share"):
        claim_licence(made, None, confirmed=False)
    assert claim_licence(made, None, confirmed=True).licence == "cc-by-nc-nd-4.0"


def test_two_that_contradict_each_other_ask_for_a_choice() -> None:
    made = config(teacher="gpl-3.0", init="cc-by-nc-4.0")
    with pytest.raises(CheckpointError, match=r"gpl-3\.0 and cc-by-nc-4\.0.*--confirm_licence"):
        claim_licence(made, None, confirmed=False)
    with pytest.raises(CheckpointError, match=r"gpl-3\.0 is not cc-by-nc-4\.0"):
        claim_licence(made, "gpl-3.0", confirmed=False)
    assert claim_licence(made, "gpl-3.0", confirmed=True).licence == "gpl-3.0"


@pytest.mark.parametrize(
    ("head", "licence"),
    [
        ("license: cc-by-nc-4.0", "cc-by-nc-4.0"),
        ("license: CC-BY-NC-SA-4.0", "cc-by-nc-sa-4.0"),
        ("license: [cc-by-nc-4.0]", "cc-by-nc-4.0"),
    ],
)
def test_a_written_card_decides_where_the_user_names_none(head: str, licence: str) -> None:
    claim = claim_licence(config(teacher="cc-by-nc-4.0"), None, confirmed=False)
    assert licence_of_card(card(head), claim, "README.md") == licence


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ("license: mit", "the licence in README.md mit is laxer than cc-by-nc-4.0"),
        ("license: [cc-by-nc-4.0, mit]", "mit is laxer"),
        ("license: unknown", "unknown is not cc-by-nc-4.0"),
        ("tags: [a]", "README.md names no licence.*`license: cc-by-nc-4.0`"),
        ("license: lgpl-9", "'lgpl-9' is no licence identifier of the hub: did you mean 'lgpl'"),
        ("license: other\nlicense_name: dinov3-license", "dinov3-license is not cc-by-nc-4.0"),
        ("license: {a: b}", "is no licence identifier"),
        ("license: [", "the head of README.md is damaged"),
        ("- a", "the head of README.md is damaged"),
        ("", "names no licence"),
    ],
)
def test_a_written_card_that_may_not_go_up(head: str, words: str) -> None:
    claim = claim_licence(config(teacher="cc-by-nc-4.0"), None, confirmed=False)
    with pytest.raises(CheckpointError, match=words):
        licence_of_card(card(head), claim, "README.md")


def test_a_card_without_a_head_names_no_licence() -> None:
    claim = claim_licence(config(teacher="mit"), None, confirmed=False)
    with pytest.raises(CheckpointError, match="names no licence"):
        licence_of_card("# Mine\n", claim, "README.md")


def test_a_card_and_the_user_must_say_the_same() -> None:
    claim = claim_licence(config(), "mit", confirmed=False)
    with pytest.raises(CheckpointError, match=r"is apache-2\.0, but the student would be pushed under mit"):
        licence_of_card(card("license: apache-2.0"), claim, "README.md")
    assert licence_of_card(card("license: MIT"), claim, "README.md") == "mit"


def test_what_is_confirmed_goes_up() -> None:
    made = config(teacher="cc-by-nc-4.0")
    assert (
        licence_of_card(card("license: mit"), claim_licence(made, None, confirmed=True), "README.md") == "mit"
    )
    claim = claim_licence(made, None, confirmed=True)
    assert licence_of_card(card("tags: [a]"), claim, "README.md") == "cc-by-nc-4.0"


def test_a_licence_that_the_hub_does_not_list_is_known_by_its_name() -> None:
    claim = claim_licence(config(teacher="dinov3-license"), None, confirmed=False)
    head = "license: other\nlicense_name: dinov3-license"
    assert licence_of_card(card(head), claim, "README.md") == "dinov3-license"


@pytest.mark.parametrize(
    "head", ["a: " + "[" * 20_000, "&a [*a]", "a: !!bool x", "license: !!timestamp x", "- 1"]
)
def test_a_head_that_is_no_metadata_is_refused(head: str) -> None:
    with pytest.raises(CheckpointError, match=r"^the head of README\.md is damaged: "):
        licence_of_card(
            f"---\n{head}\n---\n# x\n", claim_licence(config("mit"), None, confirmed=False), "README.md"
        )
