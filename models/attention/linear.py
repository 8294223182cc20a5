"""Plain linear attention (Katharopoulos et al. 2020, arXiv 2006.16236)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, did_you_mean
from ..host import QKV, Heads

FEATURES = {"elu": lambda x: F.elu(x) + 1, "relu": F.relu}
EPSILON = 1e-6


class LinearAttention(nn.Module):
    """out_i = φ(q_i)ᵀ S / (φ(q_i)ᵀ z + ε) with S = Σ_j φ(k_j) v_jᵀ and z = Σ_j φ(k_j); eq. 5 of the paper.

    φ is elu(x) + 1 or relu(x). The cost is 2 N D² multiply-adds a head, linear in the tokens N. The sums are
    taken as means, so that float16 does not overflow; ε is therefore per token.

    Raises ConfigError: `feature` is none of `FEATURES`.
    """

    needs = QKV
    takes_bias = False

    def __init__(self, feature: Literal["elu", "relu"] = "elu") -> None:
        super().__init__()
        if feature not in FEATURES:
            raise ConfigError(f"linear(feature={feature}): {did_you_mean(str(feature), FEATURES)}")
        self.feature = feature

    def forward(self, heads: Heads) -> Tensor:
        """(B, H, N, D) from q, k and v."""
        assert heads.q is not None
        assert heads.k is not None
        assert heads.v is not None
        phi = FEATURES[self.feature]
        q_BHND, k_BHND = phi(heads.q), phi(heads.k)
        mean_k_BH1D = k_BHND.mean(dim=2, keepdim=True)
        root = heads.v.shape[2] ** -0.5
        summary_BHDD = (k_BHND * root).transpose(2, 3) @ (heads.v * root)
        norm_BHN1 = (q_BHND * mean_k_BH1D).sum(dim=3, keepdim=True) + EPSILON
        return torch.matmul(q_BHND, summary_BHDD) / norm_BHN1
