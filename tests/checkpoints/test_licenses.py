"""Which license a student carries, and what of a text may be shown."""

from __future__ import annotations

import contextlib

import pytest
from graftvit.checkpoints.licenses import (
    card_fields,
    carried,
    check_named,
    check_shareable,
    normalize,
    public,
    public_text,
)
from graftvit.checkpoints.markdown import code, fenced, plain
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


@pytest.mark.parametrize(("written", "identifier"), [
    ("Apache-2.0", "apache-2.0"), ("apache 2.0", "apache-2.0"), ("CC-BY-NC-4.0", "cc-by-nc-4.0"),
    ("CC0", "cc0-1.0"), ("GPL-3.0-or-later", "gpl-3.0"), ("AGPL-3.0-only", "agpl-3.0"),
    ("LGPL-2.1-or-later", "lgpl-2.1"), ("BSD-3-Clause", "bsd-3-clause"),
])  # fmt: skip
def test_the_ways_of_writing_an_identifier(written: str, identifier: str) -> None:
    assert normalize(written) == identifier
    assert check_named(written) == identifier


@pytest.mark.parametrize(("wrong", "nearest"), [
    ("apache", "apache-2.0"), ("cc-by-nc", "cc-by-nc-4.0"), ("cc-by-sa", "cc-by-sa-4.0"),
    ("dinov3", "dinov3-license"),
])  # fmt: skip
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


# No path of this machine gets out; what only looks like one stays.


@pytest.mark.parametrize(("key", "text", "shown"), [
    ("source", "/home/me/mae.pth", "mae.pth"),
    ("source", "runs/mine/student", "student"),
    ("source", "local-dir:/home/me/runs/a#ema", "local-dir:a#ema"),
    ("source", "local-dir:runs/mine/", "local-dir:mine"),
    ("init", "~/weights/my own.safetensors", "my own.safetensors"),
    ("init", "~me/weights/a.pth#student", "a.pth#student"),
    ("data_path", "C:\\Users\\me\\imagenet", "imagenet"),
    ("data_path", "\\\\server\\share\\imagenet", "imagenet"),
    ("data_path", "data/imagenet", "imagenet"),
    ("data_path", "https://host/a/train.tar?token=abc", "train.tar"),
    ("output_dir", "../runs/x", "x"),
    ("anything", "/home/my name/x.json", "x.json"),
    ("anything", "file:///home/me/x.json", "x.json"),
    ("anything", "read --from=/home/me/x.json now", "read --from=x.json now"),
    ("anything", "see D:\\me\\x.json, please", "see x.json, please"),
    ("source", "hf-hub:me/vit@main", "hf-hub:me/vit@main"),
    ("source", "vit_large_patch16_224.mae", "vit_large_patch16_224.mae"),
    ("dataset", "torch/cifar10", "torch/cifar10"),
    ("dataset", "hfds/uoft-cs/cifar100", "hfds/uoft-cs/cifar100"),
    ("trainable", r"blocks\.(0|1)\..*|head|\.x", r"blocks\.(0|1)\..*|head|\.x"),
    ("plan", "*: linear; 9-11: softmax", "*: linear; 9-11: softmax"),
    ("origin_url", "https://host.org/a/b", "https://host.org/a/b"),
    ("aa", "rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5-inc1"),
    ("note", "1 / 2 and/or 3", "1 / 2 and/or 3"),
    ("source", "", ""),
])  # fmt: skip
def test_a_path_is_its_last_component(key: str, text: str, shown: str) -> None:
    assert public_text(text, key) == shown


def test_a_config_is_gone_through_to_the_end() -> None:
    config = {
        "recipe": {
            "data": {"data_path": "/secret/a", "n": 3, "scale": [0.1, None]},
            "list": ["/secret/b", ["~/secret/c"]],
        },
        "graftvit": {"teacher": {"source": "local-dir:/secret/d"}, "init": None},
    }
    shown = public(config)
    assert "secret" not in repr(shown)
    assert shown["recipe"]["data"] == {"data_path": "a", "n": 3, "scale": [0.1, None]}
    assert shown["recipe"]["list"] == ["b", ["c"]]
    assert shown["graftvit"] == {"teacher": {"source": "local-dir:d"}, "init": None}
    assert config["recipe"]["data"]["data_path"] == "/secret/a"  # type: ignore[index, call-overload]


# Text in Markdown is text, in whatever it stands.


@pytest.mark.parametrize(("text", "shown"), [
    ("*: linear; 9-11: keep", "*: linear; 9-11: keep"),
    ("[0,3,5] & a", "[0,3,5] &amp; a"),
    ("<img src=x onerror=alert(1)>", "&lt;img src=x onerror=alert(1)&gt;"),
    ("a | b\n\n# c", r"a \| b # c"),
    ("[a](javascript:b) ![a][b] [a]: b", r"[a\](javascript:b) ![a\][b] [a\]: b"),
    ("`a` \x1b[2J", r"\`a\` \x1b[2J"),
])  # fmt: skip
def test_a_text_is_shown_as_it_is(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_code_ends_where_it_ends() -> None:
    assert code("a`b|<i>\n") == r"`a'b\|<i>`"
    assert code(" ") == "(empty)"
    assert fenced("a\n````\n</details>\x1b[2J", "yaml") == "`````yaml\na\n````\n</details>\\x1b[2J\n`````"
