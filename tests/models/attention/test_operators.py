"""What holds for every operator: its paths agree, it is what its traits say, and its options are checked."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from graftvit.models.attention.base import Geometry, LayerShape, LowRank, Sparse, Term, jacobian_rows
from graftvit.models.errors import ConfigError, UnsupportedModelError
from graftvit.models.layer_plan import BUILT_IN, OPERATORS, Choice, create_operator, find_operators
from graftvit.models.programs.program import FOUND
from support.models.operator_cases import CASES, GRIDS, PREFIXES, Case, draw, identity_values
from torch import Tensor

LAYOUTS = [Geometry(prefix, grid) for prefix, grid in zip(PREFIXES, GRIDS, strict=True)]
SMALL, ODD = Geometry(1, (4, 6)), Geometry(5, (7, 9))
cases = pytest.mark.parametrize("case", CASES, ids=str)
dense_cases = pytest.mark.parametrize("case", [each for each in CASES if each.dense is not None], ids=str)
mapped_cases = pytest.mark.parametrize(
    "case", [each for each in CASES if each.build(SMALL).traits.linear_in_v], ids=str
)
masked_cases = pytest.mark.parametrize(
    "case", [each for each in CASES if each.build(SMALL).traits.key_mask], ids=str
)
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape
    error = (found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-12)
    assert float(error) <= tolerance


def test_every_operator_has_a_case() -> None:
    assert {case.operator for case in CASES} == set(OPERATORS)


def test_no_two_files_have_an_operator_of_one_name() -> None:
    names = [name for name, _ in find_operators()]
    assert len(names) == len(set(names)) == len(BUILT_IN)


def test_every_operator_has_a_row_in_the_documentation() -> None:
    page = (Path(__file__).parents[3] / "docs" / "conversion.md").read_text()
    rows = re.findall(
        r"^\| (.*?) \|", page.split("| operator | what it computes |")[1].split("\n\n")[0], re.MULTILINE
    )
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named | set(FOUND) == {*OPERATORS, "keep"}


@dense_cases
@pytest.mark.parametrize("geometry", [SMALL, ODD], ids=str)
def test_it_is_its_dense_definition(case: Case, geometry: Geometry) -> None:
    assert case.dense is not None
    operator, heads = case.build(geometry), draw(geometry)
    inputs = [x.requires_grad_() for x in heads.qkv()]
    found, wanted = operator.attend(heads), case.dense(operator, heads, **case.options)
    close(found.detach(), wanted.detach(), 1e-10)
    upstream = torch.randn_like(wanted)
    for path, dense in zip(
        *(torch.autograd.grad(out, inputs, upstream, allow_unused=True) for out in (found, wanted)),
        strict=True,
    ):
        assert (path is None) == (dense is None)
        if path is not None and dense is not None:
            torch.testing.assert_close(path, dense, rtol=1e-8, atol=1e-10)


def apply_term(term: Term, v_BHND: Tensor) -> Tensor:
    """The term times V, (B, H, N, D)."""
    if isinstance(term, LowRank):
        return term.left @ (term.right.transpose(2, 3) @ v_BHND)
    if isinstance(term, Sparse):
        return torch.einsum("bhns,bhnsd->bhnd", term.weights, term.pick(v_BHND))
    out = term.weights @ v_BHND
    return torch.cat([out, torch.zeros_like(v_BHND[:, :, out.shape[2] :])], 2)


@mapped_cases
@pytest.mark.parametrize(
    ("geometry", "dtype"), [*((each, torch.float64) for each in LAYOUTS), (ODD, torch.float32)], ids=str
)
def test_all_paths_give_the_same(case: Case, geometry: Geometry, dtype: torch.dtype) -> None:
    operator, heads, tolerance = case.build(geometry, dtype), draw(geometry, dtype), TOLERANCES[dtype]
    _, _, v = heads.qkv()
    out, matrix = operator.attend(heads), operator.matrix(heads)
    close(matrix @ v, out, tolerance)
    close(operator.attend(identity_values(heads)), matrix, tolerance)
    close(torch.stack([apply_term(term, v) for term in operator.terms(heads)]).sum(0), out, tolerance)
    index = torch.tensor([0, geometry.num_tokens - 1, geometry.num_tokens // 2])
    close(operator.rows(heads, index), matrix[:, :, index], tolerance)


@mapped_cases
def test_gradients_are_those_of_the_map(case: Case) -> None:
    operator, heads = case.build(SMALL), draw(SMALL)
    q, k, v = (x.requires_grad_() for x in heads.qkv())
    inputs = [q, k, v, *operator.parameters()]
    upstream = torch.randn_like(v)
    by_path = torch.autograd.grad(operator.attend(heads), inputs, upstream, allow_unused=True)
    by_map = torch.autograd.grad(operator.matrix(heads) @ v, inputs, upstream, allow_unused=True)
    for path, dense in zip(by_path, by_map, strict=True):
        assert (path is None) == (dense is None)
        if path is not None and dense is not None:
            torch.testing.assert_close(path, dense, rtol=1e-8, atol=1e-10)


@cases
def test_every_parameter_learns(case: Case) -> None:
    operator, heads = case.build(SMALL), draw(SMALL)
    operator(heads.with_qkv(*(x.requires_grad_() for x in heads.qkv()))).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in operator.parameters())


@mapped_cases
def test_the_map_is_as_declared(case: Case) -> None:
    traits = case.build(SMALL).traits
    maps = [case.build(geometry).matrix(draw(geometry, size=2)) for geometry in LAYOUTS]
    assert traits.nonnegative == all(bool((matrix >= 0).all()) for matrix in maps)
    assert traits.row_stochastic == all(bool((matrix.sum(-1) - 1).abs().max() < 1e-3) for matrix in maps)


@cases
def test_images_do_not_touch_each_other(case: Case) -> None:
    operator, heads = case.build(SMALL), draw(SMALL, batch=3)
    q, k, v = heads.qkv()
    whole = operator(heads)
    for image in range(3):
        one = slice(image, image + 1)
        alone = operator(heads.with_qkv(q[one], k[one], v[one]))
        torch.testing.assert_close(whole[one], alone, rtol=1e-10, atol=1e-12)


@cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_finite_and_close(case: Case, dtype: torch.dtype) -> None:
    """Queries and keys four times as large as a layer norm gives them."""
    geometry = Geometry(1, (14, 14))
    heads = draw(geometry, torch.float32, size=4, width=16)
    q, k, v = (x.to(dtype) for x in heads.qkv())
    reference = case.build(geometry, torch.float32, width=16)
    operator = copy.deepcopy(reference).to(dtype)
    for parameter, rounded in zip(reference.parameters(), operator.parameters(), strict=True):
        parameter.data = rounded.data.float()
    for buffer, rounded in zip(reference.buffers(), operator.buffers(), strict=True):
        buffer.data = rounded.data.to(buffer.dtype)
    out = operator(heads.with_qkv(q, k, v))
    assert out.dtype == dtype
    assert out.isfinite().all()
    wanted = reference(heads.with_qkv(q.float(), k.float(), v.float()))
    close(out, wanted, case.tolerance * (2e-2 if dtype == torch.bfloat16 else 3e-3))


@masked_cases
def test_padding_has_no_influence(case: Case) -> None:
    operator, heads = case.build(SMALL), draw(SMALL)
    q, k, v = heads.qkv()
    heads.key_mask = torch.ones(2, SMALL.num_tokens, dtype=torch.bool)
    heads.key_mask[0, 7:] = False
    heads.key_mask[1, 12] = False
    before = operator(heads)
    hidden = ~heads.key_mask[:, None, :, None]
    changed = heads.with_qkv(q, k.masked_fill(hidden, 7.0), v.masked_fill(hidden, -9.0))
    torch.testing.assert_close(operator(changed), before, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(operator(heads.with_qkv(q, k, v + 1)), before)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.operator not in list(FOUND)[1:]], ids=str)
def test_compiles_in_one_graph(case: Case) -> None:
    torch.compiler.reset()  # else the cases before count against the limit of recompilations
    operator, heads = case.build(SMALL, torch.float32), draw(SMALL, torch.float32)
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    close(compiled(heads), operator(heads), 1e-5)


@cases
def test_cost_is_linear_where_it_is_said_to_be(case: Case) -> None:
    small, large = Geometry(1, (16, 16)), Geometry(1, (112, 112))
    costs = [case.build(geometry).macs(geometry) / geometry.num_tokens for geometry in (small, large)]
    assert costs[0] > 0
    assert case.build(small).traits.linear_cost == (costs[1] < 4 * costs[0])


@pytest.mark.parametrize(("case", "grid", "ratio", "tolerance"), [
    (Case("linear"), (14, 14), 0.33, 0.006),
    (Case("performer", {"num_features": 266}), (14, 14), 2.72, 0.006),
    (Case("performer"), (14, 14), 0.66, 0.006),
    (Case("hedgehog"), (14, 14), 0.98, 0.006),
    (Case("inline", {"local": "none", "local_size": None}), (14, 14), 0.33, 0.006),
    (Case("linformer", {"num_keys": 64}), (14, 14), 0.65, 0.02),
    (Case("linformer", {"num_keys": 64}), (32, 32), 0.12, 0.02),
    (Case("linformer"), (14, 14), 0.5, 0.02),
    (Case("agent", {"num_agents": 49, "local_size": 0}), (14, 14), 0.5, 0.035),
    (Case("agent", {"num_agents": 49, "local_size": 0}), (32, 32), 0.1, 0.035),
    (Case("agent", {"local_size": 0}), (14, 14), 0.5, 0.035),
    (Case("agent", {"local_size": 0}), (64, 64), 0.04, 0.035),
], ids=str)  # fmt: skip
def test_cost_against_softmax(case: Case, grid: tuple[int, int], ratio: float, tolerance: float) -> None:
    geometry = Geometry(1, grid)
    macs = create_operator(Choice(case.operator, case.options), LayerShape(1, 64, geometry)).macs(geometry)
    assert macs / (2 * geometry.num_tokens**2 * 64) == pytest.approx(ratio, abs=tolerance)


MASKED_QUERIES = [
    Case("agent", {"num_agents": 6}), Case("nystrom", {"num_landmarks": 12, "local_size": 3}),
    Case("monarch", {"block": 5}),
]  # fmt: skip
"""Operators that gather from queries, too: hidden tokens have no say there either."""


@pytest.mark.parametrize("case", MASKED_QUERIES, ids=str)
def test_hidden_tokens_have_no_say_as_queries_either(case: Case) -> None:
    geometry = Geometry(1, (6, 8))
    operator, heads = case.build(geometry), draw(geometry)
    seen = torch.ones(49, dtype=torch.bool)
    seen[[0, 1, 2, 9, 10, 17, 18]] = False  # the prefix, and the whole first cell of nystrom and agent
    seen[[20, 30, *range(36, 46)]] = False  # two whole blocks of monarch
    heads.key_mask = seen.expand(2, -1)
    out, matrix = operator(heads), operator.matrix(heads)
    hidden = heads.with_qkv(*(x.masked_fill(~seen[:, None], 9.0) for x in heads.qkv()))
    assert out.isfinite().all()
    torch.testing.assert_close(operator(hidden)[:, :, seen], out[:, :, seen], rtol=1e-10, atol=1e-12)
    assert not matrix[..., ~seen].any()
    if case.operator == "agent":
        torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 2, 49).double())


@pytest.mark.parametrize("other", [Geometry(1, (9, 12)), Geometry(5, (4, 5))], ids=str)
@cases
def test_another_grid_is_met_on_the_way_and_resampled_to(case: Case, other: Geometry) -> None:
    geometry = Geometry(other.num_prefix, (6, 8))
    operator, heads = case.build(geometry), draw(other)
    before = operator(heads)
    operator.resample(other)
    assert operator.shape.geometry == other
    torch.testing.assert_close(operator(heads), before, rtol=1e-10, atol=1e-12)
    if not operator.state_dict():
        torch.testing.assert_close(case.build(other)(heads), before, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("operator", "options", "words"), [
    ("agent", {"num_agents": 0}, "num_agents=0; give a whole number from 1 to 48"),
    ("agent", {"num_agents": 49}, "num_agents=49; give a whole number from 1 to 48"),
    ("agent", {"num_agents": True}, "num_agents=true; give a number"),
    ("agent", {"num_agents": 2.0}, "num_agents=2.0"),
    ("hash", {"bits": 0}, "bits=0; give a whole number"),
    ("hash", {"anchors": 2.5}, "anchors=2.5"),
    ("hash", {"mode": "exakt"}, "did you mean 'exact'"),
    ("hash", {"fitting": "best"}, "valid: eigen, published"),
    ("hash", {"start": "v"}, "valid: k, mean, q, symmetric"),
    ("hilo", {"alpha": 1.5}, "alpha=1.5; give the part of low heads, a number from 0 to 1"),
    ("hilo", {"alpha": "much"}, "alpha=much; give"),
    ("hilo", {"window": 0}, "window=0; give a whole number, 1 or more"),
    ("hilo", {"window": 2.5}, "window=2.5; give"),
    ("hybrid", {"combine": "gates"}, "combine=gates; did you mean 'gate'"),
    ("hybrid", {"branches": "window+kernl"}, "'kernl'; did you mean 'kernel'"),
    ("hybrid", {"branches": "kernel"}, "two or three different ones"),
    ("hybrid", {"branches": "window+window"}, "two or three different ones"),
    ("hybrid", {"branches": "window+dilated", "combine": "joint"}, "combine=joint needs the kernel"),
    ("hybrid", {"window": 0}, "window=0"),
    ("hybrid", {"feature": "pola"}, "feature=pola has two maps a head"),
    ("hybrid", {"feature": "reluu"}, "did you mean 'relu'"),
    ("kernel", {"feature": "elu1"}, "feature=elu1; did you mean 'elu'"),
    ("kernel", {"normalizer": "summ"}, "normalizer=summ; did you mean 'sum'"),
    ("kernel", {"local": "kv"}, "local=kv"),
    ("kernel", {"local": "v", "local_size": 4}, "local_size=4 is not an odd number"),
    ("kernel", {"local_size": 3}, "local_size=3 needs local=v, qk or dynamic"),
    ("kernel", {"num_features": 4}, "num_features=4: this feature map"),
    ("kernel", {"feature": "favor", "num_features": 0}, "num_features=0 is not a positive whole number"),
    ("kernel", {"feature": "identity"}, "use normalizer=inline"),
    ("kernel", {"feature": "identity", "normalizer": "mala"}, "use normalizer=inline"),
    ("kernel", {"center": "yess"}, "center=yess; write true or false"),
    ("kernel", {"rope": "1"}, "rope=1; write true or false"),
    ("kernel", {"rope": True, "normalizer": "mala"}, "rope=true needs normalizer=sum or rala"),
    ("kernel", {"rope": True, "feature": "t2r", "num_features": 12}, "8 channels and 12 features"),
    ("linformer", {"num_keys": 49}, "num_keys=49; give a whole number from 1 to 48"),
    ("linformer", {"num_keys": 0}, "num_keys=0"),
    ("linformer", {"num_keys": True}, "num_keys=true"),
    ("linformer", {"sharing": "layer"}, "sharing=layer; did you mean 'layerwise'"),
    ("linformer", {"stochastic": "yes"}, "stochastic=yes; valid: true, false"),
    ("monarch", {"steps": 0}, "steps=0"),
    ("monarch", {"steps": True}, "steps=true"),
    ("monarch", {"steps": 101}, "steps=101"),
    ("monarch", {"block": -3}, "block=-3"),
    ("monarch", {"block": 2.5}, "block=2.5"),
    ("nystrom", {"num_landmarks": 49}, "num_landmarks=49; give a whole number from 1 to 48"),
    ("nystrom", {"iterations": 0}, "iterations=0; give a whole number from 1 to 100"),
    ("nystrom", {"iterations": 101}, "iterations=101; give a whole number from 1 to 100"),
    ("nystrom", {"iterations": 2.5}, "iterations=2.5"),
    ("nystrom", {"local_size": 4}, "local_size=4"),
    ("program", {"code": 7}, "program has code=7; write a formula"),
    ("program", {"code": True}, "program has code=true; write a formula"),
    ("program", {"code": "attnzero_105"}, "attnzero_105 is an operator: write '*: attnzero_105'"),
    ("program", {"code": "mm(q, tn(k v))"}, "',' is not a name or a parenthesis; separate operands by a space"),
    ("program", {"code": "mm(q)"}, "mm takes 2 operands, not 1"),
    ("program", {"code": "neg(q k)"}, "neg takes 1 operand, not 2"),
    ("program", {"code": "mm(q k)"}, "mm is not defined for N×D and N×D"),
    ("program", {"code": "nt(q k)"}, "gives N×N"),
    ("attnzero_105", {"code": "q"}, "attnzero_105 has no option 'code'; valid: bias, local_size, prefix"),
    ("attnzero_105", {"prefix": "softmx"}, "prefix=softmx; did you mean 'softmax'"),
    ("attnzero_105", {"bias": 65}, "bias=65; give the side of the table, 0 to 64"),
    ("attnzero_105", {"bias": 2.5}, "bias=2.5; give the side"),
    ("attnzero_40", {"bias": 7}, "bias=7 needs a matrix product with a row for each token"),
    ("window", {"window": 0}, "window=0; give a whole number"),
    ("window", {"dilation": 1.5}, "dilation=1.5; give a whole number"),
    ("linear", {"featur": "relu"}, "linear has no option 'featur'; did you mean 'feature'"),
    ("linear", {"feature": "gelu"}, "feature=gelu; did you mean 'elu'"),
    ("sla", {"block": 0}, "block=0; give a whole number, 1 or more"),
    ("sla", {"block": True}, "sla has block=true; give a number"),
    ("sla", {"share": 1.5}, "share=1.5; give the share of blocks, a number from 0 to 1"),
    ("topk", {"share": "all"}, "share=all; give"),
    ("sla", {"linear": "mix"}, "linear=mix; did you mean 'mixed'"),
    ("veca", {"num_cores": 0}, "num_cores=0; give a whole number, 1 or more"),
    ("veca", {"num_cores": 2.5}, "num_cores=2.5; give"),
    ("softmax", {"x": 1}, "softmax has no option 'x'; it has none"),
    ("linaer", {}, "unknown operator 'linaer'; did you mean 'linear'"),
])  # fmt: skip
def test_an_invalid_option_is_named(operator: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        create_operator(Choice(operator, options), LayerShape(2, 8, Geometry(2, (6, 8))))


@pytest.mark.parametrize("operator", ["program", "agent", "nystrom", "focused", "inline"])
def test_a_convolution_has_a_side_that_the_grid_can_use(operator: str) -> None:
    shape = LayerShape(2, 8, Geometry(1, (3, 6)))
    for side in (7, 11):
        create_operator(Choice(operator, {"local_size": side}), shape)
    for side, words in (
        (13, r"local_size=13 reaches beyond the grid of 3x6 tokens; .* up to 11"),
        (16383, "local_size=16383 reaches beyond"),
        (True, f"{operator} has local_size=true; give a number"),
        (False, f"{operator} has local_size=false; give a number"),
    ):
        with pytest.raises(ConfigError, match=words):
            create_operator(Choice(operator, {"local_size": side}), shape)
    create_operator(Choice(operator, {"local_size": 7}), LayerShape(2, 8, Geometry(0, (1, 1))))


# Rows of the Jacobian: those of the map where there is one, and autograd's where there is none.

INDEX = torch.tensor([5, 0, 12])


@pytest.mark.parametrize(
    "case", [Case("softmax"), Case("linear"), Case("window", {"window": 2}), Case("monarch")], ids=str
)
def test_rows_of_a_linear_operator_are_those_of_its_map(case: Case) -> None:
    geometry = Geometry(1, (3, 4))
    operator, heads = case.build(geometry, width=4), draw(geometry, width=4)
    heads.values().requires_grad_()
    rows = jacobian_rows(operator, heads, INDEX)
    torch.testing.assert_close(rows, operator.matrix(heads)[:, :, INDEX], rtol=1e-10, atol=1e-12)
    assert not rows.requires_grad
    assert heads.values().grad is None


def test_rows_are_the_mean_of_autograds_jacobian_over_channels() -> None:
    geometry = Geometry(1, (3, 4))
    operator, heads = Case("ttt").build(geometry, width=4), draw(geometry, batch=1, width=4)
    q, k, v = heads.qkv()
    whole = torch.autograd.functional.jacobian(lambda values: operator(heads.with_qkv(q, k, values)), v)
    for head in range(2):
        same = whole[0, head, :, :, 0, head]  # (N, D, N, D)
        dense = torch.stack([same[:, c, :, c] for c in range(4)]).mean(0)
        assert dense.abs().max() > 1e-6
        torch.testing.assert_close(operator.matrix(heads)[0, head], dense, rtol=1e-9, atol=1e-14)
        assert not whole[0, head, :, :, 0, 1 - head].any(), "heads see each other's values"
    with torch.no_grad():
        rows = operator.rows(heads, INDEX)
    assert all(parameter.grad is None for parameter in operator.parameters())
    torch.testing.assert_close(rows, operator.matrix(heads)[:, :, INDEX])
    assert operator.rows(heads, INDEX[:0]).shape == (1, 2, 0, 13)
    with pytest.raises(UnsupportedModelError, match="not linear in V"):
        operator.terms(heads)
