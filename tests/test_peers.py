"""The forms beside which operators are timed: what they compute, and how they are shown."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from graftvit.models.attention.base import Geometry, LayerShape
from graftvit.models.errors import ConfigError
from graftvit.models.layer_plan import FASTER_FROM, OPERATORS, Choice, create_operator
from graftvit.transfer.analysis.benchmark import Layer
from graftvit.transfer.analysis.benchmark_cases import SOFTMAX
from support.models.operator_cases import CASES, HEADS, WIDTH, Case, draw

from benchmarks import forms, peers

ROOT = Path(__file__).resolve().parent.parent
PUBLIC, public_form, straight_form = forms.PUBLIC, forms.public_form, forms.straight_form
GRID = Geometry(0, (6, 8))
FORMED = {
    name for name in OPERATORS if straight_form(create_operator(Choice(name), LayerShape(HEADS, WIDTH, GRID)))
}


def test_every_operator_that_claims_to_be_fast_has_a_form() -> None:
    assert set(FASTER_FROM) <= FORMED


FORMED_CASES = [*map(Case, sorted(FORMED)), *(case for case in CASES if case.operator in ("sla", "topk"))]


@pytest.mark.parametrize("case", FORMED_CASES, ids=str)
def test_the_straight_line_form_is_the_operator(case: Case) -> None:
    operator, heads = case.build(GRID), draw(GRID)
    form = straight_form(operator)
    assert form is not None
    torch.testing.assert_close(form(heads), operator(heads), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{"local": "dynamic"}, {"rope": True}], ids=str)
def test_the_straight_line_form_of_an_option_is_the_operator(options: dict[str, object]) -> None:
    operator, heads = Case("kernel", options).build(GRID), draw(GRID)
    torch.testing.assert_close(straight_form(operator)(heads), operator(heads), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", sorted(PUBLIC))
@pytest.mark.parametrize("grid", [(6, 8), (7, 7)], ids=str)
def test_public_implementations_take_the_same_projections(name: str, grid: tuple[int, int]) -> None:
    pytest.importorskip(PUBLIC[name].module.split(".")[0])
    geometry = Geometry(0, grid)
    operator, heads = Case(name).build(geometry, torch.float32), draw(geometry, torch.float32)
    found = public_form(name, operator, heads)
    assert found is not None
    package, call, parameters = found
    leaves = [x.requires_grad_() for x in heads.qkv()]
    out = call(*heads.qkv())
    assert package == PUBLIC[name].package
    assert out.shape == heads.values().shape
    gradients = torch.autograd.grad(out.sum(), [*leaves, *parameters], allow_unused=True)
    assert all(gradient is not None for gradient in gradients[:3])


def test_the_public_form_of_linear_is_its_equation() -> None:
    """But for the centered keys, to which its map is not invariant."""
    pytest.importorskip("kornia")
    operator, heads = Case("linear").build(GRID), draw(GRID)
    found = public_form("linear", operator, heads)
    assert found is not None
    q, k, v = heads.qkv()
    centered = k - k.mean(2, keepdim=True)
    torch.testing.assert_close(found[1](q, centered, v), operator(heads), rtol=1e-4, atol=1e-6)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_package.py").write_text("import a_package_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    operator, heads = Case("linear").build(GRID), draw(GRID)
    for module, words in [
        ("a_package_that_nobody_has", r"is not installed; pip install 'kornia>="),
        ("broken_package", r"cannot be imported \(No module named 'a_package_that"),
    ]:
        monkeypatch.setitem(PUBLIC, "linear", PUBLIC["linear"]._replace(module=module))
        with pytest.raises(ConfigError, match=f"kornia, which {words}"):
            public_form("linear", operator, heads)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_forms_take_turns_with_the_operator(backward: bool) -> None:
    pytest.importorskip("performer_pytorch")
    found = peers.measure("performer", 64, backward, Layer(2, 8), 2)
    assert found.own > 0
    assert (found.straight or 0) > 0
    assert (found.public or 0) > 0
    assert found.package == "performer-pytorch"
    alone = peers.measure(SOFTMAX, 64, backward, Layer(2, 8), 2)
    assert (alone.straight, alone.public, alone.package) == (None, None, "")


def test_the_table_has_a_blank_where_there_is_no_other_form() -> None:
    found = peers.table(
        [
            peers.Peers("linear", 64, False, 0.02, 0.04, 0.01, "theirs"),
            peers.Peers("ttt", 64, False, 0.02, None, None, ""),
        ]
    )
    assert "| linear | 20 | 40 | 0.50 | theirs | 10 | 2.00 |" in found
    assert "| ttt | 20 |  |  |  |  |  |" in found


def test_the_page_has_the_stored_tables() -> None:
    page = (ROOT / "docs" / "efficiency.md").read_text()
    assert all(part in page for part in peers.tables(peers.read(peers.RESULTS)))
