"""`graftvit hybrid`, as typed."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import graftvit
import pytest
import torch
from graftvit.models.conversion import converted_layers, plan_of
from graftvit.transfer.config import DataConfig
from graftvit.transfer.hybrid_search import Scale
from support.runs.commands import Command, run
from support.runs.engine_runs import make_teacher
from support.runs.typed import Typed
from torch import nn

WORDS = (
    "--operators", "linear,uniform", "--dataset", "digits", "--batch_size", "8", "--workers", "0", "--device", "cpu",
    "--max_steps", "4", "--images", "16",
)  # fmt: skip


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    return f"local-dir:{make_teacher(tmp_path / 'teacher')}"


def test_hybrids_are_written_and_another_budget_trains_nothing(
    tmp_path: Path, teacher: str, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    said = typed("hybrid", teacher, "--macs", "0.91,0.82", *WORDS, "--output_dir", out).out
    first, second = (graftvit.load(out / f"macs-{share}") for share in ("0.91", "0.82"))
    assert plan_of(first) != plan_of(second)
    assert str(plan_of(first)) in said
    assert (out / "front.png").read_bytes().startswith(b"\x89PNG")
    for layer, own in converted_layers(first).items():
        aligned = graftvit.load(out / "library" / own.choice.operator)
        theirs = converted_layers(aligned)[layer].state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in own.state_dict().items())
    monkeypatch.setattr("graftvit.transfer.engine.loop.Loop._backward", None)
    known = (out / "hybrid.jsonl").read_text()
    typed("hybrid", teacher, "--keep", "1", *WORDS, "--output_dir", out)
    typed(
        "hybrid", teacher, "--macs", "0.91", "--cost_batch", "2", *WORDS, "--images", "8", "--output_dir", out
    )
    assert (out / "hybrid.jsonl").read_text().startswith(known)
    assert len(converted_layers(graftvit.load(out / "keep-1"))) == 1
    assert plan_text(out / "macs-0.91-batch2")


def plan_text(folder: Path) -> str:
    return str(plan_of(graftvit.load(folder)))


def test_without_a_budget_latencies_from_the_teacher_to_the_cheapest(
    tmp_path: Path, teacher: str, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def costs(self: Scale, measure: str, models: dict[str, nn.Module]) -> dict[str, float]:
        return {name: 1.0 - len(converted_layers(each)) / 4 for name, each in models.items()}

    monkeypatch.setattr("graftvit.transfer.hybrid_search.Scale.costs", costs)
    graftvit.save(graftvit.convert(teacher, "*: uniform"), tmp_path / "cheap")
    out = tmp_path / "out"
    words = ["--student", f"cheap={tmp_path / 'cheap'}", *WORDS[2:], "--output_dir", out]
    typed("hybrid", teacher, *words)
    assert not (out / "library").exists()
    found = {path.name: len(converted_layers(graftvit.load(path))) for path in out.glob("latency-*")}
    assert found == {"latency-0.9": 1, "latency-0.8": 1, "latency-0.7": 2, "latency-0.6": 2, "latency-0.5": 2}


def test_the_command_that_recovers_a_hybrid_is_of_its_images_and_of_a_folder_of_its_own(
    tmp_path: Path, teacher: str, typed: Typed
) -> None:
    out = tmp_path / "out"
    said = typed("hybrid", teacher, "--keep", "1,0", *WORDS, "--output_dir", out).out
    for line in [line for line in said.splitlines() if "recover it" in line]:
        typed(*shlex.split(line.partition(": ")[2])[1:], "--max_steps", "2")
    for name in ("keep-1", "keep-0"):
        before, after = graftvit.load(out / name), graftvit.load(out / f"{name}-recovered")
        assert str(plan_of(after)) == str(plan_of(before))
        known = before.state_dict()
        changed = {name for name, each in after.state_dict().items() if not torch.equal(each, known[name])}
        converted = {f"blocks.{layer}.attn" for layer in converted_layers(before)}
        assert {".".join(name.split(".")[:3]) for name in changed} == converted


def test_each_measure_has_a_table_of_its_own(tmp_path: Path, teacher: str, typed: Typed) -> None:
    graftvit.save(graftvit.convert(teacher, "*: uniform"), tmp_path / "cheap")
    words = ["--student", f"cheap={tmp_path / 'cheap'}", *WORDS[2:], "--output_dir", tmp_path / "out"]
    first, second, *_ = typed("hybrid", teacher, "--macs", "0.95", "--keep", "1", *words).out.split("\n\n")
    assert "macs 0.95" in first
    assert "keep" not in first.splitlines()[0]
    assert "keep 1" in second
    assert "macs" not in second.splitlines()[0]


def test_shares_align_their_own_operators_and_the_last_one_chooses(
    tmp_path: Path, teacher: str, typed: Typed
) -> None:
    words = ["hybrid", teacher, "--macs", "0.91", *WORDS, "--output_dir"]
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    typed(*words, whole)
    typed(*words, shared, "--share", "1/2")
    assert [path.name for path in (shared / "library").iterdir()] == ["linear"]
    assert not (shared / "macs-0.91").exists()
    typed(*words, shared, "--share", "2/2")
    assert plan_text(shared / "macs-0.91") == plan_text(whole / "macs-0.91")
    records = [
        {record["key"]: record["value"] for record in map(json.loads, (folder / "hybrid.jsonl").open())}
        for folder in (whole, shared)
    ]
    assert records[0] == records[1]


def test_top1_is_told_of_validation_images_of_the_teachers_classes(
    tmp_path: Path, teacher: str, typed: Typed
) -> None:
    graftvit.save(graftvit.convert(teacher, "*: uniform"), tmp_path / "cheap")
    words = ["--macs", "0.95", "--student", f"cheap={tmp_path / 'cheap'}", *WORDS[2:], "--output_dir"]
    said = typed("hybrid", teacher, *words, tmp_path / "ten", "--validation", "100").out
    data = DataConfig(dataset="digits", workers=0)
    told = float(next(line for line in said.splitlines() if line.startswith("teacher")).split()[1])
    assert abs(told - graftvit.evaluate(graftvit.load(teacher), data).top1) < 20, "100 of the images"
    assert (tmp_path / "ten" / "front_top1.png").exists()
    three = graftvit.load(teacher)
    three.reset_classifier(3)
    graftvit.save(three, tmp_path / "three")
    graftvit.save(graftvit.convert(three, "*: uniform"), tmp_path / "cheap", overwrite=True)
    shown = typed("hybrid", tmp_path / "three", *words, tmp_path / "out")
    assert "top-1 is not measured" in shown.err
    assert "top-1" not in shown.out
    assert not (tmp_path / "out" / "front_top1.png").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--macs", "1.5"], "--macs"),
        (["--macs", "x"], "--macs"),
        (["--keep", "-1"], "--keep"),
        (["--macs", "0.9", "--operators", "nosuch"], "nosuch"),
        (["--macs", "0.9", "--student", "linear"], "--student"),
        (["--macs", "0.9", "--student", "own=/nowhere/at/all"], "/nowhere/at/all"),
        (["--macs", "0.9", "--student", "linear=x"], "linear"),
        (["--macs", "0.9", "--student", "keep=x"], "keep"),
        (["--macs", "0.9", "--student", "own=x", "--student", "own=y"], "own"),
        (["--macs", "0.01"], "cheapest"),
        (["--macs", "0.9", "--share", "3/2"], "--share"),
    ],
)
def test_mistakes_are_named(words: list[str], named: str, tmp_path: Path, teacher: str, typed: Typed) -> None:
    out = tmp_path / "out"
    assert named in typed("hybrid", teacher, *WORDS, *words, "--output_dir", out, code=2).err
    assert not (out / "library").exists(), "what can be known first is refused before anything is trained"


@pytest.mark.slow
def test_a_search_that_is_killed_in_each_phase_gives_the_same_plan(tmp_path: Path, teacher: str) -> None:
    words = ["hybrid", teacher, "--macs", "0.91,0.82", *WORDS, "--output_dir"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run([*words, str(whole)], os.environ, tmp_path).returncode == 0
    keys = [json.loads(line)["key"] for line in (whole / "hybrid.jsonl").open()]
    first = next(place for place, key in enumerate(keys) if key.startswith("error"))

    def lines(path: str, count: int) -> Callable[[], bool]:
        """Return whether a file of the search has so many lines."""
        return lambda: (cut / path).exists() and (cut / path).read_text().count("\n") >= count

    moments = [
        *(lines("hybrid.jsonl", count) for count in (1, 2, first)),  # costs before the library
        *(
            lines(f"library/{name}/log.jsonl", count)
            for name, count in (("linear", 1), ("uniform", 1), ("linear", 3))
        ),
        *(lines("hybrid.jsonl", first + count) for count in (1, 2, 3)),  # errors of single replacements
        *(lines("hybrid.jsonl", len(keys) - count) for count in (3, 2, 1)),  # the choice
        *((cut / path).exists for path in ("front.png", "macs-0.91", "macs-0.82")),  # what comes out
    ]
    for moment in moments:
        Command([*words, str(cut)], os.environ, tmp_path).kill_at(moment)
    assert run([*words, str(cut)], os.environ, tmp_path).returncode == 0
    for name in ("macs-0.91", "macs-0.82"):
        assert plan_text(whole / name) == plan_text(cut / name)
        own, theirs = (graftvit.load(folder / name).state_dict() for folder in (cut, whole))
        assert own.keys() == theirs.keys()
        assert all(torch.equal(own[key], theirs[key]) for key in own)
    records = [[json.loads(line) for line in (folder / "hybrid.jsonl").open()] for folder in (whole, cut)]
    assert {each["key"]: each["value"] for each in records[0]} == {
        each["key"]: each["value"] for each in records[1]
    }
