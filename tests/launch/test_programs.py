"""`graftvit programs`, `list operators` and `programs search`, as typed."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path

import pytest
from graftvit.models.attention.base import Geometry, LayerShape
from graftvit.models.layer_plan import OPERATORS, Choice, create_operator, options_of
from graftvit.models.plan_syntax import parse_plan
from graftvit.models.programs.program import FOUND
from graftvit.models.programs.program_checks import CHECKS
from graftvit.transfer.search.program_search import ARCHIVE
from PIL import Image
from safetensors.torch import load_file, save_file
from support.files.hostile import ARGUMENTS
from support.models.saved import save_vit
from support.runs.commands import Command, run
from support.runs.typed import Typed


def test_draws_are_counted_with_the_reasons(typed: Typed) -> None:
    said = typed("programs", "draw", "--count", "12", "--seed", "0").out
    head, table = said.split("\n\n", 1)
    assert head.startswith("12 programs drawn with seed 0: 12 do not raise (100.0 %), ")
    passed = int(head.split("%), ")[1].split()[0])
    lines = table.splitlines()
    refused = {line.split()[0]: int(line.split()[1]) for line in lines[1 : 1 + len(CHECKS)]}
    assert list(refused) == [each.name for each in CHECKS]
    assert sum(refused.values()) + passed == 12
    assert len([line for line in lines[1 + len(CHECKS) :] if line]) == passed
    assert typed("programs", "draw", "--count", "12", "--seed", "0").out == said


def test_a_program_is_explained(typed: Typed) -> None:
    said = typed("programs", "check", "attnzero_105").out
    assert FOUND["attnzero_105"] in said
    assert "2 N D^2 multiply-adds a head" in said
    assert "depends on other heads of the image" in said
    assert "passes all checks" in said
    assert "a map     none: minmax(v) is not linear in V" in said
    assert "def attention(q, k, v):" in said
    said = typed("programs", "check", "mul( v  q)").out
    assert "mul(q v)" in said
    assert "fails gradients: K gets no gradient" in said
    assert "a map     the output of a head is M V" in typed("programs", "check", "v").out


def test_every_operator_is_listed_with_its_traits(typed: Typed) -> None:
    head, *lines = typed("list", "operators", "--grid", "4", "16").out.split("\n\n")[0].splitlines()
    assert "MACs 16x16" in head
    rows = {line.split()[0]: line.split() for line in lines}
    assert list(rows) == list(OPERATORS)
    for name, row in rows.items():
        operator = create_operator(Choice(name), LayerShape(12, 64, Geometry(1, (4, 4))))
        traits = operator.traits
        assert row[1:4] == [
            "yes" if holds else "no" for holds in (traits.linear_in_v, traits.needs_grid, traits.bias)
        ]
        assert int(row[4].replace(",", "")) == sum(parameter.numel() for parameter in operator.parameters())
        assert all(f"{option}=" in " ".join(row) for option in options_of(name))
        if traits.linear_cost:
            assert int(row[7]) <= int(row[5]), "against softmax, linear cost falls"


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_explained_as_a_plan_writes_it(name: str, typed: Typed) -> None:
    said = typed("list", "operators", name).out
    operator = OPERATORS[name]
    assert str(inspect.getdoc(getattr(operator, "func", operator))).splitlines()[0] in said
    plan = said.split("in a plan: ")[1].strip().strip("'")
    (choice,) = parse_plan(plan, 1)
    assert choice.operator == name
    create_operator(choice, LayerShape(2, 8, Geometry(1, (4, 4))))


def test_a_found_program_is_shown_with_its_formula(typed: Typed) -> None:
    said = typed("list", "operators", "attnzero_105").out
    assert "code: mul(l2(mm(l2(q) zscore(tn(minmax(v) elu1(k))))) q)" in said
    assert "'*: attnzero_105(local_size=3, prefix=softmax, bias=0)'" in said


@pytest.fixture
def line(tmp_path: Path) -> str:
    """A search over a random teacher."""
    save_vit(tmp_path / "teacher", ARGUMENTS)
    return f"programs search {tmp_path}/teacher --dataset digits --images 4 --population 5 --workers 1"


def test_a_search_prints_its_front_and_resumes(line: str, tmp_path: Path, typed: Typed) -> None:
    out = tmp_path / "found"
    search = f"{line} --generations 2 --output_dir {out}"
    said = typed(search).out
    assert "generation 2 of 2: 10 programs" in said
    archive = json.loads((out / "archive.json").read_text())
    assert archive["evaluated"] == 10
    assert all(each["program"] in said for each in archive["front"])
    assert all(name in said for name in ("softmax", "elu + 1", "values", "attnzero_105"))
    assert typed(search).out == said
    other = f"{out} has a search with at_random False, not True; take another --output_dir"
    assert other in typed(f"{search} --at_random", code=2).err
    assert "has a search with population 5, not 6" in typed(f"{search} --population 6", code=2).err
    (out / "settings.json").write_text('{"seed"')
    assert "settings.json is not readable" in typed(search, code=2).err


def test_a_search_goes_on_with_the_same_teacher_alone(line: str, tmp_path: Path, typed: Typed) -> None:
    search = f"{line} --generations 1 --output_dir {tmp_path}/found"
    typed(search)
    path = tmp_path / "teacher" / "model.safetensors"
    tensors = load_file(path)
    tensors["blocks.0.attn.qkv.weight"][0, 0] += 1e-3
    save_file(tensors, path)
    assert "other recorded layers: the weights or the images have changed" in typed(search, code=2).err


def test_a_search_names_the_images_that_there_are(line: str, tmp_path: Path, typed: Typed) -> None:
    folder, out = tmp_path / "photos", tmp_path / "found"
    for name in range(6):
        (folder / "train" / "one").mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), 40 * name).save(folder / "train" / "one" / f"{name}.png")
    line = line.replace("--dataset digits", f"--data_path {folder}")
    typed(f"{line} --images 4000 --generations 1 --output_dir {out}")
    assert json.loads((out / "settings.json").read_text())["images"] == f"6 of {folder}"


@pytest.mark.slow
def test_a_search_killed_three_times_ends_in_the_same_archive(
    line: str, tmp_path: Path, typed: Typed
) -> None:
    """One process, two and one again end in the archive of one."""
    typed(f"{line} --generations 4 --output_dir {tmp_path}/whole")
    out = tmp_path / "killed"
    words = f"{line} --generations 4 --output_dir {out} --workers".split()
    for records, workers in ((3, "1"), (8, "2"), (14, "1")):
        search = Command([*words, workers], os.environ, tmp_path)
        search.kill_at(lambda records=records: len(list(out.glob("cells/*/cell.json"))) >= records)
        assert not (out / ARCHIVE).exists()
    assert run([*words, "2"], os.environ, tmp_path).returncode == 0
    assert (out / ARCHIVE).read_bytes() == (tmp_path / "whole" / ARCHIVE).read_bytes()
