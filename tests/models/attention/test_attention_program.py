"""Programs as operators: the grid, prefix tokens, padding, heads that see each other, and the convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graftvit.models.attention.attention_program import ProgramAttention
from graftvit.models.attention.base import Geometry, Heads, LayerShape
from graftvit.models.conversion import convert, converted_layers
from graftvit.models.converted import start_fresh
from graftvit.models.errors import ConfigError, TransferError, UnsupportedModelError
from graftvit.models.layer_plan import Choice, create_operator
from graftvit.models.programs.program import FOUND, LINEAR, parse_program
from graftvit.transfer.recovery.align import LayerTarget, check_layer_loss, map_error, probe_error
from support.models.dense import TINY, tiny
from support.models.operator_cases import Case, draw, identity_values
from torch import Tensor

GRID = Geometry(2, (3, 5))
WRONG = [
    (7, "program has code=7; write a formula"),
    (True, "program has code=true; write a formula"),
    ("attnzero_105", r"attnzero_105 is an operator: write '\*: attnzero_105'"),
    ("mm(q, tn(k v))", "',' is not a name or a parenthesis; separate operands by a space"),
    ("mm(q)", "mm takes 2 operands, not 1"),
    ("neg(q k)", "neg takes 1 operand, not 2"),
]


def build(name: str, geometry: Geometry = GRID) -> ProgramAttention:
    operator = Case(name).build(geometry)
    assert isinstance(operator, ProgramAttention)
    return operator


@pytest.mark.parametrize("name", FOUND)
def test_grid_tokens_get_the_program_and_prefix_tokens_softmax(name: str) -> None:
    operator, heads = build(name), draw(GRID)
    q, k, v = heads.qkv()
    out = operator.attend(heads)
    grid = parse_program(FOUND[name])(q=q[:, :, 2:], k=k[:, :, 2:], v=v[:, :, 2:])
    torch.testing.assert_close(out[:, :, 2:], grid)
    torch.testing.assert_close(out[:, :, :2], F.scaled_dot_product_attention(q[:, :, :2], k, v))


@pytest.mark.parametrize("code", [FOUND["attnzero_105"], "mm(minmax(q) tn(k v))"])
def test_an_image_of_padding_alone_gives_zeros_on_the_grid(code: str) -> None:
    operator, heads = Case("program", {"code": code}).build(GRID), draw(GRID)
    whole = operator.attend(heads)
    heads.key_mask = torch.ones(2, GRID.num_tokens, dtype=torch.bool)
    heads.key_mask[1, GRID.num_prefix :] = False
    out = operator.attend(heads)
    torch.testing.assert_close(out[0], whole[0])
    assert not out[1, :, GRID.num_prefix :].any()
    if operator.traits.linear_in_v:
        torch.testing.assert_close(operator.matrix(heads) @ heads.values(), out)


@pytest.mark.parametrize("name", FOUND)
def test_an_image_with_padding_is_the_image_without(name: str) -> None:
    heads, operator = draw(GRID), build(name)
    seen = torch.ones(2, GRID.num_tokens, dtype=torch.bool)
    seen[1, [4, 9, 16]] = False
    heads.key_mask = seen
    out = operator.attend(heads)
    q, k, v = (x[1:, :, seen[1]] for x in heads.qkv())
    alone = parse_program(FOUND[name])(q=q[:, :, 2:], k=k[:, :, 2:], v=v[:, :, 2:])
    torch.testing.assert_close(out[1:, :, seen[1]][:, :, 2:], alone)
    assert not out[1, :, [4, 9, 16]].any()


@pytest.mark.parametrize("name", ["attnzero_105", "attnzero_34", "attnzero_140", "attnzero_76"])
def test_rows_are_those_of_autograds_jacobian_where_heads_see_each_other(name: str) -> None:
    geometry = Geometry(0, (2, 3))
    operator, heads = Case(name).build(geometry, width=4), draw(geometry, batch=1, width=4)
    q, k, v = heads.qkv()

    def out(values: Tensor) -> Tensor:
        return operator.attend(heads.with_qkv(q, k, values))

    whole = torch.autograd.functional.jacobian(out, v)[0, :, :, :, 0]  # (H, N, D, H, N, D)
    dense = torch.stack([whole[h, :, :, h].diagonal(dim1=1, dim2=3).mean(-1) for h in range(2)])
    torch.testing.assert_close(operator.matrix(heads)[0], dense, rtol=1e-9, atol=1e-12)
    across = whole[0, :, :, 1].abs().max()
    assert bool(across > 1e-9) is not operator.traits.independent_heads


MAPPED = [LINEAR, "mm(softmax(nt(scale(q) k)) v)", "sub(mul(v dist(q k)) mm(minmax(q) tn(zscore(k) v)))"]


@pytest.mark.parametrize("code", MAPPED)
@pytest.mark.parametrize("padding", [False, True])
def test_the_map_is_what_one_hot_values_show(code: str, padding: bool) -> None:
    """Of the layer, with its prefix tokens and its padding; padding tokens are in no row and no column of it."""
    operator, heads = Case("program", {"code": code}).build(GRID), draw(GRID)
    q, k, v = heads.qkv()
    if padding:
        heads.key_mask = torch.ones(2, GRID.num_tokens, dtype=torch.bool)
        heads.key_mask[1, [4, 9, 16]] = False
    with torch.no_grad():
        columns = []
        for token in range(GRID.num_tokens):
            values = torch.zeros_like(v)
            values[:, :, token, 3] = 1
            columns.append(operator.attend(heads.with_qkv(q, k, values))[..., 3])
        dense = torch.stack(columns, -1)
        torch.testing.assert_close(operator.matrix(heads), dense, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(operator.attend(identity_values(heads)), dense, rtol=1e-9, atol=1e-12)


def test_losses_on_maps_refuse_other_programs_with_the_reason() -> None:
    operator = build("attnzero_105")
    with pytest.raises(TransferError) as caught:
        check_layer_loss("map", 3, "attnzero_105", operator)
    assert str(caught.value) == (
        "align.match=map: attnzero_105 of layer 3 is not linear in V and has no map (minmax(v) is not linear in V); "
        "use output"
    )
    with pytest.raises(UnsupportedModelError, match=r"only a Jacobian \(minmax\(v\) is not linear in V\)"):
        operator.terms(draw(GRID))
    signed = Case("program", {"code": MAPPED[2]}).build(GRID)
    check_layer_loss("map", 3, "program", signed)
    with pytest.raises(TransferError, match="are no distributions"):
        check_layer_loss("rows", 3, "program", signed)
    check_layer_loss("rows", 3, "program", Case("program").build(GRID))


@pytest.mark.parametrize("code", MAPPED)
def test_the_loss_on_maps_is_that_of_the_dense_maps(code: str) -> None:
    operator, heads = Case("program", {"code": code}).build(GRID), draw(GRID)
    q, k, v = draw(GRID, seed=5).qkv()
    teacher = Heads(q, k, v, None, heads.scale)
    target = (q @ k.transpose(2, 3) * heads.scale).softmax(-1)
    dense = (target - operator.matrix(heads)).square().sum((2, 3)).mean() / GRID.num_tokens
    found = map_error(operator, heads, LayerTarget(teacher, target @ v))
    torch.testing.assert_close(found, dense, rtol=1e-9, atol=1e-12)
    torch.manual_seed(0)
    estimates = [probe_error(operator, heads, LayerTarget(teacher, target @ v)) for _ in range(60)]
    assert float(torch.stack(estimates).mean() / dense) == pytest.approx(1, abs=0.1)


def test_a_layer_computes_only_the_projections_that_are_needed() -> None:
    shape = LayerShape(2, 8, Geometry(0, (3, 4)))
    assert create_operator(Choice("attnzero_174"), shape).needs == ("q", "v")
    assert create_operator(Choice("attnzero_80"), shape).needs == ("v",)
    assert create_operator(Choice("attnzero_105"), shape).needs == ("q", "k", "v")
    assert build("attnzero_80").needs == ("q", "k", "v"), "prefix tokens attend by softmax"


def test_the_convolution_has_a_bias_and_ten_parameters_a_channel() -> None:
    geometry = Geometry(0, (3, 5))
    operator, heads = build("attnzero_40", geometry), draw(geometry)
    q, _, v = heads.qkv()
    assert sum(parameter.numel() for parameter in operator.parameters()) == 10 * 16
    assert operator.conv is not None
    image = v.permute(0, 1, 3, 2).reshape(2, 16, 3, 5)
    dense = F.conv2d(image, operator.conv.weight, operator.conv.bias, padding=1, groups=16)
    local = (operator(heads) - q).permute(0, 1, 3, 2).reshape(2, 16, 3, 5)
    torch.testing.assert_close(local, dense)


def test_the_convolution_starts_at_zero_but_in_a_fresh_model() -> None:
    model = tiny("vit", dtype=torch.float32, **TINY)
    plan = "*: attnzero_105; 0: linear"
    kept, fresh = convert(model, plan), convert(model, plan, weights="none")
    assert not any(x.any() for x in converted_layers(kept)[1].operator.parameters())
    weight, bias = converted_layers(fresh)[1].operator.parameters()
    assert 0 < float(weight.detach().abs().max()) <= 1 / 3
    assert 0 < float(bias.detach().abs().max()) <= 1 / 3
    start_fresh(kept)
    assert all(x.any() for x in converted_layers(kept)[1].operator.parameters())


@pytest.mark.parametrize(
    ("code", "reason"),
    [("mm(q k)", "mm is not defined for N×D and N×D"), ("nt(q k)", "gives N×N"), *WRONG],
)
def test_a_wrong_program_is_refused(code: object, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        create_operator(Choice("program", {"code": code}), LayerShape(2, 8, GRID))


def test_the_formula_of_a_found_program_is_no_option() -> None:
    with pytest.raises(ConfigError, match="attnzero_105 has no option 'code'; valid: local_size"):
        create_operator(Choice("attnzero_105", {"code": "q"}), LayerShape(2, 8, GRID))


@pytest.mark.parametrize("operator", ["program", "agent", "nystrom", "focused", "inline"])
def test_a_convolution_has_a_side_that_the_grid_can_use(operator: str) -> None:
    shape = LayerShape(2, 8, Geometry(1, (3, 6)))
    for side in (7, 11):
        create_operator(Choice(operator, {"local_size": side}), shape)
    with pytest.raises(
        ConfigError, match=r"local_size=13 reaches beyond the grid of 3x6 tokens; .* up to 11"
    ):
        create_operator(Choice(operator, {"local_size": 13}), shape)
    with pytest.raises(ConfigError, match="local_size=16383 reaches beyond"):
        create_operator(Choice(operator, {"local_size": 16383}), shape)
    for value in (True, False):
        with pytest.raises(
            ConfigError, match=f"{operator} has local_size={str(value).lower()}; give a number"
        ):
            create_operator(Choice(operator, {"local_size": value}), shape)
    create_operator(Choice(operator, {"local_size": 7}), LayerShape(2, 8, Geometry(0, (1, 1))))
