"""The interface of attention operators: their input, their output and their traits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import ConfigError, JsonDict, UnsupportedModelError

if TYPE_CHECKING:
    from ..map_structure import Windows


# Rows of the Jacobian, in place of rows of the map for operators that are not linear in V.


def jacobian_rows(operator: AttentionOperator, heads: Heads, index: Tensor) -> Tensor:
    """Return mean_c ∂o_ic / ∂v_jc for the queries `index` (S,) and all tokens j: (B, H, S, N), without gradient.

    For an operator that is linear in V these are the rows of its map. i and j are tokens of one head. Exact, by S D
    backward passes, each of which serves all images and heads; by S D H passes where heads see each other's values.
    """
    values = heads.values()
    with torch.enable_grad():
        v_BHND = values.detach().requires_grad_()
        inputs = heads.each(Tensor.detach, heads.bias)
        inputs.v = v_BHND
        out_BHND = operator.attend(inputs)
        groups = [slice(None)]
        if not operator.traits.independent_heads:
            groups = [slice(head, head + 1) for head in range(values.shape[1])]
        if not out_BHND.requires_grad:  # the operator does not read the values
            return torch.zeros_like(values[:, :, :1, :1]).expand(-1, -1, len(index), values.shape[2])
        rows = [
            torch.cat([_row(out_BHND[:, group, token], v_BHND, group) for group in groups], 1)
            for token in index.tolist()
        ]
    if not rows:
        return values.new_zeros(*values.shape[:2], 0, values.shape[2])
    return torch.stack(rows, 2)


def _row(out_BHD: Tensor, v_BHND: Tensor, heads: slice) -> Tensor:
    """Return the row of one query in the heads of `out_BHD`, which are `heads` of V: (B, H, N)."""
    width = out_BHD.shape[-1]
    row = torch.zeros_like(v_BHND[:, heads, :, 0])
    for channel in range(width):
        (gradient,) = torch.autograd.grad(
            out_BHD[..., channel].sum(), v_BHND, retain_graph=True, materialize_grads=True, allow_unused=True
        )
        row += gradient[:, heads, :, channel]
    return row / width


# Multiplications and additions, counted apart: what they cost in energy differs by a factor of four.

Accounting = Literal["true", "published"]
"""How operations are counted: as they are, or as EcoFormer's tables count them (`operation_count.py`)."""


@dataclass(frozen=True)
class Operations:
    """Numbers of scalar multiplications and additions."""

    multiplications: int = 0
    additions: int = 0

    def __add__(self, other: Operations) -> Operations:
        return Operations(
            self.multiplications + other.multiplications, self.additions + other.additions
        )  # fmt: skip


# The rows of an attention layer's projections, under one interface for every way in which timm keeps them.


class Projections:
    """Views of the weights (H·D, C) and biases (H·D,) that project queries, keys and values: setting them in place
    sets the layer's. `kept` names those that a conversion left in the layer; fused ones are `equal_parts` in a row."""

    def __init__(self, layer: nn.Module, kept: Collection[str] = "qkv", *, equal_parts: bool = True) -> None:
        self._layer = layer
        self._kept = kept
        self._equal_parts = equal_parts

    def weight(self, part: str) -> Tensor:
        """Return the weight of "q", "k" or "v".

        Raises UnsupportedModelError: the layer does not keep it in a linear layer, or a convolution of one pixel.
        """
        linear, rows = self._find(part)
        return linear.weight.data[rows].flatten(1)

    def bias(self, part: str) -> Tensor | None:
        """Return the bias of "q", "k" or "v"; None without one."""
        own = getattr(self._layer, f"{part}_bias", None)
        if own is not None:
            return torch.as_tensor(own.data)
        linear, rows = self._find(part)
        return None if linear.bias is None else linear.bias.data[rows]

    def _find(self, part: str) -> tuple[nn.Linear | nn.Conv2d, slice]:
        layer: Any = self._layer
        if part not in self._kept:
            raise UnsupportedModelError(
                f"this {type(layer).__name__} has lost the rows of {part} in its conversion: run `graftvit convert` on "
                "the original model, and start from the folder that it writes"
            )
        for name, parts in (("qkv", "qkv"), ("kv", "kv"), ("q", "q"), (f"{part}_proj", part)):
            linear = layer._modules.get(name)
            pixelwise = isinstance(linear, nn.Conv2d) and linear.kernel_size == (1, 1)
            equal = self._equal_parts or len(parts) == 1
            if part in parts and equal and (isinstance(linear, nn.Linear) or pixelwise):
                width, place = len(linear.weight) // len(parts), parts.index(part)
                return linear, slice(place * width, (place + 1) * width)
        raise UnsupportedModelError(
            f"{type(layer).__name__} has no linear layer that projects its {part}: take start=q for the operator hash"
        )


# The terms of effective maps: A = Σ terms, none of them N x N.


@dataclass
class LowRank:
    """L Rᵀ, with `left` (B, H, N, r) and `right` (B, H, N, r)."""

    left: Tensor
    right: Tensor


@dataclass
class Sparse:
    """Row i has `weights` (B, H, N, S) at the columns `index`, (N, S), or (B, H, N, S) where images and heads differ.

    A column may repeat; with `unique` it does so only with a weight of zero.
    """

    weights: Tensor
    index: Tensor
    unique: bool = False

    def columns(self) -> Tensor:
        """Return `index` of each image and head, (B, H, N, S)."""
        return self.index.expand_as(self.weights)

    def pick(self, x_BHND: Tensor) -> Tensor:
        """Return the tokens at the columns of each row, (B, H, N, S, D)."""
        if self.index.dim() == 2:
            return x_BHND[:, :, self.index]
        flat = self.index.flatten(2)[..., None].expand(-1, -1, -1, x_BHND.shape[3])
        picked = x_BHND.expand(*self.index.shape[:2], -1, -1).gather(2, flat)
        return picked.unflatten(2, self.index.shape[2:])


@dataclass
class FirstRows:
    """The first P rows, dense, (B, H, P, N): prefix tokens that attend exactly."""

    weights: Tensor


Term: TypeAlias = LowRank | Sparse | FirstRows


def term_rows(term: Term, index: Tensor, heads: Heads) -> Tensor:
    """Return rows `index` (S,) of a term, (B, H, S, N)."""
    if isinstance(term, LowRank):
        return term.left[:, :, index] @ term.right.transpose(2, 3)
    weights = term.weights
    batch, num_heads, tokens = *weights.shape[:2], heads.known.shape[2]
    rows = weights.new_zeros(batch, num_heads, len(index), tokens)
    if isinstance(term, Sparse):
        return rows.scatter_add(3, term.columns()[:, :, index], weights[:, :, index])
    rows[:, :, index < weights.shape[2]] = weights[:, :, index[index < weights.shape[2]]]
    return rows


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


def without_prefix(x_BHND: Tensor, geometry: Geometry) -> Tensor:
    """Return the grid tokens (B, H, n, D): `x_BHND` itself without prefix tokens, as a slice costs a backward pass."""
    return x_BHND[:, :, geometry.num_prefix :] if geometry.num_prefix else x_BHND


@dataclass(frozen=True)
class LayerShape:
    """The sizes from which an operator creates its parameters."""

    num_heads: int
    head_dim: int
    geometry: Geometry
    width: int | None = None
    """The channels of the layer's input; None for as many as all heads have."""


@dataclass
class Heads:
    """The input of an operator: q, k and v of shape (B, H, N, D) after norms and rotary embedding.

    A tensor that the operator does not need is None. `bias` (1, H, N, N) or (H, N, N) is a relative position bias.
    Converted layers set `geometry`. `key_mask` (B, N) is False at padding tokens. With `windows` the tokens are those
    of each window, (B·W, H, M, D), and `bias` is (1 or B·W, H, M, M).
    """

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    bias: Tensor | None
    scale: float
    dropout: float = 0.0
    geometry: Geometry | None = None
    key_mask: Tensor | None = None
    windows: Windows | None = None
    to_map: Callable[[Tensor], Tensor] | None = None
    """The map (B, H, N, N) of logits, where it is not their softmax: in a native host alone."""

    @property
    def seen(self) -> Tensor | None:
        """Return `key_mask` in the shape of torch's attention, (B, 1, 1, N)."""
        return None if self.key_mask is None else self.key_mask[:, None, None, :]

    def each(self, change: Callable[[Tensor], Tensor], bias: Tensor | None) -> Heads:
        """Return a copy with every projection changed and another bias."""
        # Not dataclasses.replace, which torch.compile of torch before 2.12 cannot trace.
        q, k, v = (None if x is None else change(x) for x in (self.q, self.k, self.v))
        return Heads(q, k, v, bias, self.scale, self.dropout, self.geometry, self.key_mask, self.windows)

    def joined(self, x: Tensor) -> Tensor:
        """Return a tensor like a projection by token of the grid, (B, H, N, D), where it is by window."""
        return x if self.windows is None else self.windows.join(x)

    def values(self) -> Tensor:
        """Return v, for an operator that needs it."""
        assert self.v is not None
        return self.v

    def qk(self) -> tuple[Tensor, Tensor]:
        """Return q and k, for an operator that needs both."""
        assert self.q is not None
        assert self.k is not None
        return self.q, self.k

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v, for an operator that needs all three."""
        return *self.qk(), self.values()

    @property
    def known(self) -> Tensor:
        """Return any projection that is not None, to read its shape, dtype and device."""
        return next(x for x in (self.v, self.q, self.k) if x is not None)

    def with_qkv(self, q: Tensor, k: Tensor, v: Tensor) -> Heads:
        """Return a copy with other projections."""
        return Heads(q, k, v, self.bias, self.scale, self.dropout, self.geometry, self.key_mask, self.windows)

    def with_values(self, v: Tensor) -> Heads:
        """Return a copy with other values, whichever of q and k there are."""
        return Heads(
            self.q, self.k, v, self.bias, self.scale, self.dropout, self.geometry, self.key_mask, self.windows
        )

    def tokens(self) -> Geometry:
        """Return the geometry, which is never guessed from the number of tokens.

        Raises UnsupportedModelError: it is not set.
        """
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
    """The properties of an operator and its effective map A, where out = A V + local term. Tests check them all."""

    linear_in_v: bool = True
    """The operator has a map. If not, `rows` returns rows of the Jacobian."""
    nonnegative: bool = True
    row_stochastic: bool = True
    """Every row sums to one."""
    linear_cost: bool = True
    """Multiply-adds grow linearly with the number of tokens."""
    needs_grid: bool = False
    resolution: Literal["free", "resampled"] = "free"
    """"resampled": some parameters are tied to the grid, and are resampled for another one."""
    key_mask: bool = False
    """The operator applies `Heads.key_mask`."""
    bias: bool = False
    """The operator applies `Heads.bias`."""
    dropout: bool = False
    """The operator applies `Heads.dropout`."""
    independent_heads: bool = True
    """No head depends on the projections of another head."""
    graph_any_grid: bool = False
    """A graph exported on one token grid is correct on every other grid. Without this trait the graph contains
    constants of its example's grid; a comparison of outputs may miss them where attention is nearly uniform."""


@dataclass(frozen=True)
class Fit:
    """What fitting an operator changed: its measures by name, before and after."""

    measures: Mapping[str, tuple[float, float]]

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {before:.3f} -> {after:.3f}" for name, (before, after) in self.measures.items()
        )


MOST_STEPS = 100
"""The largest number of steps of an iteration: a plan may come from an untrusted file."""


def check_whole(option: str, value: object) -> None:
    """Raise ConfigError unless `value` is a whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"plan: {option}={value}; give a whole number, 1 or more")


def check_steps(option: str, value: object) -> None:
    """Raise ConfigError unless `value` is a whole number from 1 to MOST_STEPS."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_STEPS:
        raise ConfigError(f"plan: {option}={value}; give a whole number from 1 to {MOST_STEPS}")


class OutputGate(nn.Module):
    """o ⊙ 2 σ(x W) of the heads' output o and the layer's input x, before the projection: gated attention (Qiu et al.
    2025, arXiv 2505.06708, elementwise after the heads) and the output gate of MILA with another activation.

    W starts at zero in a conversion, where the gate is 1; the projection after it absorbs the factor 2.
    """

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        channels = shape.num_heads * shape.head_dim
        self.weight = nn.Parameter(torch.zeros(channels, shape.width or channels))

    def forward(self, out_BHND: Tensor, x: Tensor) -> Tensor:
        """Return the gated output for the input (B, N, C) or (B, height, width, C)."""
        x_BNC = x.flatten(1, -2)
        gate = 2 * (x_BNC @ self.weight.to(x.dtype).T).sigmoid()
        by_head: Tensor = gate.unflatten(2, (out_BHND.shape[1], -1)).transpose(1, 2)
        return out_BHND * by_head


class AttentionOperator(nn.Module, ABC):
    """An operator of a converted layer: `forward` is `attend` plus the local term, if it has one.

    All its parameters are new: the teacher's layer has none of them.
    """

    needs: Collection[str] = QKV
    borrows: bool = False
    """The operator computes with parameters that are registered in another layer."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.shape = shape
        self.output_gate: OutputGate | None = None
        """What the layer multiplies the heads' output by, of the plan's option `gate`: it is no part of the map."""

    @property
    @abstractmethod
    def traits(self) -> Traits:
        """Return the traits of this operator with its options."""

    @property
    def sized_options(self) -> JsonDict:
        """Return options whose defaults depend on the image size of the conversion, and that no parameter shows."""
        return {}

    @property
    def why_no_map(self) -> str:
        """Return why this operator with its options has no map, where that depends on the options."""
        return ""

    @abstractmethod
    def attend(self, heads: Heads) -> Tensor:
        """Return A V (B, H, N, D') for values of any width D', without forming an N x N map."""

    def local(self, heads: Heads) -> Tensor | None:
        """Return what is added to A V, such as a convolution of the values: (B, H, N, D) or None."""
        return None

    def forward(self, heads: Heads) -> Tensor:
        """Return the output (B, H, N, D) from the projections of a layer."""
        out, local = self.attend(heads), self.local(heads)
        return out if local is None else out + local

    def terms(self, heads: Heads) -> list[Term]:
        """Return the terms whose sum is A.

        Raises UnsupportedModelError: the operator is not linear in V, and still has `rows`; or it defines no terms.
        """
        if self.traits.linear_in_v:
            raise UnsupportedModelError(
                f"{type(self).__name__} has no method `terms`, which gives its map: define it"
            )
        why = f" ({self.why_no_map})" if self.why_no_map else ""
        raise UnsupportedModelError(
            f"{type(self).__name__} is not linear in V: it has no map, only a Jacobian{why}"
        )

    def rows(self, heads: Heads, index: Tensor) -> Tensor:
        """Return rows `index` (S,) of A, shape (B, H, S, N).

        If the operator is not linear in V, return rows of its Jacobian, averaged over channels, without gradient.
        """
        if not self.traits.linear_in_v:
            return jacobian_rows(self, heads, index)
        return torch.stack([term_rows(term, index, heads) for term in self.terms(heads)]).sum(0)

    def matrix(self, heads: Heads) -> Tensor:
        """Return A itself, (B, H, N, N). Only for small images: it forms the whole map."""
        return self.rows(heads, torch.arange(heads.known.shape[2], device=heads.known.device))

    @abstractmethod
    def macs(self, geometry: Geometry) -> int:
        """Return the multiply-adds of one image in this layer, without the projections."""

    def operations(self, geometry: Geometry, accounting: Accounting = "true") -> Operations:
        """Return the multiplications and additions of one image in this layer, without the projections.

        Most operators have as many of one as of the other.
        """
        products = self.macs(geometry)
        return Operations(products, products)

    def calibrate(self, heads: Heads, target_BHND: Tensor) -> None:
        """Set parameters so that the output for `heads` is near the teacher's, `target_BHND`, on a calibration batch.

        Most operators have nothing to set.
        """

    def start_fresh(self) -> None:
        """Initialize parameters for a model whose other weights are fresh too.

        Most operators start as they do in a conversion of a pretrained model.
        """

    not_fitted: ClassVar[str] = ""
    """What an operator says that must be fitted and is not; empty for one that needs no fit."""

    @property
    def fitted(self) -> bool:
        """Whether the operator can run; one that must be fitted refuses to run before `fit`."""
        return True

    def adopt(self, projections: Projections) -> None:
        """Change the layer's projections in place, at its conversion. Most operators take them as they are."""

    def fit(self, samples: Sequence[Heads], *, seed: int) -> Fit | None:
        """Learn what task gradients do not reach from batches of the layer's input; the seed decides every draw.

        Without samples, make the operator ready to run without any meaning, for measurements of speed. Most operators
        have nothing to fit and return None.
        """
        return None

    def share(self, first: AttentionOperator) -> None:
        """Share parameters with `first`, the operator of the first layer with the same options.

        A conversion calls it once, before training. Most operators share nothing.
        """

    def resample(self, geometry: Geometry) -> None:
        """Resample the parameters that are tied to the grid for another grid."""
        self.shape = replace(self.shape, geometry=geometry)
