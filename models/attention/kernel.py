"""Kernel attention: exp(s q·k) replaced by φ(q)·φ(k), so that keys and values are summed once for all queries."""

from __future__ import annotations

from torch import Tensor

from ..errors import ConfigError, did_you_mean
from .base import AttentionOperator, Geometry, Heads, LayerShape, Traits
from .features import FEATURES
from .terms import LowRank, Term

EPSILON = 1e-6


class KernelAttention(AttentionOperator):
    """out_i = φ(q_i)ᵀ S / (φ(q_i)ᵀ z + ε) with S = mean_j φ(k_j) v_jᵀ and z = mean_j φ(k_j).

    Katharopoulos et al. 2020 (arXiv 2006.16236), eq. 5, with means in place of sums, so that float16 does not
    overflow; ε is therefore per token. The cost is 2 N F D multiply-adds a head for F features.

    Raises ConfigError: an option has a value that is not in its table.
    """

    def __init__(self, shape: LayerShape, feature: str = "elu") -> None:
        super().__init__(shape)
        if feature not in FEATURES:
            raise ConfigError(f"plan: feature={feature}; {did_you_mean(str(feature), FEATURES)}")
        self.feature = FEATURES[feature](shape)

    @property
    def traits(self) -> Traits:
        return Traits(nonnegative=self.feature.nonnegative, row_stochastic=self.feature.positive)

    def attend(self, heads: Heads) -> Tensor:
        left_BHNF, right_BHNF = self._factors(heads)
        _, _, v_BHND = heads.qkv()
        root = v_BHND.shape[2] ** -0.5
        summary_BHFD = (right_BHNF * root).transpose(2, 3) @ (v_BHND * root)
        out: Tensor = left_BHNF @ summary_BHFD
        return out

    def terms(self, heads: Heads) -> list[Term]:
        left, right = self._factors(heads)
        return [LowRank(left / right.shape[2], right)]

    def macs(self, geometry: Geometry) -> int:
        features = self.feature.num_features
        a_token = 2 * features * self.shape.head_dim + features + 2 * self.feature.macs_per_token
        return geometry.num_tokens * a_token * self.shape.num_heads

    def _factors(self, heads: Heads) -> tuple[Tensor, Tensor]:
        """φ(q) by its row's normaliser, and φ(k): the map is their product by the number of tokens."""
        q_BHND, k_BHND, _ = heads.qkv()
        q_BHNF, k_BHNF = self.feature(q_BHND, k_BHND, heads.scale)
        norm_BHN1 = (q_BHNF * k_BHNF.mean(dim=2, keepdim=True)).sum(dim=3, keepdim=True) + EPSILON
        return q_BHNF / norm_BHN1, k_BHNF
