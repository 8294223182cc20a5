"""Kernel attention against the equation of each of its parts, written dense and independently."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graftvit.models.attention.base import Geometry, Heads, LayerShape
from graftvit.models.attention.kernel import FEATURES, KernelAttention
from graftvit.models.attention.softmax import SoftmaxAttention
from graftvit.models.calibration import calibrate
from graftvit.models.errors import ConfigError
from graftvit.models.layer_plan import Choice, create_operator
from support.models.operator_cases import HEADS, WIDTH, Case, draw
from torch import Tensor

GEOMETRY = Geometry(2, (3, 5))
SHAPE = LayerShape(HEADS, WIDTH, GEOMETRY)
PRESETS = ["linear", "performer", "hedgehog", "t2r", "focused", "cosformer", "inline", "mala"]


def pairs(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bhid,bhjd->bhij", q, k)


def elu(feature: Any, q: Tensor, k: Tensor) -> Tensor:
    q, k = (torch.where(x > 0, x + 1, x.exp()) for x in (q, k))
    return pairs(q, k)


def relu(feature: Any, q: Tensor, k: Tensor) -> Tensor:
    return pairs(q * (q > 0), k * (k > 0))


def identity(feature: Any, q: Tensor, k: Tensor) -> Tensor:
    return pairs(q, k)


def t2r(feature: Any, q: Tensor, k: Tensor) -> Tensor:
    q = torch.einsum("bhnd,hdf->bhnf", q, feature.q_weight) + feature.q_bias
    k = torch.einsum("bhnd,hdf->bhnf", k, feature.k_weight) + feature.k_bias
    return relu(feature, q, k)


def shares(x: Tensor) -> Tensor:
    return x.exp() / x.exp().sum(-1, keepdim=True)


def hedgehog(feature: Any, q: Tensor, k: Tensor) -> Tensor:
    q = torch.einsum("bhnd,hdf->bhnf", q, feature.q_weight)
    k = torch.einsum("bhnd,hdf->bhnf", k, feature.k_weight)
    return pairs(shares(q), shares(k)) + pairs(shares(-q), shares(-k))


def hedgehog_joint(feature: Any, q: Tensor, k: Tensor) -> Tensor:
    """2 cosh(2 (y_q + y_k)) summed over features, by what each side's softmax divides by."""
    q = torch.einsum("bhnd,hdf->bhnf", q, feature.q_weight) + feature.q_bias
    k = torch.einsum("bhnd,hdf->bhnf", k, feature.k_weight) + feature.k_bias
    both = (2 * torch.cosh(2 * (q[:, :, :, None] + k[:, :, None, :]))).sum(-1)
    q_sum, k_sum = (2 * torch.cosh(2 * x).sum(-1) for x in (q, k))
    return both / q_sum[..., :, None] / k_sum[..., None, :]


def focused(feature: Any, q: Tensor, k: Tensor) -> Tensor:
    def focus(x: Tensor) -> Tensor:
        batch, heads, tokens, width = x.shape
        x = x.clamp_min(0).transpose(1, 2).reshape(batch, tokens, -1) + 1e-6
        x = x / (1 + feature.temperature.reshape(-1).exp()).log()
        x = x**3 * (x.square().sum(-1).sqrt() / (x**6).sum(-1).sqrt())[..., None]
        return x.reshape(batch, tokens, heads, width).transpose(1, 2)

    return pairs(focus(q), focus(k))


def favor(feature: Any, q: Tensor, k: Tensor) -> Tensor:
    """The features of the paper, each token's largest exponential taken out, and their floor."""
    q, k = (x * feature.temperature * WIDTH**-0.25 for x in (q, k))
    q, k = (torch.exp(x @ feature.omega.T - (x * x).sum(-1, keepdim=True) / 2) for x in (q, k))
    return pairs(q / q.amax(3, keepdim=True) + 1e-4, k / k.amax((2, 3), keepdim=True) + 1e-4)


def cosine(feature: Any, q: Tensor, k: Tensor) -> Tensor:
    height, width = GEOMETRY.grid
    weights = torch.ones(GEOMETRY.num_tokens, GEOMETRY.num_tokens, dtype=q.dtype)
    for i in range(GEOMETRY.num_patches):
        for j in range(GEOMETRY.num_patches):
            rows, columns = i // width - j // width, i % width - j % width
            weight = math.cos(math.pi / 2 * rows / height) * math.cos(math.pi / 2 * columns / width)
            weights[GEOMETRY.num_prefix + i, GEOMETRY.num_prefix + j] = weight
    return weights * relu(feature, q, k)


EQUATIONS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "elu": elu,
    "relu": relu,
    "identity": identity,
    "t2r": t2r,
    "hedgehog": hedgehog,
    "hedgehog_joint": hedgehog_joint,
    "focused": focused,
    "favor": favor,
    "cosine": cosine,
}


def normalized(weights: Tensor, normalizer: str, scale: float) -> Tensor:
    tokens = weights.shape[-1]
    if normalizer == "sum":
        return weights / weights.sum(-1, keepdim=True).clamp_min(1e-6 * tokens)
    weights = scale * weights
    z = weights.mean(-1, keepdim=True)
    if normalizer == "inline":
        return (weights + 1 - z) / tokens
    return (weights * (1 + 1 / z) - z) / tokens


def build(**options: Any) -> Any:
    return Case("kernel", options).build(GEOMETRY)


def test_every_feature_map_has_its_equation() -> None:
    assert set(EQUATIONS) == set(FEATURES)


@pytest.mark.parametrize(
    ("feature", "normalizer"),
    [
        (feature, normalizer)
        for feature in EQUATIONS
        for normalizer in ("sum", "inline", "mala")
        if feature != "identity" or normalizer == "inline"  # the others are refused, see below
    ],
)
def test_the_map_is_the_equation(feature: str, normalizer: str) -> None:
    operator, heads = build(feature=feature, normalizer=normalizer), draw(GEOMETRY, seed=4)
    q, k, v = heads.qkv()
    weights = normalized(EQUATIONS[feature](operator.feature, q, k), normalizer, heads.scale)
    torch.testing.assert_close(operator.matrix(heads), weights, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(operator(heads), weights @ v, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", PRESETS)
def test_a_shift_of_all_keys_changes_nothing(name: str) -> None:
    heads = draw(GEOMETRY)
    q, k, v = heads.qkv()
    shift = torch.linspace(-3, 5, WIDTH, dtype=torch.float64)
    operator = Case(name).build(GEOMETRY)
    torch.testing.assert_close(
        operator(heads.with_qkv(q, k + shift, v)), operator(heads), rtol=1e-7, atol=1e-9
    )
    local = Case(name, {"local": "qk"}).build(GEOMETRY)
    torch.testing.assert_close(local(heads.with_qkv(q, k + shift, v)), local(heads), rtol=1e-7, atol=1e-9)
    if name != "inline":
        plain = Case(name, {"center": False}).build(GEOMETRY)
        assert not torch.allclose(plain(heads.with_qkv(q, k + shift, v)), plain(heads), atol=1e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_padded_tokens_are_as_good_as_absent(name: str) -> None:
    options = {} if name == "cosformer" else {"local": "none", "local_size": None}
    operator, heads = Case(name, options).build(GEOMETRY), draw(GEOMETRY)
    kept = 2 + 5  # the prefix and the first row
    heads.key_mask = (torch.arange(GEOMETRY.num_tokens) < kept).expand(2, -1)
    q, k, v = (x[:, :, :kept] for x in heads.qkv())
    if name == "cosformer":  # its angles are those of the whole grid
        matrix = operator.matrix(heads)
        assert not matrix[..., kept:].any()
        torch.testing.assert_close(matrix.sum(-1), torch.ones_like(matrix[..., 0]), rtol=1e-6, atol=1e-6)
        return
    alone = operator(Heads(q, k, v, None, heads.scale))
    torch.testing.assert_close(operator(heads)[:, :, :kept], alone, rtol=1e-8, atol=1e-10)


def test_values_get_their_neighbours_by_a_convolution_of_the_grid_alone() -> None:
    operator, heads = build(local="v", local_size=3), draw(GEOMETRY)
    _, _, v = heads.qkv()
    wanted = torch.zeros_like(v)
    taps = operator.v_conv.weight.reshape(HEADS, WIDTH, 3, 3)
    places = [(row, column) for row in range(3) for column in range(5)]
    for row, column in places:
        for down, right in ((down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)):
            if (row + down, column + right) in places:
                token, other = 2 + row * 5 + column, 2 + (row + down) * 5 + column + right
                wanted[:, :, token] += taps[:, :, down + 1, right + 1] * v[:, :, other]
    found = operator.local(heads)
    torch.testing.assert_close(found, wanted)
    assert not found[:, :, :2].any()
    torch.testing.assert_close(operator(heads), operator.attend(heads) + wanted)


def test_queries_and_keys_get_their_neighbours_before_the_features() -> None:
    operator, heads = build(local="qk", local_size=3), draw(GEOMETRY)
    q, k, v = heads.qkv()
    moved = heads.with_qkv(q + operator.q_conv(q, GEOMETRY), k + operator.k_conv(k, GEOMETRY), v)
    torch.testing.assert_close(operator.matrix(heads), build().matrix(moved))
    torch.testing.assert_close(operator.features(heads)[0][:, :, :2], build().features(heads)[0][:, :, :2])
    assert operator.local(heads) is None


@pytest.mark.parametrize("local", ["v", "qk"])
def test_local_terms_start_at_nothing(local: str) -> None:
    heads = draw(GEOMETRY)
    torch.testing.assert_close(
        KernelAttention(SHAPE, local=local).double()(heads), KernelAttention(SHAPE).double()(heads)
    )


@pytest.mark.parametrize("feature", ["hedgehog", "hedgehog_joint", "t2r"])
def test_learned_maps_start_at_the_identity_and_are_not_tied(feature: str) -> None:
    learned: Any = KernelAttention(SHAPE, feature=feature).feature
    for weight in (learned.q_weight, learned.k_weight):
        torch.testing.assert_close(weight, torch.eye(WIDTH).expand(HEADS, -1, -1))
    assert learned.q_weight is not learned.k_weight
    narrow: Any = KernelAttention(SHAPE, feature=feature, num_features=5).feature
    torch.testing.assert_close(
        narrow.q_weight.transpose(1, 2) @ narrow.q_weight, torch.eye(5).expand(HEADS, -1, -1)
    )


@pytest.mark.parametrize("name", ["hedgehog", "t2r", "performer", "linear"])
def test_calibration_sets_each_heads_temperature(name: str) -> None:
    """Queries and keys of one head are long: its rows are sharp, those of the other are flat."""
    torch.manual_seed(0)
    geometry = Geometry(1, (7, 9))
    heads = draw(geometry, torch.float32, width=16)
    q, _, v = heads.qkv()
    sizes = torch.tensor([0.3, 1.0])[:, None, None]
    heads = heads.with_qkv(sizes * q, sizes * q, v)
    operator = create_operator(Choice(name), LayerShape(HEADS, 16, geometry))
    start = {key: tensor.clone() for key, tensor in operator.state_dict().items()}
    target = SoftmaxAttention(operator.shape)(heads)
    per_head = (operator(heads) - target).square().sum((0, 2, 3))
    before, after = calibrate(operator, heads, target)
    assert ((operator(heads) - target).square().sum((0, 2, 3)) <= per_head).all()
    if name == "linear":
        assert before == after
        return
    assert after < 0.97 * before
    changed = [key for key, tensor in operator.state_dict().items() if not torch.equal(tensor, start[key])]
    assert changed
    first, second = (operator.state_dict()[changed[0]][head] - start[changed[0]][head] for head in (0, 1))
    assert not torch.allclose(first, second)


def test_half_precision_does_not_overflow_in_powers_and_sums() -> None:
    geometry = Geometry(1, (32, 32))
    heads = draw(geometry, torch.float16, size=20)
    for name in PRESETS:
        out = Case(name).build(geometry, torch.float16)(heads)
        assert out.dtype == torch.float16
        assert out.isfinite().all(), name


def test_autocast_leaves_the_features_precise() -> None:
    heads = draw(GEOMETRY, torch.float32, size=4)
    for name in PRESETS:
        operator = Case(name, {} if name == "cosformer" else {"local": "none", "local_size": None})
        built = operator.build(GEOMETRY, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            inside = built(heads)
        torch.testing.assert_close(inside, built(heads), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("choice", "ratio"),
    [
        (Choice("linear"), 0.33),
        (Choice("performer", {"num_features": 266}), 2.72),
        (Choice("performer"), 0.66),
        (Choice("hedgehog"), 0.98),
        (Choice("inline", {"local": "none", "local_size": None}), 0.33),
    ],
    ids=str,
)
def test_cost_against_softmax_at_197_tokens(choice: Choice, ratio: float) -> None:
    shape = LayerShape(3, 64, Geometry(1, (14, 14)))
    softmax = SoftmaxAttention(shape).macs(shape.geometry)
    assert create_operator(choice, shape).macs(shape.geometry) / softmax == pytest.approx(ratio, abs=0.006)


def test_cost_counts_convolutions_and_wider_features() -> None:
    shape = LayerShape(3, 64, Geometry(1, (14, 14)))
    plain = KernelAttention(shape).macs(shape.geometry)
    assert KernelAttention(shape, local="v").macs(shape.geometry) == plain + 25 * 196 * 192
    assert KernelAttention(shape, local="qk").macs(shape.geometry) == plain + 2 * 9 * 196 * 192
    cosine = KernelAttention(shape, feature="cosine")
    assert cosine.macs(shape.geometry) == 197 * 3 * (2 * 384 * 64 + 384)
    assert cosine.macs(Geometry(0, (14, 14))) == 196 * 3 * (2 * 256 * 64 + 256)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature": "elu1"}, "plan: feature=elu1; did you mean 'elu'"),
        ({"normalizer": "summ"}, "plan: normalizer=summ; did you mean 'sum'"),
        ({"local": "kv"}, "plan: local=kv"),
        ({"local": "v", "local_size": 4}, "local_size=4 is not an odd number"),
        ({"local_size": 3}, "local_size=3 needs local=v or local=qk"),
        ({"num_features": 4}, "num_features=4: this feature map"),
        ({"feature": "favor", "num_features": 0}, "num_features=0 is not a positive whole number"),
        ({"feature": "identity"}, "use normalizer=inline"),
        ({"feature": "identity", "normalizer": "mala"}, "use normalizer=inline"),
        ({"center": "yess"}, "center=yess; write true or false"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        create_operator(Choice("kernel", options), SHAPE)
    assert message in str(error.value)
