"""Programs, hashed attention and TTT as operators: published numbers, definitions and gradients."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graftvit.models.attention.attention_program import ProgramAttention
from graftvit.models.attention.base import Geometry, Heads, LayerShape
from graftvit.models.attention.hash import HashAttention, by_gradient, learn_bits, similar_pairs
from graftvit.models.attention.ttt import TTTAttention, normalized_keys
from graftvit.models.conversion import convert, converted_layers
from graftvit.models.converted import start_fresh
from graftvit.models.cost import counted_macs
from graftvit.models.errors import ConfigError, TransferError, UnsupportedModelError
from graftvit.models.layer_plan import Choice, create_operator
from graftvit.models.programs.program import FOUND, LINEAR, parse_program
from graftvit.transfer.align import LayerTarget, check_layer_loss, map_error, probe_error
from support.models.dense import TINY, tiny
from support.models.operator_cases import Case, draw, identity_values
from torch import Tensor

GRID = Geometry(2, (3, 5))


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


# Hashed attention: the published numbers, the dense form on its codes, its gradient, and what fitting does.


SMALL = Geometry(1, (3, 5))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.tensor(np.random.RandomState(seed).standard_normal(shape), dtype=torch.float32)


def named(key: str, *shape: int) -> Tensor:
    """The spec's draw for a key of the published code."""
    return normal(zlib.crc32(key.encode()), *shape)


def only(q: Tensor, v: Tensor) -> Heads:
    return Heads(q, None, v, None, 1.0)


def fitted(geometry: Geometry = SMALL, seed: int = 0, **options: object) -> HashAttention:
    operator = HashAttention(LayerShape(2, 8, geometry), **options)  # type: ignore[arg-type]
    operator.fit([draw(Geometry(0, (5, 6)), torch.float32, seed=3)], seed=seed)
    return operator.double()


def test_attention_of_the_published_code() -> None:
    """Golden values of EcoFormer's module: 64 channels, two heads, 49 tokens."""
    operator = HashAttention(LayerShape(2, 32, Geometry(0, (7, 7))), mode="reference")
    hashes = "fast_attention.ksh"
    operator.weight.copy_(named(f"{hashes}.A", 2, 16, 25))
    operator.mean.copy_(0.5 + 0.05 * named(f"{hashes}.mvec", 1, 2, 1, 25)[0, :, 0])
    operator.anchors.copy_(F.normalize(named(f"{hashes}.anchor", 1, 2, 25, 32)[0], dim=-1))
    x = normal(1, 2, 49, 64)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, named(f"{name}.weight", 64, 64) / 8, 0.05 * named(f"{name}.bias", 64))

    q, v = (linear(name, x).unflatten(2, (2, 32)).transpose(1, 2) for name in ("to_qk", "to_v"))
    out = linear("proj", operator(only(q, v)).transpose(1, 2).flatten(2))
    wanted = [0.029204, -0.000624, -0.131941, -0.069126, 0.095423, 0.070532, 0.067501, 0.039182]
    torch.testing.assert_close(out[0, 0, :8], torch.tensor(wanted), atol=2e-5, rtol=0)
    assert float(out.sum()) == pytest.approx(-119.24393, abs=1e-3)


@pytest.mark.slow
def test_fitting_of_the_published_code() -> None:
    """Golden values: one decision for all heads, anchors that are the first tokens of the first image."""
    u = F.normalize(normal(2, 2, 2, 60, 8), dim=-1)
    start = normal(3, 2, 16, 25)
    operator = HashAttention(
        LayerShape(2, 8, Geometry(0, (6, 10))), mode="reference", fitting="published", start="q"
    )
    operator.anchors.copy_(u[0, :, :25])
    operator.mean.zero_()
    operator.mean.copy_(operator._features(u).mean((0, 2)))
    torch.testing.assert_close(
        operator.mean[0, :4], torch.tensor([0.624493, 0.624621, 0.624158, 0.609632]), atol=1e-5, rtol=0
    )
    learned, accepted = learn_bits(operator._features(u), similar_pairs(u), start, by_gradient, by_head=False)
    assert accepted.int().tolist() == [[bit, bit] for bit in (0, 1, 0, 1, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0, 1, 1)]
    assert float((learned - start).norm()) == pytest.approx(0.42597, abs=1e-4)
    assert float(learned.sum()) == pytest.approx(11.7735, abs=1e-3)
    wanted = torch.tensor([-0.704166, 0.652933, -0.171185, -0.776402])
    torch.testing.assert_close(learned[0, 1, :4], wanted, atol=1e-5, rtol=0)
    assert "objective 0.651 -> 0.645" in str(operator.learn(u, start))
    torch.testing.assert_close(operator.weight, learned)
    codes = operator.codes(only(u, u))
    assert codes.sum() == -56
    assert "".join("+" if bit > 0 else "-" for bit in codes[0, 0, 0]) == "-+-++-+--+++--+-"
    out = operator(only(u, u))
    wanted = torch.tensor(
        [-0.077494, -0.060853, -0.099911, 0.09871, -0.036989, -0.039226, 0.018384, -0.075745]
    )
    torch.testing.assert_close(out[0, 0, 0], wanted, atol=1e-5, rtol=0)
    assert float(out.sum()) == pytest.approx(-0.42483, abs=1e-4)


@pytest.mark.parametrize("mode", ["exact", "reference"])
@pytest.mark.parametrize("geometry", [SMALL, Geometry(0, (7, 9)), Geometry(0, (1, 1))], ids=str)
def test_it_is_dense_kernel_attention_on_the_codes(mode: str, geometry: Geometry) -> None:
    operator, heads = fitted(mode=mode), draw(geometry)
    z, v = operator.codes(heads), heads.values()
    assert (z.abs() == 1).all()
    kernel = z @ z.transpose(2, 3) + 17
    assert (kernel >= 1).all()
    weights = kernel / kernel.sum(-1, keepdim=True)
    if mode == "reference":
        own = z @ z.transpose(2, 3) + 17 * torch.eye(v.shape[2], dtype=v.dtype)
        weights = own / kernel.sum(-1, keepdim=True)
    torch.testing.assert_close(operator(heads), weights @ v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(operator.matrix(heads), weights, rtol=1e-12, atol=1e-12)


def test_codes_are_those_of_gaussian_kernels() -> None:
    """The equations token by token, with σ² of each image and head by itself."""
    operator, heads = fitted(bits=3, anchors=4), draw(SMALL)
    codes, (q, _) = operator.codes(heads), heads.qk()
    for image in range(2):
        for head in range(2):
            u = q[image, head] / q[image, head].norm(dim=-1, keepdim=True)
            distance = torch.cdist(u, operator.anchors[head]).square()
            kernel = torch.exp(-distance / (2 * distance.mean())) - operator.mean[head]
            assert torch.equal((kernel @ operator.weight[head].T).sign(), codes[image, head])


def test_the_gradient_passes_where_y_is_small() -> None:
    operator, heads = fitted(), draw(SMALL)
    q = heads.qk()[0].requires_grad_()
    upstream = torch.randn(2, 2, SMALL.num_tokens, 16, dtype=torch.float64)
    found = torch.autograd.grad(operator.codes(only(q, q)), q, upstream)[0]
    y = operator._features(F.normalize(q, dim=-1)) @ operator.weight.transpose(1, 2)
    passed = torch.where(y.abs() < 1, upstream, 0.0)
    assert 0 < (y.abs() >= 1).double().mean() < 0.5
    torch.testing.assert_close(found, torch.autograd.grad(y, q, passed)[0], rtol=1e-10, atol=1e-12)


def test_a_token_of_zeros_has_no_direction_and_harms_nobody() -> None:
    operator, heads = fitted(), draw(SMALL)
    q = heads.qk()[0]
    q[0, 0, 3] = 0
    assert operator(only(q, heads.values())).isfinite().all()


def test_cost_is_linear_from_196_to_12544_tokens() -> None:
    counts = {}
    for side in (14, 28, 56, 112):
        geometry = Geometry(0, (side, side))
        operator = HashAttention(LayerShape(1, 64, geometry))
        operator.fit([], seed=0)
        q = torch.randn(1, 1, side * side, 64)
        counts[side * side] = counted_macs(lambda op=operator, q=q: op(only(q, q)))  # type: ignore[misc]
        assert counts[side * side] == operator.macs(geometry)
    assert list(counts) == [196, 784, 3136, 12544]
    assert len({count / tokens for tokens, count in counts.items()}) == 1


def test_an_operator_that_was_never_fitted_says_so() -> None:
    operator = HashAttention(LayerShape(2, 8, SMALL))
    assert not operator.fitted
    with pytest.raises(UnsupportedModelError, match=r"not fitted: give --calibrate N .*calibrate=N"):
        operator(draw(SMALL, torch.float32))
    trained = fitted().float()
    operator.load_state_dict(trained.state_dict())
    assert operator.fitted
    assert torch.equal(operator(draw(SMALL, torch.float32)), trained(draw(SMALL, torch.float32)))
    operator.load_state_dict(HashAttention(LayerShape(2, 8, SMALL)).state_dict())
    assert not operator.fitted


def test_values_are_looked_at_until_it_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at a value waits for a GPU."""
    operator = fitted()
    operator(draw(SMALL))
    looked: list[bool] = []
    monkeypatch.setattr(Tensor, "any", lambda self: looked.append(True))
    operator(draw(SMALL))
    assert not looked


@pytest.mark.parametrize("fitting", ["eigen", "published"])
def test_the_seed_decides_the_fit(fitting: str) -> None:
    one, again, other = (fitted(seed=seed, fitting=fitting, bits=4).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_eigenvectors_fit_better_than_the_published_steps() -> None:
    samples = [draw(Geometry(0, (14, 14)), torch.float32, width=16, seed=5)]
    measures = {}
    for fitting in ("eigen", "published"):
        operator = HashAttention(LayerShape(2, 16, Geometry(0, (14, 14))), fitting=fitting)
        measures[fitting] = operator.fit(samples, seed=0).measures
    for before, after in (each["objective"] for each in measures.values()):
        assert after < before
    assert measures["eigen"]["objective"][1] < measures["published"]["objective"][1]
    assert 0 < measures["published"]["accepted"][1] <= 1


def test_anchors_are_tokens() -> None:
    """As published, of the first image and in the same places for all heads; else of all images, head by head."""
    sample = draw(Geometry(0, (5, 6)), torch.float32, seed=3)
    u = F.normalize(sample.qk()[0], dim=-1)
    places = {}
    for fitting in ("eigen", "published"):
        operator = fitted(fitting=fitting, bits=4).float()
        same = (operator.anchors[:, :, None, None] - u.transpose(0, 1)[:, None]).abs().amax(-1) < 1e-6
        found = same.nonzero()  # head, anchor, image, token
        assert len(found) == 2 * 25
        places[fitting] = found.view(2, 25, 4)[..., 2:]
    assert (places["published"][..., 0] == 0).all()
    assert torch.equal(*places["published"])
    assert len(places["eigen"][..., 0].unique()) == 2
    assert not torch.equal(*places["eigen"])


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_tokens_without_a_direction_are_refused(value: float) -> None:
    q = torch.randn(1, 2, 30, 8)
    q[:, :, :: 30 if value else 1] = value
    with pytest.raises(UnsupportedModelError, match="queries are all zero or not all finite"):
        HashAttention(LayerShape(2, 8, SMALL)).fit([only(q, q)], seed=0)


@pytest.mark.parametrize("seed", [1, 9])
def test_equal_tokens_get_equal_codes(seed: int) -> None:
    """Their kernels differ by rounding alone, by which neither the fit nor the variance may divide."""
    q = normal(seed, 8).expand(2, 2, 30, 8)
    operator = HashAttention(LayerShape(2, 8, SMALL))
    operator.fit([only(q, q)], seed=0)
    torch.testing.assert_close(operator(only(q, q)), q)
    assert operator(draw(SMALL, torch.float32)).isfinite().all()


def test_too_few_tokens_for_the_anchors_are_refused() -> None:
    operator = HashAttention(LayerShape(2, 8, SMALL), anchors=70)
    with pytest.raises(ConfigError, match="anchors=70 of the operator hash are drawn from 60 tokens"):
        operator.fit([draw(Geometry(0, (5, 6)), torch.float32)], seed=0)


# TTT-SwiGLU against its definition by autograd, and what its normalized keys and its convolution change.


def inner(x: Tensor, weights: list[Tensor]) -> Tensor:
    return (F.silu(x @ weights[0]) * (x @ weights[1])) @ weights[2]


def by_autograd(operator: TTTAttention, heads: Heads) -> Tensor:
    """The definition: one step of gradient descent, image by image, with autograd's gradient."""
    q, k, v = heads.qkv()
    keys = (k - k.mean(2, keepdim=True)) / (k.var(2, correction=0, keepdim=True) + 1).sqrt()
    outs = []
    for image in range(len(q)):
        weights = [w.detach().requires_grad_() for w in (operator.gated, operator.linear, operator.out)]
        objective = -(v[image] * inner(keys[image], weights)).sum() * heads.scale / q.shape[2]
        gradients = torch.autograd.grad(objective, weights)
        learned = [w - g for w, g in zip(weights, gradients, strict=True)]
        outs.append(inner(q[image], learned))
    return torch.stack(outs)


def without_convolution(geometry: Geometry, size: float = 1.0) -> TTTAttention:
    operator = TTTAttention(LayerShape(2, 8, geometry)).double()
    for weight in (operator.gated, operator.linear, operator.out):
        torch.nn.init.normal_(weight, std=0.3 * size)
    return operator


def test_the_closed_form_is_the_step() -> None:
    operator, heads = without_convolution(GRID), draw(GRID)
    torch.testing.assert_close(operator(heads), by_autograd(operator, heads), rtol=1e-10, atol=1e-12)


def test_the_convolution_starts_at_zero_and_is_of_the_neighbors() -> None:
    operator, heads = without_convolution(GRID), draw(GRID)
    q, k, v = heads.qkv()
    with torch.no_grad():
        operator.q_conv.weight[:, 0, 1, 2] = 1.0  # each channel gains that of the token to its right
    image = q[:, :, 2:].unflatten(2, (3, 5))
    shifted = F.pad(image, (0, 0, 0, 1))[:, :, :, 1:].flatten(2, 3)
    moved = torch.cat((q[:, :, :2], q[:, :, 2:] + shifted), 2)
    wanted = by_autograd(operator, heads.with_qkv(moved, k, v))
    torch.testing.assert_close(operator(heads), wanted, rtol=1e-10, atol=1e-12)


def test_small_deviations_of_keys_are_not_blown_up() -> None:
    keys = torch.randn(1, 1, 500, 3, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 50.0]) + 7
    deviations = normalized_keys(keys).std(2)[0, 0]
    assert deviations[0] < 2e-3
    assert 0.6 < deviations[1] < 0.8
    assert 0.99 < deviations[2] < 1.01


def test_parameters_and_cost_are_those_of_the_paper() -> None:
    shape = LayerShape(3, 64, Geometry(0, (14, 14)))  # DeiT-T
    operator = TTTAttention(shape)
    assert sum(p.numel() for p in operator.parameters()) == 3 * 3 * 64**2 + 18 * 3 * 64
    # DeiT-T without a class token: 12 layers change 1.25 G of softmax to 1.34 G
    softmax = 2 * 196**2 * 64 * 3
    gained = 12 * (operator.macs(shape.geometry) - softmax)
    assert 0.06e9 < gained < 0.12e9
