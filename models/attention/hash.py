"""Hashed attention: queries and keys are codes ±1, so that attention is additions (EcoFormer, arXiv:2209.09004).

Shape suffixes: B images, H heads, N tokens, D head width, R bits, M anchors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, UnsupportedModelError, did_you_mean
from .base import (
    Accounting,
    AttentionOperator,
    Fit,
    Geometry,
    Heads,
    LayerShape,
    LowRank,
    Operations,
    Projections,
    Sparse,
    Term,
    Traits,
    check_whole,
)
from .kernels import precise

# Learn hash functions whose codes are alike for similar tokens and unlike for dissimilar ones.
#
# Supervised hashing with kernels (Liu et al., CVPR 2012), as EcoFormer applies it to attention
# (arXiv:2209.09004): the codes Z (N, R) of one image and head minimize ‖R S − Z Zᵀ‖², where row i of S (N, N)
# is 1 for the tokens most similar to token i, −1 for the least similar ones and 0 elsewhere. The bits are
# learned one after another, and each is y = sign(K a) of the kernel features K (N, M). Neither S nor Z Zᵀ is
# formed.
#
# Shape suffixes: B images, H heads, N tokens, R bits, M anchors, P pairs of a token.

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
        return (chosen * self.sign).sum(-1)

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
    return (SPREAD * sign * best).to(weight_HM)


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


# What the shared projection of queries and keys starts from, when hashed attention replaces a softmax layer.
#
# Each function sets the query rows of a layer in place.


def keep_queries(projections: Projections, num_heads: int) -> None:
    """Keep the query rows, as published."""


def take_keys(projections: Projections, num_heads: int) -> None:
    """Take the key rows."""
    _set(projections, _with_bias(projections, "k"))


def take_mean(projections: Projections, num_heads: int) -> None:
    """Take the mean of query and key rows."""
    query, key = _with_bias(projections, "q"), _with_bias(projections, "k")
    _set(projections, (query + key) / 2)


def take_symmetric(projections: Projections, num_heads: int) -> None:
    """Take the rows W (D, C) of each head whose WᵀW is nearest to the symmetric part of QᵀK.

    The D largest positive eigenvalues of (QᵀK + KᵀQ) / 2 and their vectors give W = Λ^½ Vᵀ. They lie in the span of
    the 2D rows of Q and K, so the matrix that is decomposed is 2D x 2D.
    """
    query, key = (_with_bias(projections, part).double() for part in "qk")
    found = [
        _symmetric_root(q, k)
        for q, k in zip(query.chunk(num_heads), key.chunk(num_heads), strict=True)
    ]  # fmt: skip
    _set(projections, torch.cat(found))


STARTS: dict[str, Callable[[Projections, int], None]] = {
    "q": keep_queries,
    "k": take_keys,
    "mean": take_mean,
    "symmetric": take_symmetric,
}


def _symmetric_root(query_DC: Tensor, key_DC: Tensor) -> Tensor:
    basis, _ = torch.linalg.qr(torch.cat([query_DC, key_DC]).T)
    product = (query_DC @ basis).T @ (key_DC @ basis)
    values, vectors = torch.linalg.eigh((product + product.T) / 2)
    largest = slice(max(0, len(values) - len(query_DC)), None)
    root = values[largest].clamp_min(0).sqrt()[:, None] * (basis @ vectors[:, largest]).T
    return torch.cat([root, root.new_zeros(len(query_DC) - len(root), root.shape[1])])


def _with_bias(projections: Projections, part: str) -> Tensor:
    """Return the weight with the bias as a last column, where the layer has biases."""
    weight, bias = projections.weight(part), projections.bias(part)
    if part == "k" and weight.shape != projections.weight("q").shape:
        raise UnsupportedModelError(
            f"this layer has fewer keys ({len(weight)} rows) than queries: take start=q for the operator hash"
        )
    own = projections.bias("q")
    if own is None:
        return weight
    return torch.cat([weight, (torch.zeros_like(own) if bias is None else bias)[:, None]], 1)


def _set(projections: Projections, rows: Tensor) -> None:
    weight, bias = projections.weight("q"), projections.bias("q")
    weight.copy_(rows[:, : weight.shape[1]])
    if bias is not None:
        bias.copy_(rows[:, -1])


MODES = ("exact", "reference")


class HashAttention(AttentionOperator):
    """A = (Z Zᵀ + c) / row sums, where z = sign(W (k(u) − mean)) ∈ {±1}^R is the code of a token and c = R + 1.

    Queries and keys share one projection, the layer's query rows: u is its unit vector. k(u) are Gaussian kernels
    exp(−‖u − anchor‖² / 2σ²) with M anchors, and σ² is the mean squared distance of the image's tokens to the anchors,
    head by head. c keeps every weight positive. The gradient of the sign passes where |y| < 1 (straight-through).

    `weight`, `anchors` and `mean` are buffers that `fit` sets: no other gradient reaches them.

    bits, anchors: R and M.
    mode:    "exact", or "reference", in which the published code adds c vᵢ instead of c Σⱼ vⱼ to the output of token i
             before it divides; published weights need it.
    fitting: "eigen" proposes each bit by an eigenvector, and accepts it for each head; "published" takes 100 steps of
             gradient descent, has the same anchors in all heads, from the first image, and accepts for all heads.
    start:   the query rows at conversion: "q" keeps them, "k" takes those of keys, "mean" their mean, and "symmetric"
             the rows whose products are nearest to the symmetric part of the layer's q·k.

    Raises ConfigError: an option is invalid.
    """

    needs = ("q", "v")
    weight: Tensor
    anchors: Tensor
    mean: Tensor

    not_fitted = (
        "the hash functions of this model are not fitted: give --calibrate N to `graftvit convert`, "
        "student.calibrate=N to a run, or calibration images to convert()"
    )
    no_direction = (
        "the hash functions cannot be fitted: the layer's queries are all zero or not all finite; check the weights "
        "and the calibration images"
    )

    def __init__(
        self,
        shape: LayerShape,
        bits: int = 16,
        anchors: int = 25,
        mode: str = "exact",
        fitting: str = "eigen",
        start: str = "q",
    ) -> None:
        super().__init__(shape)
        check_whole("bits", bits)
        check_whole("anchors", anchors)
        for name, value, valid in (
            ("mode", mode, MODES),
            ("fitting", fitting, PROPOSALS),
            ("start", start, STARTS),
        ):
            if value not in valid:
                raise ConfigError(f"plan: {name}={value}; {did_you_mean(str(value), valid)}")
        self.mode, self.fitting, self.start = mode, fitting, start
        self.register_buffer("weight", torch.zeros(shape.num_heads, bits, anchors))
        self.register_buffer("anchors", torch.zeros(shape.num_heads, anchors, shape.head_dim))
        self.register_buffer("mean", torch.zeros(shape.num_heads, anchors))
        self._known_fitted = False

    @property
    def traits(self) -> Traits:
        exact = self.mode == "exact"
        return Traits(nonnegative=exact, row_stochastic=exact, graph_any_grid=True)

    @property
    def offset(self) -> int:
        """Return c = R + 1, which keeps zᵢ·zⱼ + c at least 1."""
        return self.weight.shape[1] + 1

    @property
    def fitted(self) -> bool:
        """Whether there are hash functions. Looks at values, which waits for a GPU, until it is true."""
        if not self._known_fitted:
            self._known_fitted = self.anchors.is_meta or bool(self.anchors.any())
        return self._known_fitted

    def _load_from_state_dict(self, *arguments: object) -> None:
        self._known_fitted = False
        super()._load_from_state_dict(*arguments)

    def forward(self, heads: Heads) -> Tensor:
        """Return the output (B, H, N, D). Raises UnsupportedModelError: the hash functions were never fitted."""
        if not torch.compiler.is_compiling() and type(self.anchors) is Tensor and not self.fitted:
            raise UnsupportedModelError(self.not_fitted)
        return self.attend(heads)

    def attend(self, heads: Heads) -> Tensor:
        v_BHND = heads.values()
        with torch.autocast(v_BHND.device.type, enabled=False):
            z_BHNR, values = self.codes(heads), precise(v_BHND)
            tokens = values.shape[2]
            products = z_BHNR.transpose(2, 3) @ values / tokens
            offset = values.mean(2, keepdim=True) if self.mode == "exact" else values / tokens
            out = (z_BHNR @ products + self.offset * offset) / self._row_sums(z_BHNR)
        return out.to(v_BHND.dtype)

    def terms(self, heads: Heads) -> list[Term]:
        with torch.autocast(heads.known.device.type, enabled=False):
            z_BHNR = self.codes(heads)
            sums, tokens = self._row_sums(z_BHNR), z_BHNR.shape[2]
            if self.mode == "exact":
                ones = torch.ones_like(sums)
                right = torch.cat([z_BHNR, self.offset * ones], -1)
                return [LowRank(torch.cat([z_BHNR, ones], -1) / sums, right / tokens)]
            itself = torch.arange(tokens, device=sums.device)[:, None]
            return [LowRank(z_BHNR / sums, z_BHNR / tokens), Sparse(self.offset / (tokens * sums), itself)]

    def codes(self, heads: Heads) -> Tensor:
        """Return the codes ±1 of the tokens, (B, H, N, R), in float32 or better."""
        assert heads.q is not None
        y_BHNR = self._features(_unit(precise(heads.q))) @ precise(self.weight).transpose(1, 2)
        return _sign(y_BHNR)

    def macs(self, geometry: Geometry) -> int:
        bits, anchors = self.weight.shape[1:]
        a_token = anchors * (self.shape.head_dim + bits) + 2 * bits * self.shape.head_dim + bits
        return geometry.num_tokens * a_token * self.shape.num_heads

    def operations(self, geometry: Geometry, accounting: Accounting = "true") -> Operations:
        """Return the operations of one image. Products with codes, zᵢ·zⱼ and zᵢ vⱼ, are additions alone.

        The published count takes squared distances as additions, and leaves out unit vectors and their norms.
        """
        (bits, anchors), width = self.weight.shape[1:], self.shape.head_dim
        if accounting == "published":
            multiplications = 2 * anchors + anchors * bits + bits + 1 + width
            additions = 2 * anchors * width + anchors * bits + 2 * bits + 2 * bits * width + width
        else:
            multiplications = 3 * width + anchors * width + anchors * bits
            additions = 2 * width + anchors * width + anchors * bits + 2 * bits + 2 * bits * width
        tokens = self.shape.num_heads * geometry.num_tokens
        return Operations(tokens * multiplications, tokens * additions)

    def adopt(self, projections: Projections) -> None:
        """Set the query rows, which project queries and keys from now on, by the option `start`."""
        if self.start != "q" and not projections.weight("q").is_meta:
            STARTS[self.start](projections, self.shape.num_heads)

    @torch.no_grad()
    def fit(self, samples: Sequence[Heads], *, seed: int) -> Fit:
        """Learn the hash functions from the tokens of `samples`, which are batches of the layer's input.

        Without samples, draw everything at random: codes of no use, for measurements of speed.

        Raises ConfigError: there are fewer tokens than anchors. UnsupportedModelError: the tokens have no direction.
        """
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(self.weight.shape, generator=generator).to(self.weight)
        if not samples:
            self.anchors.copy_(_unit(torch.randn(self.anchors.shape, generator=generator)))
            self.weight.copy_(start)
            self._known_fitted = False
            return Fit({})
        u_BHND = _unit(precise(torch.cat([heads.q for heads in samples if heads.q is not None])))
        if not (u_BHND.isfinite().all() and u_BHND.any()):
            raise UnsupportedModelError(self.no_direction)
        self.anchors.copy_(self._draw_anchors(u_BHND, generator))
        kernels = _kernels(u_BHND, precise(self.anchors))
        self.mean.copy_(kernels.mean((0, 2)))
        return self.learn(u_BHND, start)

    def learn(self, u_BHND: Tensor, start_HRM: Tensor) -> Fit:
        """Learn `weight` for unit tokens from a start, with the anchors and the mean that are set."""
        features, pairs = self._features(u_BHND), similar_pairs(u_BHND)
        learned, accepted = learn_bits(
            features, pairs, precise(start_HRM), PROPOSALS[self.fitting], by_head=self.fitting != "published"
        )
        self.weight.copy_(learned)
        self._known_fitted = False
        before, after = (_sign(features @ weight.transpose(1, 2)) for weight in (precise(start_HRM), learned))
        return Fit(
            {
                "objective": (objective(before, pairs), objective(after, pairs)),
                "correlation": (correlation(u_BHND, before), correlation(u_BHND, after)),
                "accepted": (0.0, float(accepted.double().mean())),
            }
        )

    def _draw_anchors(self, u_BHND: Tensor, generator: torch.Generator) -> Tensor:
        """Return anchors (H, M, D) drawn from the tokens: from all images, or as published from the first one."""
        count, tokens = self.anchors.shape[1], u_BHND[:1] if self.fitting == "published" else u_BHND
        tokens_HND = tokens.transpose(0, 1).flatten(1, 2)
        if tokens_HND.shape[1] < count:
            raise ConfigError(
                f"plan: anchors={count} of the operator hash are drawn from {tokens_HND.shape[1]} tokens: give more "
                "images to calibrate on, or fewer anchors"
            )
        if self.fitting == "published":
            return tokens_HND[:, torch.randperm(tokens_HND.shape[1], generator=generator)[:count]]
        index = torch.stack(
            [torch.randperm(tokens_HND.shape[1], generator=generator)[:count] for _ in tokens_HND]
        )
        return torch.stack([head[chosen] for head, chosen in zip(tokens_HND, index, strict=True)])

    def _features(self, u_BHND: Tensor) -> Tensor:
        """Return k(u) − mean, (B, H, N, M)."""
        return _kernels(u_BHND, precise(self.anchors)) - precise(self.mean)[:, None]

    def _row_sums(self, z_BHNR: Tensor) -> Tensor:
        """Return Σⱼ (zᵢ·zⱼ + c) / N, (B, H, N, 1)."""
        return z_BHNR @ z_BHNR.mean(2, keepdim=True).transpose(2, 3) + self.offset


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def _kernels(u_BHND: Tensor, anchors_HMD: Tensor) -> Tensor:
    """Return exp(−‖u − anchor‖² / 2σ²), (B, H, N, M)."""
    products = u_BHND @ anchors_HMD.transpose(1, 2)
    distance = 1 + anchors_HMD.square().sum(-1)[:, None] - 2 * products
    mean = distance.mean((2, 3), keepdim=True).clamp_min(
        torch.finfo(distance.dtype).eps
    )  # the rounding error
    return torch.exp(-distance / (2 * mean))


def _sign(y: Tensor) -> Tensor:
    """Return the sign of y exactly, with the gradient of y where |y| < 1."""
    if not torch.is_grad_enabled():
        return y.sign()
    passed = F.hardtanh(y)
    return y.detach().sign() + (passed - passed.detach())


OPERATORS = {"hash": HashAttention}
