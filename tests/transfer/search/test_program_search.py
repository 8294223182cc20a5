"""A search: its generations, its records, and the same archive after any stop."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from graftvit.models.errors import ConfigError
from graftvit.models.programs.program import parse_program
from graftvit.transfer.cells import Share, parse_share, save_first
from graftvit.transfer.search import program_search
from graftvit.transfer.search.program_search import (
    ARCHIVE,
    LAYERS,
    Evaluation,
    front,
    hypervolume,
    open_search,
    propose,
    recorded_generations,
    run_search,
)
from support.runs.search_runs import search, silent


class KilledError(Exception):
    """A stop between two records."""


def test_a_stopped_search_ends_in_the_same_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_search(search(tmp_path / "whole"), 4, silent)
    cut, saved = search(tmp_path / "cut"), program_search.save_first
    for stop_after in (5, 1, 13):
        left = [stop_after]

        def save(record: Evaluation, folder: Path, left: list[int] = left) -> Evaluation:
            if not left[0]:
                raise KilledError
            left[0] -= 1
            return saved(record, folder)

        monkeypatch.setattr(program_search, "save_first", save)
        with pytest.raises(KilledError):
            run_search(cut, 4, silent)
    monkeypatch.setattr(program_search, "save_first", saved)
    assert run_search(cut, 4, silent) == whole
    assert (tmp_path / "cut" / ARCHIVE).read_bytes() == (tmp_path / "whole" / ARCHIVE).read_bytes()
    assert len(list((tmp_path / "cut" / "cells").iterdir())) == 32


@pytest.mark.parametrize("place", ["cells", "cells/000-000"])
def test_a_link_leads_no_cell_out_of_the_folder(place: str, tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    link = tmp_path / "out" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError, match=r"leads out of \S*out by a link: remove the link"):
        run_search(search(tmp_path / "out"), 1, silent)
    assert not list((tmp_path / "victim").iterdir())


def test_what_is_done_is_not_done_again_and_more_generations_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_search(search(tmp_path), 2, silent)
    assert run_search(search(tmp_path), 3, silent)[:16] == first
    monkeypatch.setattr(program_search, "PROXIES", {})
    assert run_search(search(tmp_path), 2, silent) == first
    with pytest.raises(ConfigError, match="has a search with seed 0, not 1; take another --output_dir"):
        run_search(search(tmp_path, seed=1), 1, silent)
    with pytest.raises(ConfigError, match="has a search with proxy matching, not fitted"):
        run_search(search(tmp_path, proxy="fitted"), 1, silent)
    with pytest.raises(ConfigError, match="has a search with other recorded layers: the weights"):
        run_search(search(tmp_path, weights=1), 1, silent)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(
        ConfigError, match="measured with other settings; take another --output_dir, or remove it"
    ):
        run_search(search(tmp_path, seed=1), 1, silent)


@pytest.mark.parametrize("shares", [2, 3])
def test_shares_of_a_search_end_in_the_same_archive(tmp_path: Path, shares: int) -> None:
    """The first share is killed at once; the last one, alone, does the work of all."""
    whole = run_search(search(tmp_path / "whole"), 3, silent)
    shared = search(tmp_path / "shared").claim()
    shared.evaluate(1, Share(0, shares).order)
    assert len(list((shared.folder / "cells").iterdir())) == 8
    assert run_search(shared, 3, silent, share=Share(shares - 1, shares)) == whole
    assert (shared.folder / ARCHIVE).read_bytes() == (tmp_path / "whole" / ARCHIVE).read_bytes()


def test_a_share_begins_with_its_own_slots() -> None:
    assert Share(1, 3).order(7) == [1, 4, 6, 5, 3, 2, 0]
    assert parse_share("2/4") == Share(1, 4)
    parts = [Share(1, 2).part(index, 3) for index in range(3)]
    assert sorted(slot for part in parts for slot in part.order(12)[:2]) == [1, 3, 5, 7, 9, 11]
    for wrong in ("2", "0/2", "3/2", "a/b", "1/0"):
        with pytest.raises(ConfigError, match="give a share, such as 2/4"):
            parse_share(wrong)


def test_the_record_of_the_first_writer_stays(tmp_path: Path) -> None:
    first, second = made(0.5, 1), made(0.6, 2)
    (tmp_path / "cell").mkdir()
    assert save_first(first, tmp_path / "cell") == first
    assert save_first(second, tmp_path / "cell") == first
    assert [path.name for path in (tmp_path / "cell").iterdir()] == ["cell.json"]


def test_all_processes_measure_on_the_recorded_layers_of_the_folder(tmp_path: Path) -> None:
    first = search(tmp_path).claim()
    there = open_search(tmp_path)
    assert there.settings == first.settings
    for mine, read in zip(first.layers, there.layers, strict=True):
        assert all(torch.equal(getattr(mine, part), getattr(read, part)) for part in ("q", "k", "v", "out"))
    (tmp_path / LAYERS).write_bytes(b"no layers")
    with pytest.raises(ConfigError, match="not readable as recorded layers; remove it"):
        open_search(tmp_path)
    with pytest.raises(ConfigError, match="has no search: give the --output_dir"):
        open_search(tmp_path / "cells")


def test_a_generation_with_a_missing_record_is_not_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record can vanish at any moment, also after the search has looked whether it is there."""
    done = run_search(search(tmp_path), 1, silent)
    there = open_search(tmp_path)
    assert there.recorded([]) == recorded_generations(there) == done
    monkeypatch.setattr(program_search, "load_record", lambda kind, folder: None)
    assert there.recorded([]) is None
    assert recorded_generations(there) == []


def test_programs_are_new_and_children_of_what_was_measured(tmp_path: Path) -> None:
    done = run_search(search(tmp_path), 5, silent)
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


def test_the_proxy_decides_what_is_measured(tmp_path: Path) -> None:
    """The first generation is the same; a fit has a say in the error of what it can change."""
    plain = run_search(search(tmp_path / "plain"), 1, silent)
    fitted = run_search(search(tmp_path / "fitted", proxy="fitted"), 1, silent)
    assert [each.program for each in plain] == [each.program for each in fitted]
    assert [each.mismatch for each in plain] != [each.mismatch for each in fitted]


def test_random_generations_have_no_parents(tmp_path: Path) -> None:
    done = run_search(search(tmp_path, at_random=True), 2, silent)
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


def test_the_mismatch_with_each_teacher_is_an_objective(tmp_path: Path) -> None:
    one, other = search(tmp_path / "one"), search(tmp_path / "other", weights=1)
    both = replace(one, folder=tmp_path / "both", teachers=[*one.teachers, *other.teachers])
    done = run_search(both, 3, silent)
    for each in (each for each in done if each.mismatch is not None):
        program = parse_program(each.program)
        assert each.errors == (one.mismatch(program), other.mismatch(program))
        assert each.mismatch == float(f"{sum(each.errors) / 2:.3g}")
        assert each.cost == one.cost(program) + other.cost(program)
    again = replace(both, folder=tmp_path / "again")
    assert run_search(again, 3, silent, workers=2) == done
    assert (again.folder / ARCHIVE).read_bytes() == (both.folder / ARCHIVE).read_bytes()
    assert [len(layers) for layers in open_search(again.folder).teachers] == [1, 1]


def test_the_front_of_several_teachers_has_the_best_of_each() -> None:
    points = [
        replace(made(sum(errors) / 2, cost), errors=errors)
        for errors, cost in (((0.8, 0.8), 10), ((0.9, 0.5), 20), ((0.6, 0.9), 20), ((0.9, 0.6), 30))
    ]
    assert front(points) == [points[0], points[1], points[2]]
    means = [made(0.8, 10), made(0.7, 20)]
    assert hypervolume(points, 10_000) == pytest.approx(hypervolume(means, 10_000))
