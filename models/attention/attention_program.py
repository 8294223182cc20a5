"""Attention programs as an operator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ..errors import ConfigError, did_you_mean
from ..programs.program import FOUND, LINEAR, parse_program
from ..programs.value_map import (
    Part,
    apply_part,
    map_parts,
    nonnegative_map,
    rows_sum_to_one,
    stack,
    why_no_map,
    with_padding,
    without_values,
)
from .base import (
    QKV,
    AttentionOperator,
    FirstRows,
    Geometry,
    Heads,
    LayerShape,
    LowRank,
    Sparse,
    Term,
    Traits,
    without_prefix,
)
from .kernel import without_padding
from .kernels import precise
from .local import local_convolution
from .softmax import prefix_term, with_prefix

PREFIX = ("softmax", "program")
MOST_SIDE = 64
"""The largest side of a table of positions: a plan may come from an untrusted file."""


class PositionBias(nn.Module):
    """E = up(na) + ha + wa on the grid, and `ac` on the prefix tokens: (1, H, N, D), learned, the same for all images.

    `na` is a small square of `side` that is resampled to the grid (bilinear); `ha` has a row for each row of the grid
    and `wa` one for each column. Source: the bias variants of AttnZero (ECCV 2024), whose side is 7.
    """

    ac_bias: nn.Parameter | None

    def __init__(self, shape: LayerShape, side: int) -> None:
        super().__init__()
        heads, width, (rows, columns) = shape.num_heads, shape.head_dim, shape.geometry.grid
        prefix = shape.geometry.num_prefix
        self.na_bias = nn.Parameter(torch.zeros(heads, width, side, side))
        self.ha_bias = nn.Parameter(torch.zeros(1, heads, rows, 1, width))
        self.wa_bias = nn.Parameter(torch.zeros(1, heads, 1, columns, width))
        self.ac_bias = nn.Parameter(torch.zeros(1, heads, prefix, width)) if prefix else None

    def forward(self, geometry: Geometry) -> Tensor:
        """Return E for the tokens of a geometry, in float32 or better."""
        grid = geometry.grid
        square = F.interpolate(precise(self.na_bias), grid, mode="bilinear", align_corners=False)
        rows, columns = _lengthened(self.ha_bias, 2, grid[0]), _lengthened(self.wa_bias, 3, grid[1])
        grid_1HnD = (square.permute(0, 2, 3, 1) + rows + columns).flatten(2, 3)
        return grid_1HnD if self.ac_bias is None else torch.cat((precise(self.ac_bias), grid_1HnD), 2)

    def start_fresh(self) -> None:
        """Draw the tables from a truncated normal of 0.02."""
        for table in self.parameters():
            trunc_normal_(table, std=0.02)

    @torch.no_grad()
    def resample(self, grid: tuple[int, int]) -> None:
        """Resample the rows and the columns for another grid (linear)."""
        for name, axis, length in (("ha_bias", 2, grid[0]), ("wa_bias", 3, grid[1])):
            old = self.get_parameter(name)
            new = _lengthened(old, axis, length).to(old.dtype)
            setattr(self, name, nn.Parameter(new, requires_grad=old.requires_grad))


def _lengthened(table: Tensor, axis: int, length: int) -> Tensor:
    """Return rows (1, H, h, 1, D), `axis` 2, or columns (1, H, 1, w, D), `axis` 3, for `length` of them."""
    table = precise(table)
    if table.shape[axis] == length:
        return table
    lines_HDh = table.flatten(2, 3)[0].transpose(1, 2)
    resized = F.interpolate(lines_HDh, length, mode="linear", align_corners=False).transpose(1, 2)
    return resized[None].unsqueeze(5 - axis)


class ProgramAttention(AttentionOperator):
    """The program `code` on the grid tokens, plus a depthwise convolution of the values.

    A program is a formula over Q, K and V, such as `mm(softmax(nt(scale(q) k)) v)` (docs/programs.md); the default is
    linear attention with φ = elu + 1. The search space and the `attnzero_*` programs are those of AttnZero (ECCV 2024).

    Statistics (`zscore`, `minmax`, `cosine`) are of one image: over all heads and grid tokens. Prefix queries attend to
    all tokens by softmax; grid tokens see each other alone. With `prefix=program` the program sees all tokens, and
    prefix tokens are like the others. An image with padding gives what it gives without it.

    It is computed in float32 or better. It has a map if it is linear in V and treats all channels of V alike.
    `local_size` is the side of the convolution, which has a bias and starts at zero in a conversion, not in a fresh
    model; 0 means no convolution. `bias` is the side of a learned table of positions (`PositionBias`) that is added to
    the last matrix product with a row for each token; 0 means no table.

    Raises ConfigError: the program or an option is invalid.
    """

    def __init__(
        self,
        shape: LayerShape,
        code: str = LINEAR,
        local_size: int = 3,
        prefix: str = "softmax",
        bias: int = 0,
    ) -> None:
        super().__init__(shape)
        if not isinstance(code, str):
            raise ConfigError(
                f"plan: program has code={str(code).lower()}; write a formula, such as {LINEAR}"
            )
        if code in FOUND:
            raise ConfigError(f"plan: {code} is an operator: write '*: {code}' and not program(code={code})")
        if prefix not in PREFIX:
            raise ConfigError(f"plan: prefix={prefix}; {did_you_mean(str(prefix), PREFIX)}")
        self.program = parse_program(code)
        self.whole = prefix == "program"
        self.conv = local_convolution(shape, local_size, bias=True)
        self.positions = self._positions(shape, bias)
        exact = shape.geometry.num_prefix and not self.whole
        used = QKV if exact else (*self.program.inputs, "v")
        self.needs = tuple(part for part in QKV if part in used)

    def _positions(self, shape: LayerShape, side: int) -> PositionBias | None:
        if not isinstance(side, int) or isinstance(side, bool) or not 0 <= side <= MOST_SIDE:
            raise ConfigError(f"plan: bias={side}; give the side of the table, 0 to {MOST_SIDE}")
        if side and not self.program.last_product:
            raise ConfigError(
                f"plan: bias={side} needs a matrix product with a row for each token, which {self.program.text} "
                "does not have"
            )
        return PositionBias(self._seen_by_program(shape), side) if side else None

    def _seen_by_program(self, shape: LayerShape) -> LayerShape:
        geometry = shape.geometry if self.whole else Geometry(0, shape.geometry.grid)
        return LayerShape(shape.num_heads, shape.head_dim, geometry)

    @property
    def why_no_map(self) -> str:
        if self.positions is not None:
            return "its bias does not depend on the values"
        return why_no_map(self.program)

    @property
    def traits(self) -> Traits:
        mapped = not self.why_no_map
        return Traits(
            linear_in_v=mapped,
            nonnegative=mapped and nonnegative_map(self.program),
            row_stochastic=mapped and rows_sum_to_one(self.program),
            linear_cost=self.program.order <= 1,
            needs_grid=True,
            resolution="free" if self.positions is None else "resampled",
            key_mask=True,
            graph_any_grid=self.positions is None,
            independent_heads=not self.program.mixes_heads,
        )

    def attend(self, heads: Heads) -> Tensor:
        known = heads.known
        with torch.autocast(known.device.type, enabled=False):
            if not self.why_no_map and heads.values().shape[3] != self.shape.head_dim:
                return self._with_prefix(heads, self._mapped(heads).to(known.dtype))
            inputs = self._inputs(heads)
            out = (
                self.program(self._bias(heads), **inputs)
                if heads.key_mask is None
                else self._image_by_image(inputs, heads)
            )
        return self._with_prefix(heads, out.to(known.dtype))

    def _with_prefix(self, heads: Heads, out_BHnD: Tensor) -> Tensor:
        return out_BHnD if self.whole else with_prefix(heads, out_BHnD)

    def terms(self, heads: Heads) -> list[Term]:
        if self.why_no_map:
            return super().terms(heads)
        tokens = self._tokens(heads)
        with torch.autocast(heads.known.device.type, enabled=False):
            grid = [_term(part, tokens) for part in self._parts(heads)]
        return [prefix_term(heads), *grid] if tokens.num_prefix else grid

    def _tokens(self, heads: Heads) -> Geometry:
        """Return the geometry of all tokens, whose prefix tokens are those that the program does not see."""
        geometry = heads.tokens()
        return Geometry(0, (1, geometry.num_tokens)) if self.whole else geometry

    def _bias(self, heads: Heads) -> Tensor | None:
        return None if self.positions is None else self.positions(heads.tokens())

    def _inputs(self, heads: Heads) -> dict[str, Tensor]:
        """Return the projections, of the tokens that the program sees, that it reads."""
        projections = {"q": heads.q, "k": heads.k, "v": heads.v}
        return {
            part: without_prefix(precise(x), self._tokens(heads))
            for part, x in projections.items()
            if x is not None and part in self.program.inputs
        }

    def _parts(self, heads: Heads) -> list[Part]:
        """Return the parts of the map of the tokens that the program sees, with zeros at padding."""
        inputs = self._inputs(heads)
        inputs["v"] = inputs["v"][..., :1].expand(-1, -1, -1, self.shape.head_dim)
        if heads.key_mask is None:
            return self._map(inputs)
        images = []
        for image, seen in enumerate(heads.key_mask[:, self._tokens(heads).num_prefix :]):
            shown = seen if seen.any() else torch.ones_like(seen)  # no statistics of nothing
            one = {part: x[image : image + 1, :, shown] for part, x in inputs.items()}
            parts = self._map(one) if seen.any() else map(without_values, self._map(one))
            images.append([with_padding(part, shown) for part in parts])
        return [stack(parts) for parts in zip(*images, strict=True)]

    def _map(self, inputs: dict[str, Tensor]) -> list[Part]:
        return map_parts(self.program, inputs.get("q"), inputs.get("k"), inputs["v"])

    def _mapped(self, heads: Heads) -> Tensor:
        """Return the map times values of any width, for the tokens that the program sees."""
        v_BHnD = without_prefix(precise(heads.values()), self._tokens(heads))
        return torch.stack([apply_part(part, v_BHnD) for part in self._parts(heads)]).sum(0)

    def _image_by_image(self, inputs: dict[str, Tensor], heads: Heads) -> Tensor:
        """Return the outputs of images without their padding, and zeros at padding."""
        like, bias = next(iter(inputs.values())), self._bias(heads)
        out = torch.zeros_like(like)
        assert heads.key_mask is not None
        for image, seen in enumerate(heads.key_mask[:, -like.shape[2] :]):
            if not seen.any():  # no statistics of nothing
                continue
            one = {part: x[image : image + 1, :, seen] for part, x in inputs.items()}
            out[image, :, seen] = self.program(None if bias is None else bias[:, :, seen], **one)[0]
        return out

    def local(self, heads: Heads) -> Tensor | None:
        if self.conv is None:
            return None
        return self.conv(without_padding(heads.values(), heads), heads.tokens())

    def start_fresh(self) -> None:
        for part in (self.conv, self.positions):
            if part is not None:
                part.start_fresh()

    def resample(self, geometry: Geometry) -> None:
        super().resample(geometry)
        if self.positions is not None:
            self.positions.resample(geometry.grid)

    def macs(self, geometry: Geometry) -> int:
        seen = geometry.num_tokens if self.whole else geometry.num_patches
        grid = self.program.products.at(seen, self.shape.head_dim)
        prefix = 2 * (geometry.num_tokens - seen) * geometry.num_tokens * self.shape.head_dim
        local = 0 if self.conv is None else self.conv.macs(geometry)
        return (grid + prefix) * self.shape.num_heads + local


def _term(part: Part, geometry: Geometry) -> Term:
    """Return a part of the map of grid tokens as a term of all tokens."""
    first = geometry.num_prefix
    left, right = (None if x is None else F.pad(x, (0, 0, first, 0)) for x in (part.left, part.right))
    if right is None:
        assert left is not None
        return Sparse(left, torch.arange(geometry.num_tokens, device=left.device)[:, None])
    return FirstRows(F.pad(right.transpose(2, 3), (0, 0, first, 0))) if left is None else LowRank(left, right)


OPERATORS: dict[str, Callable[..., AttentionOperator]] = {
    "program": ProgramAttention,
    **{name: partial(ProgramAttention, code=code) for name, code in FOUND.items()},
}
