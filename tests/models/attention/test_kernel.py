"""Kernel attention against the equation of each of its parts, written dense and independently."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from graftvit.models.attention import chunked, features
from graftvit.models.attention.base import Geometry, Heads, LayerShape
from graftvit.models.attention.features import Favor, default_features, orthogonal_features
from graftvit.models.attention.kernel import FEATURES, NORMALIZERS, KernelAttention
from graftvit.models.attention.softmax import SoftmaxAttention
from graftvit.models.calibration import calibrate
from graftvit.models.errors import UnsupportedModelError
from graftvit.models.layer_plan import Choice, create_operator
from support.models.operator_cases import HEADS, WIDTH, Case, check_against_map, draw
from torch import Tensor

GEOMETRY = Geometry(2, (3, 5))
SHAPE = LayerShape(HEADS, WIDTH, GEOMETRY)
PRESETS = [
    "linear",
    "performer",
    "hedgehog",
    "t2r",
    "focused",
    "cosformer",
    "inline",
    "mala",
    "rala",
    "pola",
    "nala",
]


def pairs(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bhid,bhjd->bhij", q, k)


def project(feature: Any, q: Tensor, k: Tensor) -> Iterator[Tensor]:
    """Project queries and keys by the learned weights of a feature map, with its biases if it has any."""
    for x, side in ((q, "q"), (k, "k")):
        y = torch.einsum("bhnd,hdf->bhnf", x, getattr(feature, f"{side}_weight"))
        yield y + getattr(feature, f"{side}_bias", 0)


def elu(feature: Any, q: Tensor, k: Tensor) -> Tensor:
    q, k = (torch.where(x > 0, x + 1, x.exp()) for x in (q, k))
    return pairs(q, k)


def relu(feature: Any, q: Tensor, k: Tensor) -> Tensor:
    return pairs(q * (q > 0), k * (k > 0))


def identity(feature: Any, q: Tensor, k: Tensor) -> Tensor:
    return pairs(q, k)


def t2r(feature: Any, q: Tensor, k: Tensor) -> Tensor:
    return relu(feature, *project(feature, q, k))


def shares(x: Tensor) -> Tensor:
    return x.exp() / x.exp().sum(-1, keepdim=True)


def hedgehog(feature: Any, q: Tensor, k: Tensor) -> Tensor:
    q, k = project(feature, q, k)
    return pairs(shares(q), shares(k)) + pairs(shares(-q), shares(-k))


def hedgehog_joint(feature: Any, q: Tensor, k: Tensor) -> Tensor:
    """2 cosh(2 (y_q + y_k)) summed over features, by what each side's softmax divides by."""
    q, k = project(feature, q, k)
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


def nala(feature: Any, q: Tensor, k: Tensor) -> Tensor:
    """Pairs of equal signs: a product to the powers of the query and of the key."""
    norm = (q * q).sum(-1).sqrt()[..., None]
    power = 1.5 + 3 * norm.tanh()
    weights = (q / norm).abs()[:, :, :, None] ** power[:, :, :, None] * k.abs()[:, :, None] ** 3
    return (weights * (q.sign()[:, :, :, None] == k.sign()[:, :, None])).sum(-1)


EQUATIONS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    each.__name__: each
    for each in (elu, relu, identity, t2r, hedgehog, hedgehog_joint, focused, favor, cosine, nala)
}


def normalized(weights: Tensor, normalizer: str, scale: float) -> Tensor:
    tokens = weights.shape[-1]
    if normalizer == "rala":  # every key by the mean of its column
        weights = weights * tokens * (scale * weights.mean(-2, keepdim=True)).softmax(-1)
    if normalizer in ("sum", "rala"):
        return weights / weights.sum(-1, keepdim=True).clamp_min(1e-6 * tokens)
    weights = scale * weights
    z = weights.mean(-1, keepdim=True)
    if normalizer == "inline":
        return (weights + 1 - z) / tokens
    return (weights * (1 + 1 / z) - z) / tokens


def build(**options: Any) -> Any:
    return Case("kernel", options).build(GEOMETRY)


def test_every_feature_map_has_its_equation() -> None:
    assert {*EQUATIONS, "pola"} == set(FEATURES)


@pytest.mark.parametrize(
    ("feature", "normalizer"),
    [
        (feature, normalizer)
        for feature in EQUATIONS
        for normalizer in NORMALIZERS
        if feature != "identity" or normalizer == "inline"  # the others are refused, see below
    ],
)
def test_the_map_is_the_equation(feature: str, normalizer: str) -> None:
    operator, heads = build(feature=feature, normalizer=normalizer), draw(GEOMETRY, seed=4)
    q, k, v = heads.qkv()
    weights = normalized(EQUATIONS[feature](operator.feature, q, k), normalizer, heads.scale)
    torch.testing.assert_close(operator.matrix(heads), weights, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(operator(heads), weights @ v, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_each_half_of_the_channels_has_the_map_of_its_signs(normalizer: str) -> None:
    operator, heads = build(feature="pola", normalizer=normalizer), draw(GEOMETRY, seed=4)
    (q, k, v), feature = heads.qkv(), operator.feature
    scale, power = (1 + feature.temperature.exp()).log(), 1 + 4 / (1 + (-feature.power).exp())
    products = ((q / scale).abs() ** power)[:, :, :, None] * ((k / scale).abs() ** power)[:, :, None]
    same = (q > 0)[:, :, :, None] == (k > 0)[:, :, None]
    weights = [(products * same).sum(-1), (products * ~same).sum(-1)]
    if normalizer == "rala":  # both halves weigh the keys by the pairs of equal signs
        columns = GEOMETRY.num_tokens * (heads.scale * weights[0].mean(-2, keepdim=True)).softmax(-1)
        weights, normalizer = [columns * each for each in weights], "sum"
    maps = [normalized(each, normalizer, heads.scale) for each in weights]
    wanted = torch.cat([each @ half for each, half in zip(maps, v.chunk(2, -1), strict=True)], -1)
    torch.testing.assert_close(operator(heads), wanted, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(operator.matrix(heads), sum(maps) / 2, rtol=1e-8, atol=1e-11)
    with pytest.raises(UnsupportedModelError, match="each half of a head's channels has its own map"):
        operator.terms(heads)


@pytest.mark.parametrize("feature", ["elu", "nala"])
def test_rotated_features_weigh_a_pair_by_cosines_of_its_distance(feature: str) -> None:
    """With complex features, one for two channels, a pair has the real part of its product turned by the distance."""
    operator, heads = build(feature=feature, rope=True), draw(GEOMETRY, seed=4)
    q, k = (torch.view_as_complex(x.unflatten(3, (-1, 2))) for x in operator.features(heads))
    frequencies = torch.tensor([1.0, 1e-4], dtype=torch.float64)
    weights = torch.zeros(2, HEADS, GEOMETRY.num_tokens, GEOMETRY.num_tokens, dtype=torch.float64)
    places = [(0, 0), (0, 0), *((row, column) for row in range(3) for column in range(5))]
    for i, (row, column) in enumerate(places):
        for j, (its_row, its_column) in enumerate(places):
            turns = torch.cat([(row - its_row) * frequencies, (column - its_column) * frequencies])
            turns = turns.repeat(q.shape[3] // len(turns))
            product = q[:, :, i] * k[:, :, j].conj() * torch.polar(torch.ones_like(turns), turns)
            weights[:, :, i, j] = product.real.sum(-1)
    plain = EQUATIONS[feature](operator.feature, *heads.qk())
    wanted = weights / plain.sum(-1, keepdim=True)
    torch.testing.assert_close(operator.matrix(heads), wanted, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(operator(heads), wanted @ heads.values(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", PRESETS)
def test_a_shift_of_all_keys_changes_nothing(name: str) -> None:
    heads = draw(GEOMETRY)
    q, k, v = heads.qkv()
    shift = torch.linspace(-3, 5, WIDTH, dtype=torch.float64)
    operator = Case(name).build(GEOMETRY)
    shifted = heads.with_qkv(q, k + shift, v)
    for each in (operator, Case(name, {"local": "qk"}).build(GEOMETRY)):
        torch.testing.assert_close(each(shifted), each(heads), rtol=1e-7, atol=1e-9)
    if name != "inline":
        plain = Case(name, {"center": False}).build(GEOMETRY)
        assert not torch.allclose(plain(shifted), plain(heads), atol=1e-3)


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


def test_a_dynamic_convolution_has_its_weights_from_the_mean_value() -> None:
    operator, heads = build(local="dynamic"), draw(GEOMETRY)
    v, conv, channels = heads.values(), operator.v_conv, HEADS * WIDTH
    places = [(row, column) for row in range(3) for column in range(5)]
    wanted = torch.zeros_like(v)
    for image in range(2):
        hidden = conv.squeeze.weight @ v[image].mean(1).reshape(channels)
        weight = conv.generate.weight @ (hidden / (1 + (-hidden).exp())) + conv.static.weight.flatten()
        weight = weight.reshape(HEADS, WIDTH, 3, 3)
        for token, (row, column) in enumerate(places):
            for other, (its_row, its_column) in enumerate(places):
                down, right = its_row - row, its_column - column
                if max(abs(down), abs(right)) <= 1:
                    tap = weight[:, :, down + 1, right + 1]
                    wanted[image, :, 2 + token] += tap * v[image, :, 2 + other]
    torch.testing.assert_close(operator.local(heads), wanted)
    torch.testing.assert_close(operator(heads), operator.attend(heads) + wanted)
    macs = operator.macs(GEOMETRY) - build().macs(GEOMETRY)
    assert macs == 9 * 15 * channels + (channels + 9 * channels) * (channels // 8)


def test_a_dynamic_convolution_does_not_see_padding() -> None:
    operator, heads = build(local="dynamic"), draw(GEOMETRY)
    kept = 2 + 10  # the prefix and the first two rows
    heads.key_mask = (torch.arange(GEOMETRY.num_tokens) < kept).expand(2, -1)
    q, k, v = (x[:, :, :kept] for x in heads.qkv())
    alone = Heads(q, k, v, None, heads.scale, geometry=Geometry(2, (2, 5)))
    torch.testing.assert_close(operator(heads)[:, :, :kept], operator(alone), rtol=1e-8, atol=1e-10)


def test_weights_of_each_image_are_the_same_without_torchs_convolution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a compiled or exported model computes them, and a GPU."""
    operator, heads = build(local="dynamic", local_size=5), draw(GEOMETRY)
    wanted = operator.local(heads)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(operator.local(heads), wanted)


def test_queries_and_keys_get_their_neighbours_before_the_features() -> None:
    operator, heads = build(local="qk", local_size=3), draw(GEOMETRY)
    q, k, v = heads.qkv()
    moved = heads.with_qkv(q + operator.q_conv(q, GEOMETRY), k + operator.k_conv(k, GEOMETRY), v)
    torch.testing.assert_close(operator.matrix(heads), build().matrix(moved))
    torch.testing.assert_close(operator.features(heads)[0][:, :, :2], build().features(heads)[0][:, :, :2])
    assert operator.local(heads) is None


@pytest.mark.parametrize("local", ["v", "qk", "dynamic"])
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


def test_cost_counts_convolutions_and_wider_features() -> None:
    shape = LayerShape(3, 64, Geometry(1, (14, 14)))
    plain = KernelAttention(shape).macs(shape.geometry)
    assert KernelAttention(shape, local="v").macs(shape.geometry) == plain + 25 * 196 * 192
    assert KernelAttention(shape, local="qk").macs(shape.geometry) == plain + 2 * 9 * 196 * 192
    cosine = KernelAttention(shape, feature="cosine")
    assert cosine.macs(shape.geometry) == 197 * 3 * (2 * 384 * 64 + 384)
    assert cosine.macs(Geometry(0, (14, 14))) == 196 * 3 * (2 * 256 * 64 + 256)


# FAVOR+: the estimate converges to softmax attention, and Ω is orthogonal, saved, and stays as it was drawn.


LARGER = Geometry(1, (4, 6))
LARGER_SHAPE = LayerShape(2, 8, LARGER)


def performer(num_features: int, **options: Any) -> Any:
    return KernelAttention(LARGER_SHAPE, feature="favor", num_features=num_features, **options).double()


def test_features_are_an_unbiased_estimate_of_the_exponential() -> None:
    torch.manual_seed(0)
    feature: Any = Favor(LARGER_SHAPE, num_features=80_000).double()
    q, k, _ = draw(LARGER, size=0.35, batch=1).qkv()
    scale = LARGER_SHAPE.head_dim**-0.5
    q_features, k_features = (feature._exponents(x, scale).exp() for x in (q, k))
    estimate = q_features @ k_features.transpose(2, 3) / 80_000
    torch.testing.assert_close(estimate, (scale * q @ k.transpose(2, 3)).exp(), rtol=0.05, atol=0)


def test_the_map_converges_to_softmax() -> None:
    heads = draw(LARGER, size=0.5)
    target = SoftmaxAttention(LARGER_SHAPE).matrix(heads)
    errors = []
    for num_features in (8, 256, 16_384):
        torch.manual_seed(1)
        errors.append(float((performer(num_features).matrix(heads) - target).norm() / target.norm()))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 0.03


def test_orthogonal_rows_estimate_better_than_independent_ones() -> None:
    heads = draw(LARGER)
    target = SoftmaxAttention(LARGER_SHAPE).matrix(heads)

    def error(omega: Tensor) -> float:
        operator = performer(8)
        operator.feature.omega.copy_(omega)
        return float((operator.matrix(heads) - target).square().sum())

    torch.manual_seed(2)
    orthogonal = sum(error(orthogonal_features(8, 8)) for _ in range(100))
    independent = sum(error(torch.randn(8, 8)) for _ in range(100))
    assert orthogonal < independent


def test_rows_are_orthogonal_in_blocks_and_as_long_as_gaussian_vectors() -> None:
    torch.manual_seed(0)
    omega = orthogonal_features(3000, 16)
    assert omega.shape == (3000, 16)
    lengths = omega.norm(dim=1)
    for block in (omega / lengths[:, None]).split(16):
        torch.testing.assert_close(block @ block.T, torch.eye(len(block)), rtol=0, atol=1e-5)
    assert float(lengths.square().mean()) == pytest.approx(16, rel=0.05)
    first = omega[::16, 0]  # of a plain QR, always negative
    assert float(first.mean().abs()) < 5 / len(first) ** 0.5
    assert float(lengths.var()) == pytest.approx(0.5, rel=0.2)  # of chi with 16 degrees, nearly


def test_forward_changes_nothing() -> None:
    operator, heads = performer(16), draw(LARGER)
    omega = operator.feature.omega.clone()
    first = operator.train()(heads)
    torch.testing.assert_close(operator.eval()(heads), first, rtol=0, atol=0)
    assert torch.equal(operator.feature.omega, omega)
    assert omega.dtype == torch.float64


def test_a_saved_operator_is_the_same_operator() -> None:
    first, second, heads = performer(16), performer(16), draw(LARGER)
    assert not torch.allclose(first(heads), second(heads))
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(first(heads), second(heads), rtol=0, atol=0)
    assert not list(first.parameters())


def test_features_are_fewer_where_the_image_is_small() -> None:
    counts = [default_features(LayerShape(3, 64, Geometry(1, (side, side)))) for side in (7, 14, 24, 32, 64)]
    assert counts == [64, 64, 144, 256, int(64 * math.log(64))]
    shape = LayerShape(3, 64, Geometry(1, (14, 14)))
    favored, softmax = KernelAttention(shape, feature="favor"), SoftmaxAttention(shape)
    assert favored.macs(shape.geometry) < softmax.macs(shape.geometry)


def test_same_map_as_performer_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the constant that both add to the exponential: with it they differ, as the next test says."""
    reference = pytest.importorskip("performer_pytorch.performer_pytorch")
    monkeypatch.setattr(features, "EPSILON", 0.0)
    operator, heads = performer(24), draw(LARGER)
    q, k, v = heads.qkv()
    omega = operator.feature.omega
    q, k = (
        reference.softmax_kernel(x, projection_matrix=omega, is_query=is_query, eps=0.0)
        for x, is_query in ((q, True), (k, False))
    )
    torch.testing.assert_close(operator(heads), reference.linear_attention(q, k, v), rtol=1e-9, atol=1e-11)


def test_the_added_constant_does_not_swamp_long_tokens_as_in_performer_pytorch() -> None:
    """It takes the largest Ω x out of the exponent and leaves −‖x‖²/2 in, so that all features of a long token fall
    below 1e-4 and its row becomes uniform; here the largest exponential is 1."""
    reference = pytest.importorskip("performer_pytorch.performer_pytorch")
    operator, heads = performer(24), draw(LARGER, size=4)
    q, k, _ = heads.qkv()
    maps = []
    for epsilon in (1e-4, 0.0):
        mapped = [
            reference.softmax_kernel(
                x, projection_matrix=operator.feature.omega, is_query=is_query, eps=epsilon
            )
            for x, is_query in ((q, True), (k, False))
        ]
        weights = mapped[0] @ mapped[1].transpose(2, 3)
        maps.append(weights / weights.sum(-1, keepdim=True))
    theirs, exact = maps
    assert (operator.matrix(heads) - exact).norm() < 0.5 * (theirs - exact).norm()


# Kernel attention in chunks of tokens against its whole map.


CHUNKED = [
    Case("linear"), Case("performer"), Case("cosformer"), Case("kernel", {"feature": "relu"}),
    Case("kernel", {"feature": "favor", "num_features": 11, "local": "v"}), Case("kernel", {"feature": "cosine"}),
]  # fmt: skip


def cut(monkeypatch: pytest.MonkeyPatch, tokens: int, width: int) -> list[Any]:
    """Make chunks of `tokens` tokens; the list gets every forward pass in chunks."""
    calls: list[Any] = []
    apply = chunked._ChunkedAttention.apply
    monkeypatch.setitem(chunked.CACHED, "cpu", tokens * HEADS * width)
    monkeypatch.setattr(
        chunked._ChunkedAttention, "apply", lambda *inputs: calls.append(inputs) or apply(*inputs)
    )
    return calls


@pytest.mark.parametrize("case", CHUNKED, ids=str)
@pytest.mark.parametrize(
    "tokens",
    [1, 7, 50, 75],
    ids=["one", "several", "two images", "all images"],
)
def test_chunks_give_map_and_gradients(case: Case, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    operator: Any = case.build(LARGER)
    calls = cut(monkeypatch, tokens, operator.feature.num_features(LARGER))
    check_against_map(operator, draw(LARGER, batch=3, size=2))
    assert len(calls) == 1


def test_a_copied_operator_runs_in_chunks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = draw(LARGER)
    heads.values().requires_grad_()
    calls = cut(monkeypatch, 5, WIDTH)
    copy.deepcopy(Case("linear").build(LARGER))(heads)
    assert len(calls) == 1


def test_no_query_divides_by_zero_where_all_its_features_are(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 5, WIDTH)
    operator, heads = Case("kernel", {"feature": "relu"}).build(LARGER), draw(LARGER)
    q, k, v = heads.qkv()
    inputs = [-q.abs().requires_grad_(), k.requires_grad_(), v.requires_grad_()]
    out = operator(heads.with_qkv(inputs[0], inputs[1], inputs[2]))
    assert not out.any()
    assert all(not gradient.any() for gradient in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("name", ["performer", "cosformer"])
def test_half_precision_keeps_float32_sums(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 5, WIDTH)
    operator, heads = (
        Case(name).build(LARGER, torch.float32),
        draw(LARGER, torch.bfloat16),
    )
    inputs = [x.requires_grad_() for x in heads.qkv()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = operator(heads)
        gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
    wanted_inputs = [x.detach().float().requires_grad_() for x in inputs]
    wanted = operator(heads.with_qkv(wanted_inputs[0], wanted_inputs[1], wanted_inputs[2]))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), wanted, rtol=1e-2, atol=1e-3)
    for found, dense in zip(
        gradients, torch.autograd.grad(wanted, wanted_inputs, torch.ones_like(wanted)), strict=True
    ):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), dense, rtol=2e-2, atol=2e-2)


def test_features_that_need_no_gradient_are_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass keeps q, k, v, the output and the sums: nothing as large as the features."""
    cut(monkeypatch, 50, 2 * WIDTH)
    geometry = Geometry(0, (32, 32))
    operator, heads = Case("performer").build(geometry), draw(geometry, batch=1)
    kept: list[int] = []
    for x in heads.qkv():
        x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        operator.attend(heads)
    assert max(kept) == heads.values().numel()
