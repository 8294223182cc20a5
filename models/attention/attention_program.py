"""Attention programs as an operator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
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


class ProgramAttention(AttentionOperator):
    """The program `code` on the grid tokens, plus a depthwise convolution of the values.

    A program is a formula over Q, K and V, such as `mm(softmax(nt(scale(q) k)) v)` (docs/programs.md); the default is
    linear attention with φ = elu + 1. The search space and the `attnzero_*` programs are those of AttnZero (ECCV 2024).

    Statistics (`zscore`, `minmax`, `cosine`) are of one image: over all heads and grid tokens. Prefix queries attend to
    all tokens by softmax; grid tokens see each other alone. An image with padding gives what it gives without it.

    It is computed in float32 or better. It has a map if it is linear in V and treats all channels of V alike.
    `local_size` is the side of the convolution, which has a bias and starts at zero in a conversion, not in a fresh
    model; 0 means no convolution.

    Raises ConfigError: the program or `local_size` is invalid.
    """

    def __init__(self, shape: LayerShape, code: str = LINEAR, local_size: int = 3) -> None:
        super().__init__(shape)
        if not isinstance(code, str):
            raise ConfigError(
                f"plan: program has code={str(code).lower()}; write a formula, such as {LINEAR}"
            )
        if code in FOUND:
            raise ConfigError(f"plan: {code} is an operator: write '*: {code}' and not program(code={code})")
        self.program = parse_program(code)
        self.conv = local_convolution(shape, local_size, bias=True)
        used = QKV if shape.geometry.num_prefix else (*self.program.inputs, "v")
        self.needs = tuple(part for part in QKV if part in used)

    @property
    def why_no_map(self) -> str:
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
            key_mask=True,
            graph_any_grid=True,
            independent_heads=not self.program.mixes_heads,
        )

    def attend(self, heads: Heads) -> Tensor:
        known = heads.known
        with torch.autocast(known.device.type, enabled=False):
            if heads.values().shape[3] != self.shape.head_dim and not self.why_no_map:
                return with_prefix(heads, self._mapped(heads).to(known.dtype))
            inputs = self._inputs(heads)
            out = (
                self.program(**inputs)
                if heads.key_mask is None
                else self._image_by_image(inputs, heads.key_mask)
            )
        return with_prefix(heads, out.to(known.dtype))

    def terms(self, heads: Heads) -> list[Term]:
        if self.why_no_map:
            return super().terms(heads)
        with torch.autocast(heads.known.device.type, enabled=False):
            grid = [_term(part, heads.tokens()) for part in self._parts(heads)]
        return [prefix_term(heads), *grid] if heads.tokens().num_prefix else grid

    def _inputs(self, heads: Heads) -> dict[str, Tensor]:
        """Return the projections of grid tokens that the program reads."""
        projections = {"q": heads.q, "k": heads.k, "v": heads.v}
        return {
            part: without_prefix(precise(x), heads.tokens())
            for part, x in projections.items()
            if x is not None and part in self.program.inputs
        }

    def _parts(self, heads: Heads) -> list[Part]:
        """Return the parts of the map of grid tokens, with zeros at padding."""
        inputs = self._inputs(heads)
        inputs["v"] = inputs["v"][..., :1].expand(-1, -1, -1, self.shape.head_dim)
        if heads.key_mask is None:
            return self._map(inputs)
        images = []
        for image, seen in enumerate(heads.key_mask[:, heads.tokens().num_prefix :]):
            shown = seen if seen.any() else torch.ones_like(seen)  # no statistics of nothing
            one = {part: x[image : image + 1, :, shown] for part, x in inputs.items()}
            parts = self._map(one) if seen.any() else map(without_values, self._map(one))
            images.append([with_padding(part, shown) for part in parts])
        return [stack(parts) for parts in zip(*images, strict=True)]

    def _map(self, inputs: dict[str, Tensor]) -> list[Part]:
        return map_parts(self.program, inputs.get("q"), inputs.get("k"), inputs["v"])

    def _mapped(self, heads: Heads) -> Tensor:
        """Return the map times values of any width, for the grid tokens."""
        v_BHnD = without_prefix(precise(heads.values()), heads.tokens())
        return torch.stack([apply_part(part, v_BHnD) for part in self._parts(heads)]).sum(0)

    def _image_by_image(self, inputs: dict[str, Tensor], key_mask: Tensor) -> Tensor:
        """Return the outputs of images without their padding, and zeros at padding."""
        like = next(iter(inputs.values()))
        out = torch.zeros_like(like)
        for image, seen in enumerate(key_mask[:, -like.shape[2] :]):
            if not seen.any():  # no statistics of nothing
                continue
            one = {part: x[image : image + 1, :, seen] for part, x in inputs.items()}
            out[image, :, seen] = self.program(**one)[0]
        return out

    def local(self, heads: Heads) -> Tensor | None:
        if self.conv is None:
            return None
        local: Tensor = self.conv(without_padding(heads.values(), heads), heads.tokens())
        return local

    def start_fresh(self) -> None:
        if self.conv is not None:
            self.conv.start_fresh()

    def macs(self, geometry: Geometry) -> int:
        grid = self.program.products.at(geometry.num_patches, self.shape.head_dim)
        prefix = 2 * geometry.num_prefix * geometry.num_tokens * self.shape.head_dim
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
