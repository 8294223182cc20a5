"""Hashed attention: queries and keys are codes ±1, so that attention is additions (EcoFormer, arXiv:2209.09004).

Shape suffixes: B images, H heads, N tokens, D head width, R bits, M anchors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, UnsupportedModelError, did_you_mean
from .base import AttentionOperator, Fit, Geometry, Heads, LayerShape, Projections, Traits
from .hash_fit import PROPOSALS, correlation, learn_bits, objective, similar_pairs
from .hash_start import STARTS
from .kernels import precise
from .operations import Accounting, Operations
from .terms import LowRank, Sparse, Term

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
        for name, count in (("bits", bits), ("anchors", anchors)):
            if type(count) is not int or count < 1:
                raise ConfigError(f"plan: {name}={count}; write a whole number, 1 or more")
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
