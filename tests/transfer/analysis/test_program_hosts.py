"""Programs on plain and pyramid hosts: converted, saved and loaded, exported, and their maps drawn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graftvit
import pytest
import torch
from graftvit.checkpoints.export_graph import trace
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from graftvit.models.conversion import convert, converted_layers, plan_of
from graftvit.models.programs.program import LINEAR
from graftvit.transfer.analysis.layer_maps import layer_maps
from support.models import dense, pyramids
from torch import Tensor, nn

MIXED = "mul(l2(mm(q zscore(tn(v elu1(k))))) q)"
PLAN = f"*: program(code={LINEAR}); 0: program(code={MIXED},local_size=0)"
SIZE = (32, 48)
HOSTS = ["vit", *pyramids.TINY]


def student_of(kind: str) -> nn.Module:
    """Return a tiny model in which layer 0 has a program that mixes heads, and the others one that does not."""
    teacher = dense.tiny("vit", dtype=torch.float32) if kind == "vit" else pyramids.tiny(kind, SIZE)
    student = convert(teacher, PLAN, without=[] if kind == "vit" else ["bias"]).eval()
    traits = [layer.operator.traits for layer in converted_layers(student).values()]
    assert [each.independent_heads for each in traits] == [False] + [True] * (len(traits) - 1)
    return student


def architecture_of(kind: str) -> tuple[str, dict[str, Any]]:
    if kind == "vit":
        return dense.FAMILIES["vit"][0], dense.TINY
    return pyramids.TINY[kind][0], pyramids.arguments(kind, SIZE)


def images(batch: int = 3) -> Tensor:
    return pyramids.images(SIZE, batch)


@pytest.mark.parametrize("kind", HOSTS)
def test_programs_give_the_same_alone_and_loaded_again(kind: str, tmp_path: Path) -> None:
    student, x = student_of(kind), images()
    name, arguments = architecture_of(kind)
    shown = Preprocessing.of(student, input_size=(3, *SIZE))
    write_student(student, tmp_path / "student", architecture=name, model_args=arguments, preprocessing=shown)
    loaded = graftvit.load(tmp_path / "student").eval()
    assert plan_of(loaded) == plan_of(student)
    with torch.no_grad():
        out = student(x)
        assert torch.equal(loaded(x), out)
        torch.testing.assert_close(loaded(x[:1]), out[:1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "pvt", "swin"])
def test_the_graph_of_programs_takes_any_number_of_images(kind: str) -> None:
    student = student_of(kind)
    graph = trace(student, images(), ["batch"], (8, 8)).module()
    with torch.no_grad():
        for batch in (1, 4):
            torch.testing.assert_close(graph(images(batch)), student(images(batch)))


@pytest.mark.parametrize("kind", HOSTS)
def test_a_program_with_a_map_shows_it_and_another_its_jacobian(kind: str) -> None:
    student, x = student_of(kind), images(1)
    maps = layer_maps(student, x, [0, 1], asking={0: 2})
    assert maps[0].weights.shape[2] == 1
    assert maps[0].weights.any()
    assert maps[0].weights.isfinite().all()
    rows = maps[1].dense()
    assert bool((rows >= 0).all())
    torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]), atol=1e-3, rtol=0)
