"""Models of one list of blocks that are not plain: SAM, vision transformers with relative positions, VLM encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from timm.layers import AttentionRope, resample_abs_pos_embed, resample_abs_pos_embed_nhwc
from timm.models.cait import Cait, LayerScaleBlock, TalkingHeadAttn
from timm.models.deepseek_vit import DeepseekVitBlock, DeepseekVitClassifier, DeepseekVitEncoder
from timm.models.eva import EvaBlock
from timm.models.gemma4_vit import (
    Gemma4Attention,
    Gemma4Block,
    Gemma4VitClassifier,
    Gemma4VitEncoder,
    apply_multidimensional_rope,
)
from timm.models.naflexvit import NaFlexVit
from timm.models.qwen3_vit import Qwen3VitClassifier, Qwen3VitEncoder
from timm.models.vision_transformer_relpos import (
    RelPosAttention,
    RelPosBlock,
    ResPostRelPosBlock,
    VisionTransformerRelPos,
)
from timm.models.vision_transformer_sam import Attention, Block, VisionTransformerSAM, get_rel_pos
from torch import Tensor, nn

from ..attention.base import Geometry, Heads
from ..errors import UnsupportedModelError
from ..host import AttentionHost, WindowHost
from ..map_structure import MapStructure, Size, Windows
from ..plan_syntax import KEEP
from .plain import BLOCKS, OneStage, Plain, patch_grid, prefix_kinds
from .site import OF_PLAIN, Blocks, Hosts, Site, size_of

# SAM's image encoder: windows in most blocks, and relative positions along rows and columns (arXiv:2304.02643).


class SamHost(WindowHost):
    """SAM: natively, softmax within windows or of all tokens, with a bias that depends on the query.

    b(i, j) = q_i · (r_h(row of i, row of j) + r_w(column of i, column of j)); tables r of another length are
    interpolated, as timm does (decomposed relative positions, arXiv:2112.01526).
    """

    def __init__(self, original: nn.Module, *more: Any) -> None:
        super().__init__(original, *more)
        if getattr(original, "rope", None) is not None:
            raise UnsupportedModelError(
                f"{type(original).__name__} of SAM with rotary positions is not supported: build it with use_rope=False"
            )

    def windows(self, grid: Size) -> Windows:
        [block] = self._block
        side = vars(block)["window_size"]  # of a block that gets the whole grid, too
        return Windows(grid, (side, side) if side else grid)

    def normed(self, part: str, x_BHND: Tensor | None) -> Tensor | None:
        return None if x_BHND is None else self._child(f"{part}_norm", x_BHND)

    def attended(self, heads: Heads) -> Heads:
        cut = super().attended(heads)
        assert cut.windows is not None
        return cut.each(lambda x: x, self.grid_bias(cut.windows.window, cut.q))

    def grid_bias(self, grid: Size, q_BHND: Tensor | None) -> Tensor | None:
        """Return the bias (B, H, N, N) of queries of a whole grid or of windows."""
        if q_BHND is None or not self.has_bias:
            return None
        tables: Any = self.rel_pos_h, self.rel_pos_w
        rows, columns = (get_rel_pos(side, side, table) for side, table in zip(grid, tables, strict=True))
        q = q_BHND.unflatten(2, grid)
        by_row = torch.einsum("bhrcd,rkd->bhrck", q, rows).unsqueeze(-1)
        by_column = torch.einsum("bhrcd,ckd->bhrck", q, columns).unsqueeze(-2)
        return (by_row + by_column).flatten(4, 5).flatten(2, 3)


class WholeGridBlock(Block):
    """timm's block of SAM whose attention gets the whole grid (B, height, width, C) instead of windows."""

    @property
    def window_size(self) -> int:  # type: ignore[override]
        """No windows; the object's own `window_size` are those that timm gave it."""
        return 0


class Sam(OneStage):
    """timm's `samvit_*`. They take images of any size, and interpolate their positions to it."""

    name = "vision_transformer_sam (SAM)"
    models = (VisionTransformerSAM,)
    blocks = (Block,)
    hosts: ClassVar[Hosts] = {Attention: SamHost}
    whole: ClassVar[Blocks] = {Block: WholeGridBlock}
    cannot: ClassVar[Mapping[str, str]] = dict.fromkeys(OF_PLAIN, "has windows")
    gives_up = ("bias",)
    resized_when_loaded = True
    exported_hosted = True

    def resize(self, model: Any, size: tuple[int, int]) -> None:
        """Resample positions as timm's forward pass does: what the model computes on images of this size stays."""
        model.patch_embed.set_input_size(img_size=size)
        grid = tuple(model.patch_embed.grid_size)
        if model.pos_embed is not None:
            model.pos_embed = _like(resample_abs_pos_embed_nhwc(model.pos_embed, grid), model.pos_embed)
        for block in model.blocks:
            tables = block.attn._parameters if "attn" in block._modules else {}
            for side, name in zip(grid, ("rel_pos_h", "rel_pos_w"), strict=True):
                old = tables.get(name)
                if old is not None and not vars(block)["window_size"]:
                    pairs = get_rel_pos(side, side, old)
                    tables[name] = _like(torch.cat([pairs[0].flip(0), pairs[1:, 0]]), old)

    def with_blocks(self, model: nn.Module, blocks: Sequence[nn.Module], *, cut: bool) -> nn.Module:
        twin = super().with_blocks(model, blocks, cut=cut)
        if cut:
            twin._modules["neck"] = nn.Identity()
        return twin

    def last_tokens(self, model: nn.Module) -> nn.Module:
        return model.get_submodule("neck")

    def patches(self, tokens: Tensor, geometry: Geometry) -> Tensor:
        return tokens.permute(0, 2, 3, 1)


def _like(values: Tensor, old: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(values.detach().clone(), requires_grad=old.requires_grad)


# A relative position bias of each layer, or one for all of them, by a table or computed by an MLP.


class RelPosHost(AttentionHost):
    """timm's layer of `vit_relpos_*` and `vit_srelpos_*`, whose block gives it the bias that all layers share."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x, shared_rel_pos_bias=shared_rel_pos)

    def heads_of(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Heads:
        return self.project(x, None, shared_rel_pos)

    def _bias(self, shared: Tensor | None) -> Tensor | None:
        own: Any = self._modules.get("rel_pos")
        return shared if own is None else own.get_bias()


class PlainLike(OneStage):
    """Models whose layers are those of a plain vision transformer, and whose rest is not; some have an `encoder`."""

    kept = KEEP
    keeps_all = True
    cannot: ClassVar[Mapping[str, str]] = {
        **Plain.cannot,
        **dict.fromkeys(OF_PLAIN, "is no plain vision transformer"),
    }

    def trunk(self, model: nn.Module) -> str:
        return "encoder." if "encoder" in model._modules else ""


class RelPos(PlainLike):
    """timm's `vit_relpos_*` and `vit_srelpos_*`."""

    name = "vision_transformer_relpos (ViT with relative positions)"
    models = (VisionTransformerRelPos,)
    blocks = (RelPosBlock, ResPostRelPosBlock)
    hosts: ClassVar[Hosts] = {RelPosAttention: RelPosHost}
    post_norm = (ResPostRelPosBlock,)
    resized_when_loaded = True

    def has_bias(self, model: nn.Module, site: Site) -> bool:
        return model._modules.get("shared_rel_pos") is not None or super().has_bias(model, site)


# Encoders of vision language models, and their classifiers, whose `encoder` they are. They take images of any size.


class Encoders(PlainLike):
    """timm's `qwen3_vit_*` and `deepseek_vit_*`: rotary positions, and tokens (B, height, width, C) as the features."""

    name = "qwen3_vit and deepseek_vit (encoders of Qwen3-VL and DeepSeek)"
    models = (Qwen3VitEncoder, Qwen3VitClassifier, DeepseekVitEncoder, DeepseekVitClassifier)
    blocks = (EvaBlock, DeepseekVitBlock)
    hosts: ClassVar[Hosts] = {AttentionRope: AttentionHost}

    def takes_any_grid(self, model: nn.Module) -> bool:
        return True

    def resize(self, model: nn.Module, size: tuple[int, int]) -> None:
        """Change the size alone: positions are computed for each batch."""
        embedding: Any = self.embedding(model)
        embedding.set_input_size(img_size=size)

    def last_tokens(self, model: nn.Module) -> nn.Module:
        names = ("encoder", "norm")
        return next((model.get_submodule(name) for name in names if name in model._modules), model)


class AnySizeEncoder(PlainLike):
    """Models that no size is built into: the one that they were told, else that of the published weights."""

    sized_when_built = False

    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        own: Any = getattr(model, "img_size", None)
        described: Any = getattr(model, "default_cfg", None) or {}
        size = own or tuple(described.get("input_size", ())[1:])
        return (int(size[0]), int(size[1])) if size else None

    def known_size(self, model: nn.Module) -> tuple[int, int] | None:
        return size_of(model)

    def fixed_size(self, model: nn.Module) -> tuple[int, int] | None:
        return None

    def channels(self, model: nn.Module) -> int:
        return int(cast(Any, model).in_chans)

    def takes_any_grid(self, model: nn.Module) -> bool:
        return True

    def resize(self, model: nn.Module, size: tuple[int, int]) -> None:
        cast(Any, model).img_size = size


class NaFlex(AnySizeEncoder):
    """timm's `naflexvit_*`. Images of several sizes in a batch come as patches with padding, which is masked."""

    name = "naflexvit (NaFlex ViT)"
    models = (NaFlexVit,)
    blocks = BLOCKS
    hosts = Plain.hosts
    post_norm = Plain.post_norm

    def embedding(self, model: nn.Module) -> nn.Module:
        return model.get_submodule("embeds")

    def prefix(self, model: nn.Module, site: Site) -> tuple[str, ...]:
        return prefix_kinds(self.embedding(model))

    def geometries(self, model: nn.Module, size: tuple[int, int]) -> list[Geometry]:
        embedding = self.embedding(model)
        return [Geometry(len(prefix_kinds(embedding)), patch_grid(embedding, size))]

    def grid_of(self, model: nn.Module, images: Any, patches: Any) -> tuple[int, int] | None:
        grid = patches[1]
        return None if grid is None else (int(grid[0]), int(grid[1]))


class GemmaHost(AttentionHost):
    """Gemma 4: grouped keys, norms of q, k and v, rotary positions as cosines and sines, and no scale."""

    after_heads = ("o_proj", "proj_drop")

    def forward(  # type: ignore[override]
        self, x: Tensor, cosines: Tensor, sines: Tensor, attn_mask: Tensor | None = None
    ) -> Tensor:
        return self.merge(self.attend(self.heads_of(x, cosines, sines, attn_mask)), x)

    def heads_of(self, x: Tensor, cosines: Tensor, sines: Tensor, attn_mask: Tensor | None = None) -> Heads:
        return self._masked(x, torch.stack((cosines, sines)), None, attn_mask)

    def merge(self, out_BHND: Tensor, x: Tensor) -> Tensor:
        return self._child("proj_drop", self._child("o_proj", out_BHND.transpose(1, 2).flatten(2)))

    def _position(self, part: str, x_BHND: Tensor, rope: Tensor | None) -> Tensor:
        x_BHND = self._child(f"{part}_norm", x_BHND)
        if part != "v" and rope is not None:
            x_BHND = apply_multidimensional_rope(x_BHND, rope[0], rope[1], unsqueeze_dim=1)
        return x_BHND if part == "q" else x_BHND.repeat_interleave(self.kv_groups, dim=1)


class Gemma(AnySizeEncoder):
    """timm's `gemma4_vit_*`: the encoder of Gemma 4, and its classifiers."""

    name = "gemma4_vit (encoder of Gemma 4)"
    models = (Gemma4VitEncoder, Gemma4VitClassifier)
    blocks = (Gemma4Block,)
    hosts: ClassVar[Hosts] = {Gemma4Attention: GemmaHost}

    def geometries(self, model: nn.Module, size: tuple[int, int]) -> list[Geometry]:
        height, width = self.patch_size(model)
        return [Geometry(0, (size[0] // height, size[1] // width))]

    def grid_of(self, model: nn.Module, images: Any, patches: Any) -> tuple[int, int] | None:
        if not isinstance(images, Tensor) or images.ndim != 4:
            return None
        height, width = self.patch_size(model)
        return images.shape[2] // height, images.shape[3] // width

    def sizes(self, block: nn.Module) -> tuple[int, int, int]:
        layer: Any = cast(Any, block).attn
        return int(layer.o_proj.linear.out_features), int(layer.num_heads), int(layer.q_norm.weight.numel())

    def last_tokens(self, model: nn.Module) -> nn.Module:
        return model.get_submodule("encoder") if "encoder" in model._modules else model


class TalkingHost(AttentionHost):
    """CaiT: W softmax(L s Q Kᵀ) V, where L and W mix the heads (talking heads, arXiv:2003.02436)."""

    after_heads = ("proj", "proj_drop")

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.merge(self.attend(self.heads_of(x)), x)

    def heads_of(self, x: Tensor) -> Heads:
        heads = self.project(x)
        heads.to_map = None if self.permanent else self._mixed
        return heads

    def structure(self, grid: Size) -> MapStructure:
        return MapStructure(mixed=True)

    def has_whole_map(self, geometry: Geometry) -> bool:
        return False

    def _mixed(self, logits_BHNN: Tensor) -> Tensor:
        mixed = self._child("proj_l", logits_BHNN.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        return self._child("proj_w", mixed.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class CaiT(PlainLike):
    """timm's `cait_*` (arXiv:2103.17239). The class token joins after these blocks, in two with class attention."""

    name = "cait (CaiT)"
    models = (Cait,)
    blocks = (LayerScaleBlock,)
    hosts: ClassVar[Hosts] = {TalkingHeadAttn: TalkingHost}
    resized_when_loaded = True

    def prefix(self, model: nn.Module, site: Site) -> tuple[str, ...]:
        return ()

    def geometries(self, model: nn.Module, size: tuple[int, int]) -> list[Geometry]:
        return [Geometry(0, patch_grid(self.embedding(model), size))]

    def last_geometry(self, model: nn.Module, size: tuple[int, int]) -> Geometry:
        return Geometry(1, super().last_geometry(model, size).grid)

    def resize(self, model: Any, size: tuple[int, int]) -> None:
        old = list(model.patch_embed.grid_size)
        model.patch_embed.set_input_size(img_size=size)
        new = list(model.patch_embed.grid_size)
        model.pos_embed = _like(resample_abs_pos_embed(model.pos_embed, new, old, 0), model.pos_embed)

    def with_blocks(self, model: nn.Module, blocks: Sequence[nn.Module], *, cut: bool) -> nn.Module:
        twin = super().with_blocks(model, blocks, cut=cut)
        if cut:
            twin._modules["blocks_token_only"] = nn.ModuleList()
        return twin


FAMILIES = (Sam(), RelPos(), Encoders(), NaFlex(), Gemma(), CaiT())
