"""Kernel attention: φ(q)·φ(k) replaces exp(s q·k), so keys and values are summed once for all queries."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import Tensor

from ..errors import ConfigError, did_you_mean
from .base import AttentionOperator, Geometry, Heads, LayerShape, Traits
from .chunked import chunked_attention, in_chunks
from .favor import Favor
from .feature_chunks import ChunkedFeatures
from .features import Cosine, Elu, FeatureMap, Identity, Relu
from .kernels import precise
from .learned_features import T2R, Focused, Hedgehog, JointHedgehog
from .local import DepthwiseConv
from .normalizers import EPSILON, NORMALIZERS, Sums
from .terms import LowRank, Term

FEATURES: dict[str, type[FeatureMap]] = {
    "elu": Elu,
    "relu": Relu,
    "identity": Identity,
    "t2r": T2R,
    "hedgehog": Hedgehog,
    "hedgehog_joint": JointHedgehog,
    "focused": Focused,
    "favor": Favor,
    "cosine": Cosine,
}
LOCAL = ("none", "v", "qk")
LOCAL_SIZES = {"v": 5, "qk": 3}


class KernelAttention(AttentionOperator):
    """A = L Rᵀ / N from features φ(q), φ(k), normalized so that rows sum to one; 2 N F D multiply-adds per head.

    The options combine freely:

    feature:    φ, one of FEATURES; `num_features` sets its width if the map allows it.
    normalizer: how to compute A from φ(q)·φ(k), one of NORMALIZERS.
    local:      "v" adds a depthwise convolution of the values to A V; "qk" adds to queries and keys a convolution of
                themselves before φ. `local_size` is the side of its window (default: 5 for v, 3 for qk).
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
    ) -> None:
        super().__init__(shape)
        _check("feature", feature, FEATURES)
        _check("normalizer", normalizer, NORMALIZERS)
        _check("local", local, LOCAL)
        if not isinstance(center, bool):
            raise ConfigError(f"plan: center={center}; write true or false")
        self.feature = FEATURES[feature](shape, num_features)
        self.normalizer = NORMALIZERS[normalizer]
        if self.normalizer.divides and not self.feature.nonnegative:
            raise ConfigError(
                f"plan: feature={feature} can be negative, and normalizer={normalizer} divides by sums of it; "
                "use normalizer=inline"
            )
        self.center = center
        self.v_conv, self.q_conv, self.k_conv = _convolutions(shape, local, local_size)

    @property
    def traits(self) -> Traits:
        return Traits(
            nonnegative=self.feature.nonnegative and self.normalizer.nonnegative,
            row_stochastic=self.feature.positive or not self.normalizer.divides,
            needs_grid=self.feature.needs_grid or self.v_conv is not None or self.q_conv is not None,
            key_mask=True,
            graph_any_grid=not self.feature.needs_grid,
        )

    def attend(self, heads: Heads) -> Tensor:
        v_BHND = heads.values()
        chunks = self._chunks(heads)
        if chunks is not None:
            return chunked_attention(chunks, *heads.qkv(), center=self.center, least=EPSILON)
        with torch.autocast(v_BHND.device.type, enabled=False):
            q_BHNF, k_BHNF = self.features(heads)
            values, num = precise(v_BHND), _num_keys(k_BHNF, heads)
            products = k_BHNF.transpose(2, 3) @ values / num
            mean = mean_of_keys(without_padding(values, heads), heads) if self.normalizer.extra else None
            sums = Sums(products, mean_of_keys(k_BHNF, heads), mean)
            out = self.normalizer.output(q_BHNF, sums, heads.scale)
        return out.to(v_BHND.dtype)

    def local(self, heads: Heads) -> Tensor | None:
        if self.v_conv is None:
            return None
        local: Tensor = self.v_conv(without_padding(heads.values(), heads), heads.tokens())
        return local

    def terms(self, heads: Heads) -> list[Term]:
        q, _ = heads.qk()
        with torch.autocast(q.device.type, enabled=False):
            return [LowRank(*self._factors(heads))]

    def features(self, heads: Heads) -> tuple[Tensor, Tensor]:
        """Return φ(q) and φ(k), (B, H, N, F), in float32 or better; φ(k) is zero at padding."""
        q, k, v = heads.qkv()
        q, k = precise(q), without_padding(precise(k), heads)
        if self.center:
            k = without_padding(k - mean_of_keys(k, heads), heads)
        if self.q_conv is not None and self.k_conv is not None:
            q = q + self.q_conv(without_padding(q, heads), heads.tokens())
            k = without_padding(k + self.k_conv(k, heads.tokens()), heads)
        q, k = self.feature(heads.with_qkv(q, k, v))
        return q, without_padding(k, heads)

    def macs(self, geometry: Geometry) -> int:
        features = self.feature.num_features(geometry)
        sums = 2 * (features + self.normalizer.extra) * self.shape.head_dim + features
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
        if not plain or torch.compiler.is_compiling():
            return None
        num_features = self.feature.num_features(heads.geometry or self.shape.geometry)
        return self.feature.chunked(heads) if in_chunks(heads.known, num_features) else None

    def _factors(self, heads: Heads) -> tuple[Tensor, Tensor]:
        """Return the factors L and R / N of the map; R is zero at padding."""
        q_BHNF, k_BHNF = self.features(heads)
        mean_BH1F = mean_of_keys(k_BHNF, heads)
        left, right = self.normalizer.factors(q_BHNF, k_BHNF, mean_BH1F, heads.scale)
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


def _convolutions(shape: LayerShape, local: str, size: int | None) -> list[DepthwiseConv | None]:
    """Return the convolutions of values, queries and keys."""
    if local == "none":
        if size is not None:
            raise ConfigError(f"plan: local_size={size} needs local=v or local=qk")
        return [None, None, None]
    wanted = (local == "v", local == "qk", local == "qk")
    return [
        DepthwiseConv(shape, LOCAL_SIZES[local] if size is None else size) if has else None for has in wanted
    ]
