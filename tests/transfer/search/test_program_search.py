"""A search: its generations, its records, and the same archive after any stop."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from graftvit.models.errors import ConfigError
from graftvit.transfer.search import program_search
from graftvit.transfer.search.evolution import Evaluation, front, hypervolume, propose
from graftvit.transfer.search.matching import RecordedLayer
from graftvit.transfer.search.program_search import ARCHIVE, Search, SearchSettings


def search(folder: Path, weights: int = 0, **changes: object) -> Search:
    x = torch.randn(3, 4, 2, 9, 4, generator=torch.Generator().manual_seed(weights))
    q, k, v = x.unbind(0)
    layer = RecordedLayer(q, k, v, torch.nn.functional.scaled_dot_product_attention(2 * q, k, v))
    settings = {
        "seed": 0,
        "population": 8,
        "at_random": False,
        "teacher": "one layer",
        "images": "4",
        **changes,
    }
    return Search(folder, SearchSettings(**settings), [layer])  # type: ignore[arg-type]


def silent(line: str) -> None:
    """Say nothing."""


class KilledError(Exception):
    """A stop between two records."""


def test_a_stopped_search_ends_in_the_same_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = search(tmp_path / "whole").run(4, silent)
    cut, saved = search(tmp_path / "cut"), program_search.save_record
    for stop_after in (5, 1, 13):
        left = [stop_after]

        def save(record: object, folder: Path, left: list[int] = left) -> None:
            if not left[0]:
                raise KilledError
            left[0] -= 1
            saved(record, folder)

        monkeypatch.setattr(program_search, "save_record", save)
        with pytest.raises(KilledError):
            cut.run(4, silent)
    monkeypatch.setattr(program_search, "save_record", saved)
    assert cut.run(4, silent) == whole
    assert (tmp_path / "cut" / ARCHIVE).read_bytes() == (tmp_path / "whole" / ARCHIVE).read_bytes()
    assert len(list((tmp_path / "cut" / "cells").iterdir())) == 32


def test_what_is_done_is_not_done_again_and_more_generations_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = search(tmp_path).run(2, silent)
    assert search(tmp_path).run(3, silent)[:16] == first
    monkeypatch.setattr(program_search, "mismatch", None)
    assert search(tmp_path).run(2, silent) == first
    with pytest.raises(ConfigError, match="has a search with seed 0, not 1; take another --out"):
        search(tmp_path, seed=1).run(1, silent)
    with pytest.raises(ConfigError, match="has a search with other recorded layers: the weights"):
        search(tmp_path, weights=1).run(1, silent)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ConfigError, match="measured with other settings; take another --out, or remove it"):
        search(tmp_path, seed=1).run(1, silent)


def test_programs_are_new_and_children_of_what_was_measured(tmp_path: Path) -> None:
    done = search(tmp_path).run(5, silent)
    texts = [each.program for each in done]
    assert len(set(texts)) == len(texts) == 40
    for each in done[8:]:
        assert each.parents
        before = {
            one.program for one in done if one.generation < each.generation and one.mismatch is not None
        }
        assert set(each.parents) <= before
    assert not any(each.parents for each in done[:8])
    assert all((each.mismatch is None) == bool(each.refused) for each in done)
    archive = json.loads((tmp_path / ARCHIVE).read_text())
    assert archive["evaluated"] == 40
    assert sum(archive["refused"].values()) == sum(bool(each.refused) for each in done)
    assert [each["program"] for each in archive["front"]] == [each.program for each in front(done)]


def test_random_generations_have_no_parents(tmp_path: Path) -> None:
    done = search(tmp_path, at_random=True).run(2, silent)
    assert not any(each.parents for each in done)
    assert propose(0, 1, 3, done) != propose(0, 1, 3, done, at_random=True)


def made(mismatch: float | None, cost: int) -> Evaluation:
    return Evaluation("", program=f"{mismatch} {cost}", mismatch=mismatch, cost=cost)


def test_the_front_is_what_nothing_beats() -> None:
    best = [made(0.9, 10), made(0.5, 100), made(0.1, 1000)]
    worse = [made(0.9, 11), made(0.5, 2000), made(None, 1), made(0.95, 10), made(0.1, 1001)]
    assert front([*worse, *best]) == best
    assert front([]) == []


def test_the_hypervolume_is_the_area_that_the_front_dominates() -> None:
    points = [made(0.9, 10), made(0.5, 100), made(0.2, 1000)]
    wanted = (0.1 * 1 + 0.5 * 1 + 0.8 * 1) / 4
    assert hypervolume(points, 10_000) == pytest.approx(wanted)
    assert hypervolume([*points, made(2.0, 1), made(0.4, 20_000)], 10_000) == pytest.approx(wanted)
    assert hypervolume([], 10_000) == 0
    assert hypervolume([made(0.0, 1)], 10_000) == pytest.approx(1.0)
    assert math.isclose(hypervolume([made(0.5, 100)], 10_000), 0.25)
