"""One sentence stays one sentence, whatever names are in it."""

from __future__ import annotations

import pickle
import re

import pytest
from graftvit.models.errors import (
    LONGEST,
    CheckpointError,
    ConfigError,
    GraftError,
    counted,
    did_you_mean,
    escaped,
    install_command,
    one_sentence,
)
from hypothesis import given
from hypothesis import strategies as st


@given(st.text())
def test_a_sentence_is_one_line_that_steers_no_terminal(text: str) -> None:
    said = str(GraftError(text))
    assert said.isprintable()
    assert len(said) <= LONGEST
    assert said == one_sentence(said)


@pytest.mark.parametrize("length", [6_000, 200_000])
def test_a_name_is_abbreviated_and_its_ends_stay(length: int) -> None:
    said = str(
        CheckpointError(f"/home/{'a' * length}/end.pth cannot be read: it is damaged; give another file")
    )
    assert said.startswith("/home/aaaa")
    assert "end.pth cannot be read: it is damaged; give another file" in said
    assert f"({length + 14:,} characters)" in said
    assert len(said) < 500


def test_a_list_without_end_is_abbreviated_and_the_advice_stays() -> None:
    names = ", ".join(f"blocks.{number}.attn.qkv.weight" for number in range(20_000))
    said = str(ConfigError(f"these do not fit: {names}: give another model"))
    assert said.startswith("these do not fit: blocks.0.attn")
    assert said.endswith("blocks.19999.attn.qkv.weight: give another model")
    assert len(said) <= LONGEST


def test_what_people_write_stays_as_it_is() -> None:
    plain = "--blr is 'größer', but must be a number of at least 0 (see 学習率); did you mean …? valid: a, b"
    assert str(ConfigError(plain)) == plain
    assert str(ConfigError("one\n  two\tthree\r\n")) == "one two three"
    assert str(ConfigError("'a  b' is no time")) == "'a  b' is no time"


def test_what_would_steer_a_terminal_is_shown() -> None:
    said = str(ConfigError("a\x1b[31mred\x07 b\u202egnp.exe \x9b2J \udcff \u200b"))
    assert said == r"a\x1b[31mred\x07 b\u202egnp.exe \x9b2J \udcff \u200b"


def test_the_error_itself_is_whole_and_can_be_sent() -> None:
    error = pickle.loads(pickle.dumps(ConfigError("a\n" + "b" * 9_000)))
    assert error.args == ("a\n" + "b" * 9_000,)
    assert len(str(error)) < 500


def test_lines_and_columns_of_a_text_stay() -> None:
    assert escaped("a\tb\n\x1b[1mc\r") == "a\tb\n\\x1b[1mc\\r"


def test_one_and_several_are_counted_in_their_words() -> None:
    assert [counted(count, "batch") for count in (0, 1, 2)] == ["0 batches", "1 batch", "2 batches"]
    assert [counted(count, "process") for count in (1, 3)] == ["1 process", "3 processes"]
    assert counted(5, "epoch") == "5 epochs"


def test_of_equally_similar_names_the_one_with_the_same_beginning_is_nearest() -> None:
    assert did_you_mean("attnzero_106", ["attnzero_140", "attnzero_105"]).startswith(
        "did you mean 'attnzero_105'?"
    )
    assert did_you_mean("zzz", ["linear", "agent"]) == "valid: agent, linear"


def test_a_missing_extra_is_installed_by_the_names_of_its_packages() -> None:
    """The name of this package says nothing where it is installed from a clone or a wheel."""
    assert re.fullmatch(
        r"pip install 'onnx>=[\d.]+' 'onnxruntime>=[\d.]+' 'onnxscript>=[\d.]+'", install_command("export")
    )
