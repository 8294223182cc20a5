"""PiT: stages of plain blocks with class tokens, and a pooling convolution between them (arXiv:2103.16302)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from timm.layers import Attention, resample_abs_pos_embed_nhwc, trunc_normal_
from timm.models.pit import PoolingVisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..attention.base import Geometry, Heads
from ..host import AttentionHost, GridHost
from ..map_structure import Size
from .site import Family, Hosts, Site, convolved, named_heads, size_of, submodule

PREFIX = ("cls", "dist")
"""The kinds of class tokens, of which a model that was not distilled has the first."""


class PooledHost(GridHost):
    """Softmax over all tokens of a stage, whose grid a plain block does not pass; it never gives a mask either."""

    gets_grid = False
    reduction = ()

    def forward(self, x: Tensor, **no_mask: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x)

    def heads_of(self, x: Tensor, **no_mask: Any) -> Heads:
        return self.project(x)

    def project(self, x: Tensor, size: Size | None = None) -> Heads:  # type: ignore[override]
        assert self.geometry is not None  # the family's `host` sets it
        return super().project(x, self.geometry.grid)


class PiT(Family):
    """timm's `pit_*`. Their positions are of one image size, and are resampled for another."""

    name = "pit (PiT)"
    models = (PoolingVisionTransformer,)
    blocks = (Block,)
    hosts: ClassVar[Hosts] = {Attention: PooledHost}
    resized_when_loaded = True

    def paths(self, model: nn.Module) -> list[list[str]]:
        stages: Any = model.get_submodule("transformers")
        return [
            [f"transformers.{i}.blocks.{j}" for j in range(len(stage.blocks))]
            for i, stage in enumerate(stages)
        ]

    def host(self, model: nn.Module, block: nn.Module) -> AttentionHost:
        found = super().host(model, block)
        found.geometry = next(site.geometry for site in self.sites(model) if site.block(model) is block)
        return found

    def prefix(self, model: nn.Module, site: Site) -> tuple[str, ...]:
        return PREFIX[: site.shape.geometry.num_prefix]

    def classifiers(self, model: nn.Module) -> dict[str, nn.Module]:
        return named_heads(model)

    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        return size_of(self.embedding(model))

    def is_strict(self, model: nn.Module) -> bool:
        return True

    def patch_size(self, model: nn.Module) -> tuple[int, int]:
        return 1, 1

    def channels(self, model: nn.Module) -> int:
        return _embedding(model).in_channels

    def geometries(self, model: Any, size: tuple[int, int]) -> list[Geometry]:
        found, grid = [], convolved(_embedding(model), size)
        for stage in model.transformers:
            grid = grid if stage.pool is None else convolved(stage.pool.conv, grid)
            found.append(Geometry(model.cls_token.shape[1], grid))
        return found

    def resize(self, model: Any, size: tuple[int, int]) -> None:
        """Resample the positions, which are added to the first grid alone."""
        embedding, old = model.patch_embed, model.pos_embed
        grid = self.geometries(model, size)[0].grid
        new = resample_abs_pos_embed_nhwc(old.detach().permute(0, 2, 3, 1), list(grid)).permute(0, 3, 1, 2)
        model.pos_embed = nn.Parameter(new.contiguous(), requires_grad=old.requires_grad)
        embedding.img_size, embedding.grid_size, (embedding.height, embedding.width) = size, grid, grid
        for site in self.sites(model):
            layer = site.layer(model)
            if isinstance(layer, PooledHost) and not layer.permanent:
                layer.geometry = site.geometry

    def initialize(self, model: nn.Module) -> None:
        super().initialize(model)
        for name in ("pos_embed", "cls_token"):
            trunc_normal_(model.get_parameter(name), std=0.02)

    def features(self, model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the patches of the last stage, (B, C, rows, columns), and its class tokens after the final norm.

        timm's `forward_features` gives the class tokens alone, and the norm is only theirs.
        """
        x_BCHW = model.pos_drop(model.patch_embed(images) + model.pos_embed)
        patches, prefix = model.transformers((x_BCHW, model.cls_token.expand(len(x_BCHW), -1, -1)))
        return patches, model.norm(prefix)

    def tokens(self, features: tuple[Tensor, Tensor]) -> Tensor:
        patches_BCHW, prefix_BPC = features
        return torch.cat((prefix_BPC, patches_BCHW.flatten(2).transpose(1, 2)), 1)

    def head(self, model: nn.Module, features: tuple[Tensor, Tensor], *, pre_logits: bool = False) -> Tensor:
        return super().head(model, features[1], pre_logits=pre_logits)

    def last_tokens(self, model: nn.Module) -> nn.Module:
        return submodule(model, "transformers")

    def recomputed(self, model: nn.Module) -> list[nn.Module]:
        return []  # timm has no gradient checkpointing for them


def _embedding(model: Any) -> nn.Conv2d:
    return model.patch_embed.conv


FAMILIES = (PiT(),)
