"""Attention programs as an operator."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from ..programs.found import FOUND, LINEAR
from ..programs.program_text import parse_program
from .base import QKV, AttentionOperator, Geometry, Heads, LayerShape, Traits, without_prefix
from .kernel import without_padding
from .kernels import precise
from .local import local_convolution
from .prefix import with_prefix


class ProgramAttention(AttentionOperator):
    """The program `code` on the grid tokens, plus a depthwise convolution of the values.

    A program is a formula over Q, K and V, such as `mm(softmax(nt(scale(q) k)) v)` (docs/programs.md); the default is
    linear attention with φ = elu + 1. The search space and the `attnzero_*` programs are those of AttnZero (ECCV 2024).

    Statistics (`zscore`, `minmax`, `cosine`) are of one image: over all heads and grid tokens. Prefix queries attend to
    all tokens by softmax; grid tokens see each other alone. An image with padding gives what it gives without it.

    It is computed in float32 or better and is treated as not linear in V. `local_size` is the side of the convolution,
    which has a bias and starts at zero in a conversion, not in a fresh model; 0 means no convolution.

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
    def traits(self) -> Traits:
        return Traits(
            linear_in_v=False,
            nonnegative=False,
            row_stochastic=False,
            linear_cost=self.program.order <= 1,
            needs_grid=True,
            key_mask=True,
            graph_any_grid=True,
            independent_heads=not self.program.mixes_heads,
        )

    def attend(self, heads: Heads) -> Tensor:
        geometry, known = heads.tokens(), heads.known
        projections = {"q": heads.q, "k": heads.k, "v": heads.v}
        with torch.autocast(known.device.type, enabled=False):
            inputs = {
                part: without_prefix(precise(x), geometry)
                for part, x in projections.items()
                if x is not None and part in self.program.inputs
            }
            out = (
                self.program(**inputs)
                if heads.key_mask is None
                else self._image_by_image(inputs, heads.key_mask)
            )
        return with_prefix(heads, out.to(known.dtype))

    def _image_by_image(self, inputs: dict[str, Tensor], key_mask: Tensor) -> Tensor:
        """Return the outputs of images without their padding, and zeros at padding."""
        like = next(iter(inputs.values()))
        out = torch.zeros_like(like)
        for image, seen in enumerate(key_mask[:, -like.shape[2] :]):
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
