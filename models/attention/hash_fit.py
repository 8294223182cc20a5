"""Learn hash functions whose codes are alike for similar tokens and unlike for dissimilar ones.

Supervised hashing with kernels (Liu et al., CVPR 2012), as EcoFormer applies it to attention (arXiv:2209.09004): the
codes Z (N, R) of one image and head minimize ‖R S − Z Zᵀ‖², where row i of S (N, N) is 1 for the tokens most similar to
token i, −1 for the least similar ones and 0 elsewhere. The bits are learned one after another, and each is
y = sign(K a) of the kernel features K (N, M). Neither S nor Z Zᵀ is formed.

Shape suffixes: B images, H heads, N tokens, R bits, M anchors, P pairs of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SIMILAR = 10
"""The number of most similar tokens in a row of S, and that of least similar ones."""
RATE, MOMENTUM, STEPS = 5e-4, 0.9, 100
"""Of the published gradient descent."""
ROWS = 2**22
"""The number of similarities that are in memory at once."""
ROUNDING = 1e-13
"""The square of the rounding error of a kernel, about the least power that means anything."""
SPREAD = 0.5
"""The root mean square of y before the sign, for bits found by eigenvectors: gradients pass where |y| < 1."""

Propose = Callable[["Bits", Tensor], Tensor]
"""Return a better hash function (H, M) for the next bit, given the present one."""


@dataclass
class Bits:
    """The bits that are learned so far, and what the next one is measured by."""

    features: Tensor
    """K, (B, H, N, M)."""
    index: Tensor
    """The tokens of each row of S, (B, H, N, P)."""
    sign: Tensor
    """Their entries, of the same shape."""
    num_bits: int
    known: list[Tensor] = field(default_factory=list)

    def related(self, x_BHN: Tensor) -> Tensor:
        """Return S x (B, H, N)."""
        chosen = x_BHN.gather(2, self.index.flatten(2)).unflatten(2, self.index.shape[2:])
        related: Tensor = (chosen * self.sign).sum(-1)
        return related

    def loss(self, y_BHN: Tensor) -> Tensor:
        """Return −yᵀ (R S − Σ z zᵀ) y / (R N) of the bits z that are known, (B, H)."""
        gain = self.num_bits * (y_BHN * self.related(y_BHN)).sum(-1)
        for z_BHN in self.known:
            gain = gain - (y_BHN * z_BHN).sum(-1).square()
        return -gain / (self.num_bits * y_BHN.shape[2])

    def code(self, weight_HM: Tensor) -> Tensor:
        """Return the bit ±1 (B, H, N) of a hash function."""
        return torch.where(self.project(weight_HM) > 0, 1.0, -1.0)

    def project(self, weight_HM: Tensor) -> Tensor:
        return (self.features @ weight_HM[None, :, :, None]).squeeze(-1)


def similar_pairs(u_BHND: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each token the `SIMILAR` most and least similar tokens and their entry of S, both (B, H, N, P).

    `u_BHND` has rows of length 1. Of few tokens one may be among both: then it counts as dissimilar.
    """
    tokens = u_BHND.shape[2]
    count = min(SIMILAR, tokens)
    chunk = max(1, ROWS // max(1, u_BHND[:, :, :, 0].numel()))
    found = []
    for rows in u_BHND.split(chunk, 2):
        similarity = rows @ u_BHND.transpose(2, 3)
        found.append([similarity.topk(count, -1, largest).indices for largest in (True, False)])
    most, least = (torch.cat(parts, 2) for parts in zip(*found, strict=True))
    in_both = (most[..., :, None] == least[..., None, :]).any(-1)
    sign = torch.cat([(~in_both).to(u_BHND), -torch.ones_like(least, dtype=u_BHND.dtype)], -1)
    return torch.cat([most, least], -1), sign


def learn_bits(
    features_BHNM: Tensor, pairs: tuple[Tensor, Tensor], start_HRM: Tensor, propose: Propose, *, by_head: bool
) -> tuple[Tensor, Tensor]:
    """Return hash functions (H, R, M) that start from `start_HRM`, and which of them are new, (R, H).

    A proposed function is accepted if it lowers the loss of its bit: for each head with `by_head`, else for all heads
    or none, by their mean loss.
    """
    bits = Bits(features_BHNM, *pairs, num_bits=start_HRM.shape[1])
    learned, accepted = start_HRM.clone(), []
    for number in range(bits.num_bits):
        old = start_HRM[:, number]
        new = propose(bits, old).detach()
        gain_BH = bits.loss(bits.code(old)) - bits.loss(bits.code(new))
        gain_H = gain_BH.mean(0) if by_head else gain_BH.mean().expand(len(old))
        better_H = gain_H > 0
        learned[:, number] = torch.where(better_H[:, None], new, old)
        bits.known.append(bits.code(learned[:, number]))
        accepted.append(better_H)
    return learned, torch.stack(accepted)


def by_gradient(bits: Bits, weight_HM: Tensor) -> Tensor:
    """Take `STEPS` steps of gradient descent from `weight_HM` on the loss of tanh(K a / 2), as published."""
    with torch.enable_grad():
        weight = weight_HM.clone().requires_grad_()
        optimizer = torch.optim.SGD([weight], lr=RATE, momentum=MOMENTUM, nesterov=True)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss: Any = bits.loss(torch.tanh(bits.project(weight) / 2)).mean()
            loss.backward()
            optimizer.step()
    return weight.detach()


def by_eigenvector(bits: Bits, weight_HM: Tensor) -> Tensor:
    """Return the a that maximizes aᵀ Kᵀ (R S − Σ z zᵀ) K a for a given length of K a, over all images of a head.

    This is the spectral relaxation of the loss; it needs the M x M matrices Kᵀ S K and Kᵀ K alone.
    """
    features = bits.features.double()
    each = [bits.related(features[..., anchor]) for anchor in range(features.shape[-1])]
    gain_BHMM = bits.num_bits * features.transpose(2, 3) @ torch.stack(each, -1)
    for z_BHN in bits.known:
        known = features.transpose(2, 3) @ z_BHN[..., None].double()
        gain_BHMM = gain_BHMM - known @ known.transpose(2, 3)
    gain, power = gain_BHMM.sum(0), (features.transpose(2, 3) @ features).mean(0) / features.shape[2]
    values, vectors = torch.linalg.eigh(power)
    whiten = vectors * values.clamp_min(1e-9 * float(values.max()) + ROUNDING).rsqrt()[:, None, :]
    inner = whiten.transpose(1, 2) @ ((gain + gain.transpose(1, 2)) / 2) @ whiten
    best = (whiten @ torch.linalg.eigh(inner).eigenvectors[..., -1:]).squeeze(-1)
    sign = torch.where((best * weight_HM).sum(-1, keepdim=True) < 0, -1.0, 1.0)  # eigenvectors have no sign
    found: Tensor = (SPREAD * sign * best).to(weight_HM)
    return found


PROPOSALS: dict[str, Propose] = {"eigen": by_eigenvector, "published": by_gradient}
"""How the next bit is proposed, by the name of the fitting."""


def objective(codes_BHNR: Tensor, pairs: tuple[Tensor, Tensor]) -> float:
    """Return ‖R S − Z Zᵀ‖² / ‖R S‖², averaged over images and heads; 0 is a perfect fit."""
    bits = Bits(codes_BHNR, *pairs, num_bits=codes_BHNR.shape[-1])
    agreed = torch.stack([(z * bits.related(z)).sum(-1) for z in codes_BHNR.unbind(-1)]).sum(0)
    target = bits.num_bits**2 * bits.sign.abs().sum((2, 3))
    own = (codes_BHNR.transpose(2, 3) @ codes_BHNR).square().sum((2, 3))
    return float(((target - 2 * bits.num_bits * agreed + own) / target).mean())


def correlation(u_BHND: Tensor, codes_BHNR: Tensor) -> float:
    """Return the correlation of uᵢ·uⱼ with zᵢ·zⱼ over all pairs of tokens, averaged over images and heads."""
    u, z = u_BHND.double(), codes_BHNR.double()
    pairs = u.shape[2] ** 2

    def products(x: Tensor, y: Tensor) -> Tensor:
        """Return Σᵢⱼ (xᵢ·xⱼ)(yᵢ·yⱼ) = ‖XᵀY‖²."""
        return (x.transpose(2, 3) @ y).square().sum((2, 3))

    mean_u, mean_z = (x.sum(2).square().sum(-1) / pairs for x in (u, z))
    covariance = products(u, z) / pairs - mean_u * mean_z
    variances = (products(x, x) / pairs - mean.square() for x, mean in ((u, mean_u), (z, mean_z)))
    spread = torch.stack(list(variances)).clamp_min(1e-12).prod(0).sqrt()
    return float((covariance / spread).mean())
