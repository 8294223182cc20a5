"""Kernel attention: φ(q)·φ(k) replaces exp(s q·k), so keys and values are summed once for all queries."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, did_you_mean
from .base import AttentionOperator, Geometry, Heads, LayerShape, LowRank, Term, Traits
from .chunked import ChunkedFeatures, chunked_attention, in_chunks
from .features import Cosine, Elu, Favor, FeatureMap, Identity, Nala, Pola, Relu, rotated
from .kernels import precise
from .local import DepthwiseConv, DynamicConv

# Feature maps with parameters: T2R, both forms of Hedgehog, and the focused map of FLatten.

FOCUS = 3
FOCUSED_FLOOR = 1e-6


class LinearMaps(FeatureMap):
    """W x + b for queries and for keys, separate for each head. b starts at zero, W at the identity.

    If the number of features is not the head width, W starts as a random orthogonal matrix.
    """

    sizes_features = True
    has_bias = True

    def __init__(self, shape: LayerShape, num_features: int | None = None) -> None:
        super().__init__(shape, num_features)
        self.width = num_features or shape.head_dim
        self.q_weight, self.k_weight = (nn.Parameter(_start(shape, self.width)) for _ in range(2))
        if self.has_bias:
            size = (shape.num_heads, 1, self.width)
            self.q_bias, self.k_bias = (nn.Parameter(torch.zeros(size)) for _ in range(2))

    def num_features(self, geometry: Geometry) -> int:
        return self.width

    @property
    def macs_per_token(self) -> int:
        return self.shape.head_dim * self.width

    def mapped(self, heads: Heads) -> tuple[Tensor, Tensor]:
        """Return W x + b of queries and keys, (B, H, N, width)."""
        q, k = heads.qk()
        q, k = q @ self.q_weight.to(q.dtype), k @ self.k_weight.to(k.dtype)
        return (q + self.q_bias.to(q.dtype), k + self.k_bias.to(k.dtype)) if self.has_bias else (q, k)


class T2R(LinearMaps):
    """φ(x) = relu(W x + b) (Kasai et al. 2021, arXiv 2103.13076).

    Scaling W does not change the map, so calibration shifts b: up for flatter rows, down for sharper ones.
    """

    positive = False
    candidates = (0.0, -0.5, 0.25, 0.5, 1.0, 2.0, 4.0)

    def forward(self, heads: Heads) -> tuple[Tensor, Tensor]:
        q, k = self.mapped(heads)
        return F.relu(q), F.relu(k)

    def adjust(self, value_H11: Tensor) -> None:
        for bias in (self.q_bias, self.k_bias):
            bias.data += value_H11


class Hedgehog(LinearMaps):
    """φ(x) = [softmax(W x), softmax(−W x)], as in LoLCATs (Zhang et al. 2024, arXiv 2410.10254).

    2 D features. The scale s of the layer is not applied: W contains the temperature, which calibration chooses.
    """

    has_bias = False
    candidates = (1.0, 0.25, 0.5, 0.7, 1.4, 2.0, 4.0)

    def num_features(self, geometry: Geometry) -> int:
        return 2 * self.width

    def forward(self, heads: Heads) -> tuple[Tensor, Tensor]:
        q, k = (torch.cat([x.softmax(-1), (-x).softmax(-1)], -1) for x in self.mapped(heads))
        return q, k

    def adjust(self, value_H11: Tensor) -> None:
        for parameter in self.parameters():
            parameter.data *= value_H11


class JointHedgehog(Hedgehog):
    """φ(x) = softmax([2 (W x + b), −2 (W x + b)]): one softmax over both signs (Zhang et al. 2024, arXiv 2402.04347,
    in the form of the `fla` library). There all heads share W and b; here each head has its own.
    """

    has_bias = True

    def forward(self, heads: Heads) -> tuple[Tensor, Tensor]:
        q, k = (torch.cat([2 * x, -2 * x], -1).softmax(-1) for x in self.mapped(heads))
        return q, k


class Focused(FeatureMap):
    """φ(x) = (‖y‖ / ‖y³‖) y³ with y = (relu(x) + 1e-6) / softplus(t) (Han et al. 2023, arXiv 2308.00442).

    The power is elementwise, and both norms are over all channels of all heads, as in the released code. Queries and
    keys share t, one per channel, which starts at zero.
    """

    positive = False

    def __init__(self, shape: LayerShape, num_features: int | None = None) -> None:
        super().__init__(shape, num_features)
        self.temperature = nn.Parameter(torch.zeros(shape.num_heads, 1, shape.head_dim))

    @property
    def macs_per_token(self) -> int:
        return 5 * self.shape.head_dim

    def forward(self, heads: Heads) -> tuple[Tensor, Tensor]:
        q, k = heads.qk()
        return self._focus(q), self._focus(k)

    def _focus(self, x_BHND: Tensor) -> Tensor:
        y = (F.relu(x_BHND) + FOCUSED_FLOOR) / F.softplus(self.temperature.to(x_BHND.dtype))
        power: Tensor = y**FOCUS
        return power * (_norm(y) / _norm(power))


def _norm(x_BHND: Tensor) -> Tensor:
    """Return the norm (B, 1, N, 1) of each token over the channels of all heads."""
    return torch.linalg.vector_norm(x_BHND, dim=(1, 3), keepdim=True)


def _start(shape: LayerShape, width: int) -> Tensor:
    """Return the initial W, (H, D, width)."""
    weight = torch.eye(shape.head_dim, width).repeat(shape.num_heads, 1, 1)
    if width != shape.head_dim:
        for matrix in weight:
            nn.init.orthogonal_(matrix)
    return weight


# Normalizers of kernel attention: features φ(q), φ(k) to factors L, R of a map A = L Rᵀ / N whose rows sum to one.
#
# Each takes φ(q) and φ(k) of shape (B, H, N, F), the mean key feature (B, H, 1, F) and the scale s of the layer, and
# returns L and R, (B, H, N, F) or one column wider. The means are over tokens that are not padding.
#
# Each also returns A V without the factors. It takes `Sums` of the keys and changes outputs (B, H, N, D) in place of
# features, which are wider or as wide.

EPSILON = 1e-6
Factors: TypeAlias = tuple[Tensor, Tensor]


class Sums(NamedTuple):
    """Means over the keys j that are not padding."""

    products: Tensor
    """Of φ(k_j) v_jᵀ, (B, H, F, D)."""
    keys: Tensor
    """Of φ(k_j), (B, H, 1, F)."""
    values: Tensor | None
    """Of v_j, (B, H, 1, D), if the normalizer has an extra column."""

    def by_signs(self) -> list[Sums]:
        """Return the sums for the first half of the values, and for the second, with the halves of φ(q) exchanged."""
        half, width = -(-self.products.shape[3] // 2), self.products.shape[2] // 2
        values = (None, None) if self.values is None else (self.values[..., :half], self.values[..., half:])
        opposite = self.products[..., half:].roll(width, 2), self.keys.roll(width, 3), values[1]
        return [Sums(self.products[..., :half], self.keys, values[0]), Sums(*opposite)]


@dataclass(frozen=True)
class Normalizer:
    """A normalization and the properties of its map."""

    factors: Callable[[Tensor, Tensor, Tensor, float], Factors]
    output: Callable[[Tensor, Sums, float], Tensor]
    """A V from φ(q), the sums of the keys and the scale."""
    nonnegative: bool
    """The map is nonnegative if the features are."""
    divides: bool
    """It divides by φ(q)·φ̄(k), which can be zero for features of both signs."""
    extra: int
    """The number of columns of L and R beyond the features."""
    weighs_keys: bool = False
    """Every φ(k_j) is first multiplied by N α_j, see `rank_weights`."""


def by_sum(q_BHNF: Tensor, k_BHNF: Tensor, mean_BH1F: Tensor, scale: float) -> Factors:
    """A_ij = φ(q_i)·φ(k_j) / Σ_j φ(q_i)·φ(k_j) (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 5)."""
    return q_BHNF / _sums(q_BHNF, mean_BH1F).clamp_min(EPSILON), k_BHNF


def inline(q_BHNF: Tensor, k_BHNF: Tensor, mean_BH1F: Tensor, scale: float) -> Factors:
    """A_ij = (1 + s φ(q_i)·(φ(k_j) − φ̄)) / N, signed: InLine (Han et al. 2024, arXiv 2412.06590, eq. 5)."""
    return _with_ones(scale * q_BHNF), _with_ones(k_BHNF - mean_BH1F)


def mala(q_BHNF: Tensor, k_BHNF: Tensor, mean_BH1F: Tensor, scale: float) -> Factors:
    """A_ij = (s φ(q_i)·φ(k_j) (1 + 1/z_i) − z_i) / N with z_i = s φ(q_i)·φ̄: MALA (Fan et al. 2025, arXiv 2507.00698).

    This is the map of `by_sum` plus the map of `inline` without its 1/N.
    """
    left, right = by_sum(q_BHNF, k_BHNF, mean_BH1F, scale)
    shift = -scale * _sums(q_BHNF, mean_BH1F)
    return torch.cat([left + scale * q_BHNF, shift], -1), _with_ones(right)


def rank_weights(q_BHNF: Tensor, k_BHNF: Tensor, heads: Heads) -> Tensor:
    """Return N α_j (B, H, N, 1) with α = softmax_j(s φ̄(q)·φ(k_j)), which raises the rank of Σ φ(k_j) v_jᵀ.

    With it, `by_sum` is A_ij = α_j φ(q_i)·φ(k_j) / Σ_j α_j φ(q_i)·φ(k_j): RALA (Fan et al. 2025, arXiv 2411.07635).
    The paper also multiplies the output by a projection of the layer's input, which operators do not get.
    """
    logits = heads.scale * k_BHNF @ mean_of_keys(without_padding(q_BHNF, heads), heads).mT
    if heads.key_mask is not None:
        logits = logits.masked_fill(~heads.key_mask[:, None, :, None], torch.finfo(logits.dtype).min)
    return logits.softmax(2) * _num_keys(k_BHNF, heads)


def sum_output(q_BHNF: Tensor, sums: Sums, scale: float) -> Tensor:
    """Return A V for the map of `by_sum`."""
    return (q_BHNF @ sums.products) / _totals(q_BHNF, sums).clamp_min(EPSILON)


def inline_output(q_BHNF: Tensor, sums: Sums, scale: float) -> Tensor:
    """Return A V for the map of `inline`."""
    assert sums.values is not None
    centered = sums.products - sums.keys.transpose(2, 3) * sums.values
    return q_BHNF @ (scale * centered) + sums.values


def mala_output(q_BHNF: Tensor, sums: Sums, scale: float) -> Tensor:
    """Return A V for the map of `mala`."""
    assert sums.values is not None
    totals = _totals(q_BHNF, sums)
    factors = totals.clamp_min(EPSILON).reciprocal() + scale
    return torch.addcmul((q_BHNF @ sums.products) * factors, totals, sums.values, value=-scale)


NORMALIZERS = {
    "sum": Normalizer(by_sum, sum_output, nonnegative=True, divides=True, extra=0),
    "inline": Normalizer(inline, inline_output, nonnegative=False, divides=False, extra=1),
    "mala": Normalizer(mala, mala_output, nonnegative=False, divides=True, extra=1),
    "rala": Normalizer(by_sum, sum_output, nonnegative=True, divides=True, extra=0, weighs_keys=True),
}


def _totals(q_BHNF: Tensor, sums: Sums) -> Tensor:
    """Return φ(q)·φ̄, (B, H, N, 1)."""
    return q_BHNF @ sums.keys.transpose(2, 3)


def _sums(q_BHNF: Tensor, mean_BH1F: Tensor) -> Tensor:
    return (q_BHNF * mean_BH1F).sum(-1, keepdim=True)


def _with_ones(x_BHNF: Tensor) -> Tensor:
    return torch.cat([x_BHNF, torch.ones_like(x_BHNF[..., :1])], -1)


FEATURES: dict[str, type[FeatureMap]] = {
    "elu": Elu,
    "relu": Relu,
    "identity": Identity,
    "t2r": T2R,
    "hedgehog": Hedgehog,
    "hedgehog_joint": JointHedgehog,
    "focused": Focused,
    "pola": Pola,
    "nala": Nala,
    "favor": Favor,
    "cosine": Cosine,
}
LOCAL = ("none", "v", "qk", "dynamic")
LOCAL_SIZES = {"v": 5, "qk": 3, "dynamic": 3}


class KernelAttention(AttentionOperator):
    """A = L Rᵀ / N from features φ(q), φ(k), normalized so that rows sum to one; 2 N F D multiply-adds per head.

    The options combine freely:

    feature:    φ, one of FEATURES; `num_features` sets its width if the map allows it.
    normalizer: how to compute A from φ(q)·φ(k), one of NORMALIZERS.
    local:      "v" adds a depthwise convolution of the values to A V, "dynamic" one whose weights depend on their mean
                (`DynamicConv`); "qk" adds to queries and keys a convolution of themselves before φ. `local_size` is
                the side of its window (default: 5 for v, else 3).
    rope:       multiply A by cosines of the distance: φ(q) and φ(k) are rotated (`rotated`) after the normalization, as
                in MILA (Han et al. 2024, arXiv 2405.16605) and the code of RALA. For the normalizers sum and rala, and
                features whose number is a multiple of D. Rows then no longer sum to one.
    center:     subtract the mean key from all keys first. Softmax attention is invariant to it, a kernel is not, and
                keys of pretrained models have a large common mean.

    Features, normalizers and sums are computed in float32 or better. Sums and means ignore padding (`Heads.key_mask`).

    Raises ConfigError: an option is invalid, or two options cannot be combined.
    """

    def __init__(
        self,
        shape: LayerShape,
        feature: str = "elu",
        normalizer: str = "sum",
        local: str = "none",
        center: bool = False,
        num_features: int | None = None,
        local_size: int | None = None,
        rope: bool = False,
    ) -> None:
        super().__init__(shape)
        _check("feature", feature, FEATURES)
        _check("normalizer", normalizer, NORMALIZERS)
        _check("local", local, LOCAL)
        for option, value in (("center", center), ("rope", rope)):
            if not isinstance(value, bool):
                raise ConfigError(f"plan: {option}={value}; write true or false")
        self.feature = FEATURES[feature](shape, num_features)
        self.normalizer = NORMALIZERS[normalizer]
        if self.normalizer.divides and not self.feature.nonnegative:
            raise ConfigError(
                f"plan: feature={feature} can be negative, and normalizer={normalizer} divides by sums of it; "
                "use normalizer=inline"
            )
        self.center, self.rope = center, rope
        if rope and (self.normalizer.extra or shape.head_dim % 4 or self._num_features % shape.head_dim):
            raise ConfigError(
                "plan: rope=true needs normalizer=sum or rala, a multiple of 4 channels a head, and a multiple of them "
                f"as features; here are {normalizer}, {shape.head_dim} channels and {self._num_features} features"
            )
        self.v_conv, self.q_conv, self.k_conv = _convolutions(shape, local, local_size)

    @property
    def traits(self) -> Traits:
        return Traits(
            linear_in_v=not self.feature.opposed,
            nonnegative=self.feature.nonnegative and self.normalizer.nonnegative and not self.rope,
            row_stochastic=(self.feature.positive or not self.normalizer.divides) and not self.rope,
            needs_grid=self.feature.needs_grid or self.rope or bool(self.v_conv or self.q_conv),
            key_mask=True,
            graph_any_grid=not self.feature.needs_grid and not self.rope,
        )

    @property
    def why_no_map(self) -> str:
        return "each half of a head's channels has its own map" if self.feature.opposed else ""

    def attend(self, heads: Heads) -> Tensor:
        v_BHND = heads.values()
        chunks = self._chunks(heads)
        if chunks is not None:
            return chunked_attention(chunks, *heads.qkv(), center=self.center, least=EPSILON)
        with torch.autocast(v_BHND.device.type, enabled=False):
            q_BHNF, k_BHNF = self.features(heads)
            values, num = precise(v_BHND), _num_keys(k_BHNF, heads)
            products = self._turned(k_BHNF, heads).transpose(2, 3) @ values / num
            mean = mean_of_keys(without_padding(values, heads), heads) if self.normalizer.extra else None
            sums = Sums(products, mean_of_keys(k_BHNF, heads), mean)
            parts = sums.by_signs() if self.feature.opposed else [sums]
            outs = [self._output(q_BHNF, part, heads) for part in parts]
            out = torch.cat(outs, -1) if self.feature.opposed else outs[0]
        return out.to(v_BHND.dtype)

    def local(self, heads: Heads) -> Tensor | None:
        if self.v_conv is None:
            return None
        values = without_padding(heads.values(), heads)
        if isinstance(self.v_conv, DynamicConv):
            mean = mean_of_keys(precise(values), heads).to(values.dtype)
            return self.v_conv(values, mean, heads.tokens())
        return self.v_conv(values, heads.tokens())

    def terms(self, heads: Heads) -> list[Term]:
        if self.feature.opposed:
            return super().terms(heads)
        q, _ = heads.qk()
        with torch.autocast(q.device.type, enabled=False):
            return [LowRank(*self._factors(heads))]

    def features(self, heads: Heads) -> tuple[Tensor, Tensor]:
        """Return φ(q) and φ(k), (B, H, N, F), in float32 or better; φ(k) is weighted, and zero at padding."""
        q, k, v = heads.qkv()
        q, k = precise(q), without_padding(precise(k), heads)
        if self.center:
            k = without_padding(k - mean_of_keys(k, heads), heads)
        if self.q_conv is not None and self.k_conv is not None:
            q = q + self.q_conv(without_padding(q, heads), heads.tokens())
            k = without_padding(k + self.k_conv(k, heads.tokens()), heads)
        q, k = self.feature(heads.with_qkv(q, k, v))
        if self.normalizer.weighs_keys:
            k = k * rank_weights(q, k, heads)
        return q, without_padding(k, heads)

    def macs(self, geometry: Geometry) -> int:
        features = self.feature.num_features(geometry)
        sums = 2 * (features + self.normalizer.extra) * self.shape.head_dim + features
        sums += features * (3 * self.normalizer.weighs_keys + self.feature.opposed + 4 * self.rope)
        a_token = sums + 2 * self.feature.macs_per_token
        convolutions = [conv for conv in (self.v_conv, self.q_conv, self.k_conv) if conv is not None]
        local = sum(conv.macs(geometry) for conv in convolutions)
        return geometry.num_tokens * a_token * self.shape.num_heads + local

    @torch.no_grad()
    def calibrate(self, heads: Heads, target_BHND: Tensor) -> None:
        """Choose for each head the feature map's candidate temperature with the smallest output error."""
        candidates = self.feature.candidates
        if not candidates:
            return
        start = copy.deepcopy(self.feature.state_dict())
        errors = torch.stack([self._adjusted_error(start, value, heads, target_BHND) for value in candidates])
        chosen_H = target_BHND.new_tensor(candidates, dtype=torch.float32)[errors.argmin(0)]
        self.feature.load_state_dict(start)
        self.feature.adjust(chosen_H[:, None, None])

    def _adjusted_error(
        self, start: dict[str, Tensor], value: float, heads: Heads, target_BHND: Tensor
    ) -> Tensor:
        """Return the squared error of each head's output (H,), with all heads adjusted by one candidate."""
        self.feature.load_state_dict(start)
        self.feature.adjust(torch.full((self.shape.num_heads, 1, 1), value, device=target_BHND.device))
        difference: Tensor = self(heads).float() - target_BHND.float()
        return difference.square().sum((0, 2, 3))

    def _chunks(self, heads: Heads) -> ChunkedFeatures | None:
        """Return the features in chunks, if this operator, these tokens and the compiler can use them."""
        plain = self.q_conv is None and heads.key_mask is None and self.normalizer == NORMALIZERS["sum"]
        if not plain or self.rope or torch.compiler.is_compiling():
            return None
        num_features = self.feature.num_features(heads.geometry or self.shape.geometry)
        return self.feature.chunked(heads) if in_chunks(heads.known, num_features) else None

    @property
    def _num_features(self) -> int:
        return self.feature.num_features(self.shape.geometry)

    def _turned(self, x_BHNF: Tensor, heads: Heads) -> Tensor:
        return rotated(x_BHNF, self.shape.head_dim, heads.tokens()) if self.rope else x_BHNF

    def _output(self, q_BHNF: Tensor, sums: Sums, heads: Heads) -> Tensor:
        """Return A V from φ(q) and the sums of the keys, whose products are of turned keys."""
        if not self.rope:
            return self.normalizer.output(q_BHNF, sums, heads.scale)
        return (self._turned(q_BHNF, heads) @ sums.products) / _totals(q_BHNF, sums).clamp_min(EPSILON)

    def _factors(self, heads: Heads) -> tuple[Tensor, Tensor]:
        """Return the factors L and R / N of the map; R is zero at padding."""
        q_BHNF, k_BHNF = self.features(heads)
        mean_BH1F = mean_of_keys(k_BHNF, heads)
        left, right = self.normalizer.factors(q_BHNF, k_BHNF, mean_BH1F, heads.scale)
        left, right = self._turned(left, heads), self._turned(right, heads)
        return left, without_padding(right, heads) / _num_keys(right, heads)


def without_padding(x_BHND: Tensor, heads: Heads) -> Tensor:
    """Return `x_BHND` with zeros at padding tokens."""
    if heads.key_mask is None:
        return x_BHND
    return x_BHND.masked_fill(~heads.key_mask[:, None, :, None], 0.0)


def mean_of_keys(x_BHND: Tensor, heads: Heads) -> Tensor:
    """Return the mean (B, H, 1, D) over tokens that are not padding; `x_BHND` must be zero at padding."""
    return x_BHND.sum(2, keepdim=True) / _num_keys(x_BHND, heads)


def _num_keys(x_BHND: Tensor, heads: Heads) -> Tensor | int:
    """Return the number of tokens that are not padding, at least 1: (B, 1, 1, 1), or one number for all images."""
    if heads.key_mask is None:
        return x_BHND.shape[2]
    return heads.key_mask.sum(1).clamp_min(1).to(x_BHND.dtype)[:, None, None, None]


def _check(option: str, value: str, table: Collection[str]) -> None:
    if value not in table:
        raise ConfigError(f"plan: {option}={value}; {did_you_mean(str(value), table)}")


def _convolutions(
    shape: LayerShape, local: str, size: int | None
) -> tuple[DepthwiseConv | DynamicConv | None, DepthwiseConv | None, DepthwiseConv | None]:
    """Return the convolutions of values, queries and keys."""
    if local == "none":
        if size is not None:
            raise ConfigError(f"plan: local_size={size} needs local=v, qk or dynamic")
        return None, None, None
    size = LOCAL_SIZES[local] if size is None else size
    if local == "qk":
        return None, DepthwiseConv(shape, size), DepthwiseConv(shape, size)
    return DepthwiseConv(shape, size) if local == "v" else DynamicConv(shape, size), None, None


OPERATORS: dict[str, Callable[..., AttentionOperator]] = {
    "kernel": KernelAttention,
    "linear": partial(KernelAttention, feature="elu", center=True),
    "performer": partial(KernelAttention, feature="favor", center=True),
    "hedgehog": partial(KernelAttention, feature="hedgehog", center=True),
    "t2r": partial(KernelAttention, feature="t2r", center=True),
    "focused": partial(KernelAttention, feature="focused", local="v", center=True),
    "pola": partial(KernelAttention, feature="pola", local="v", center=True),
    "nala": partial(KernelAttention, feature="nala", local="v", center=True),
    "cosformer": partial(KernelAttention, feature="cosine", center=True),
    "inline": partial(
        KernelAttention, feature="identity", normalizer="inline", local="v", local_size=3, center=True
    ),
    "mala": partial(KernelAttention, feature="elu", normalizer="mala", local="v", center=True),
    "rala": partial(KernelAttention, feature="elu", normalizer="rala", local="v", center=True),
}
