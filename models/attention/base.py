"""Describe what every attention operator takes, returns and declares about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .jacobian import jacobian_rows
from .terms import Term, term_rows

QKV = ("q", "k", "v")


@dataclass(frozen=True)
class Geometry:
    """The tokens of a sequence: prefix tokens (class, distillation, registers), then a grid, row by row."""

    num_prefix: int
    grid: tuple[int, int]

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        return self.num_prefix + self.num_patches


@dataclass(frozen=True)
class LayerShape:
    """What an operator must know of its layer to make its parameters."""

    num_heads: int
    head_dim: int
    geometry: Geometry


@dataclass
class Heads:
    """What an operator works on: q, k and v of shape (B, H, N, D) after norms and rotary embedding.

    A tensor that the operator does not need is None. `bias` (1, H, N, N) or (H, N, N) is a relative position bias.
    `geometry` is there in converted layers. `key_mask` (B, N) is False at tokens that are padding.
    """

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    bias: Tensor | None
    scale: float
    dropout: float = 0.0
    geometry: Geometry | None = None
    key_mask: Tensor | None = None

    @property
    def seen(self) -> Tensor | None:
        """`key_mask` as torch's attention takes it, (B, 1, 1, N)."""
        return None if self.key_mask is None else self.key_mask[:, None, None, :]

    def each(self, change: Callable[[Tensor], Tensor], bias: Tensor | None) -> Heads:
        """The same with every projection changed and another bias."""
        # Not dataclasses.replace, which torch.compile of torch before 2.12 cannot trace.
        q, k, v = (None if x is None else change(x) for x in (self.q, self.k, self.v))
        return Heads(q, k, v, bias, self.scale, self.dropout, self.geometry, self.key_mask)

    def values(self) -> Tensor:
        """The values, for an operator that needs them."""
        assert self.v is not None
        return self.v

    def qk(self) -> tuple[Tensor, Tensor]:
        """Queries and keys, for an operator that needs them."""
        assert self.q is not None
        assert self.k is not None
        return self.q, self.k

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """All three, for an operator that needs them all."""
        return *self.qk(), self.values()

    @property
    def known(self) -> Tensor:
        """One of the projections that are there, for its shape, dtype and device."""
        return next(x for x in (self.v, self.q, self.k) if x is not None)

    def with_qkv(self, q: Tensor, k: Tensor, v: Tensor) -> Heads:
        """The same layer and tokens with other projections."""
        return Heads(q, k, v, self.bias, self.scale, self.dropout, self.geometry, self.key_mask)

    def tokens(self) -> Geometry:
        """The geometry, for an operator that needs the grid; never guessed from the number of tokens."""
        if self.geometry is None:
            raise UnsupportedModelError(
                "this operator needs the token grid: convert the model, or set Heads.geometry"
            )
        return self.geometry


class Operator(Protocol):
    """An attention mechanism: `needs` names the projections it uses; the call returns (B, H, N, D)."""

    @property
    def needs(self) -> Collection[str]: ...

    def __call__(self, heads: Heads) -> Tensor: ...


@dataclass(frozen=True)
class Traits:
    """What holds of an operator's effective map A, where out = A V + local term.

    The tests hold every operator to what it says here.
    """

    linear_in_v: bool = True
    """There is a map at all; if not, `rows` are those of the Jacobian."""
    nonnegative: bool = True
    row_stochastic: bool = True
    """Every row sums to one."""
    linear_cost: bool = True
    """Multiply-adds grow linearly with the number of tokens."""
    needs_grid: bool = False
    resolution: Literal["free", "resampled"] = "free"
    """Whether parameters are tied to the grid, and are resampled for another one."""
    key_mask: bool = False
    """`Heads.key_mask` is honoured."""
    bias: bool = False
    """`Heads.bias` is honoured."""
    dropout: bool = False
    """`Heads.dropout` is honoured."""
    graph_any_grid: bool = False
    """A graph that is exported on one token grid holds for every other. Without this trait it keeps numbers of its
    example's grid, which comparing outputs need not show: near-uniform attention hides them."""


class AttentionOperator(nn.Module, ABC):
    """An operator of a converted layer: `forward` is `attend` plus the local term, if it has one.

    Everything that it holds as a parameter is new, in the sense that the teacher's layer has none of it.
    """

    needs: Collection[str] = QKV
    borrows: bool = False
    """Computes with parameters that are registered in another layer."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.shape = shape

    @property
    @abstractmethod
    def traits(self) -> Traits:
        """What holds of this operator with its options."""

    @abstractmethod
    def attend(self, heads: Heads) -> Tensor:
        """A V of shape (B, H, N, D') for values of any width D', by the cheapest path; no N x N map is formed."""

    def local(self, heads: Heads) -> Tensor | None:
        """What is added to A V, such as a convolution of the values; (B, H, N, D) or None."""
        return None

    def forward(self, heads: Heads) -> Tensor:
        """(B, H, N, D) from the projections of a layer."""
        out, local = self.attend(heads), self.local(heads)
        return out if local is None else out + local

    def terms(self, heads: Heads) -> list[Term]:
        """The terms whose sum is A. An operator that is not linear in V has none, but has `rows`."""
        raise UnsupportedModelError(
            f"{type(self).__name__} is not linear in V: it has no map, only a Jacobian"
        )

    def rows(self, heads: Heads, index: Tensor) -> Tensor:
        """Rows `index` (S,) of A, shape (B, H, S, N): what these tokens take from each token.

        Of an operator that is not linear in V, those of its Jacobian, averaged over channels; no gradient.
        """
        if not self.traits.linear_in_v:
            return jacobian_rows(self, heads, index)
        return torch.stack([term_rows(term, index, heads) for term in self.terms(heads)]).sum(0)

    def matrix(self, heads: Heads) -> Tensor:
        """A itself, (B, H, N, N): for looking at small images, never in a hot path."""
        return self.rows(heads, torch.arange(heads.known.shape[2], device=heads.known.device))

    @abstractmethod
    def macs(self, geometry: Geometry) -> int:
        """Multiply-adds of one image in this layer, projections not counted."""

    def calibrate(self, heads: Heads, target_BHND: Tensor) -> None:
        """Start from a teacher: set new parameters so that this operator's output is near the teacher's.

        `heads` and the teacher's output are those of a calibration batch. Most operators have nothing to set.
        """

    def share(self, first: AttentionOperator) -> None:
        """Take from `first`, of the first layer with the same choice, what all such layers have in common.

        A conversion calls it once, before anything is learned. Most operators have nothing in common.
        """

    def resample(self, geometry: Geometry) -> None:
        """Fit parameters that are tied to the grid to another one."""
        self.shape = LayerShape(self.shape.num_heads, self.shape.head_dim, geometry)
