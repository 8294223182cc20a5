"""Visformer: stages of convolutions, and attention over images (B, C, H, W) in the later ones (arXiv:2104.12533)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from timm.layers import resample_abs_pos_embed_nhwc, trunc_normal_
from timm.models.visformer import Attention, Block
from timm.models.visformer import Visformer as VisformerModel
from torch import Tensor, nn

from ..attention.base import Geometry, Heads
from ..host import GridHost
from ..map_structure import Size
from .site import Family, Hosts, attention_of, listed, shallow, submodule

STAGES = (1, 2, 3)


class ImageHost(GridHost):
    """Softmax over all places of an image (B, C, H, W), whose q, k, v and output are convolutions of one pixel."""

    shows_tokens = False

    def project(self, x: Tensor, size: Size | None = None) -> Heads:  # type: ignore[override]
        return super().project(x.permute(0, 2, 3, 1))

    def parts(self, x_BNC: Tensor, grid: Size) -> dict[str, Tensor]:
        image = x_BNC.transpose(1, 2).unflatten(2, grid)
        projected = self._child("qkv", image).flatten(2).transpose(1, 2)
        return dict(zip(self.kept, projected.chunk(len(self.kept), -1), strict=True))

    def merge(self, out_BHND: Tensor, x: Tensor) -> Tensor:
        image = out_BHND.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:])
        return self._child("proj_drop", self._child("proj", image))


class Visformer(Family):
    """timm's `visformer_*`. Blocks without attention are no sites, and stay as they are."""

    name = "visformer (Visformer)"
    models = (VisformerModel,)
    blocks = (Block,)
    hosts: ClassVar[Hosts] = {Attention: ImageHost}
    resized_when_loaded = True
    rerun = tuple(f"stage{number}" for number in STAGES)

    def paths(self, model: nn.Module) -> list[list[str]]:
        stages = {f"stage{number}": submodule(model, f"stage{number}") for number in STAGES}
        return [
            [f"{name}.{place}" for place, block in stage.named_children() if attention_of(block) is not None]
            for name, stage in stages.items()
        ]

    def image_size(self, model: Any) -> tuple[int, int]:
        height, width = model.img_size
        return int(height), int(width)

    known_size = fixed_size = image_size

    def is_strict(self, model: nn.Module) -> bool:
        return True

    def channels(self, model: Any) -> int:
        return int(model.in_chans)

    def geometries(self, model: nn.Module, size: tuple[int, int]) -> list[Geometry]:
        found, grid = [], _after_stem(model, size)
        for number in STAGES:
            embedding: Any = model._modules.get(f"patch_embed{number}")
            if embedding is not None:
                grid = grid[0] // embedding.patch_size[0], grid[1] // embedding.patch_size[1]
            found.append(Geometry(0, grid))
        return found

    def resize(self, model: Any, size: tuple[int, int]) -> None:
        """Resample the positions of each stage.

        Raises ValueError: a side is odd, and the stem, a convolution of stride 2, would give half a pixel more.
        """
        if model._modules.get("stem") is not None and any(side % 2 for side in size):
            raise ValueError("the sides have to be even")
        grid = _after_stem(model, size)
        for number, after in zip(STAGES, self.geometries(model, size), strict=True):
            embedding: Any = model._modules.get(f"patch_embed{number}")
            old = model._parameters.get(f"pos_embed{number}")
            if embedding is not None:
                embedding.set_input_size(img_size=grid)
            if old is not None:
                new = resample_abs_pos_embed_nhwc(old.detach().permute(0, 2, 3, 1), list(after.grid))
                new = new.permute(0, 3, 1, 2).contiguous()
                model._parameters[f"pos_embed{number}"] = nn.Parameter(new, requires_grad=old.requires_grad)
            grid = after.grid
        model.img_size = size

    def initialize(self, model: nn.Module) -> None:
        super().initialize(model)
        for name, positions in model.named_parameters(recurse=False):
            if name.startswith("pos_embed"):
                trunc_normal_(positions, std=0.02)

    def with_blocks(self, model: nn.Module, blocks: Sequence[nn.Module], *, cut: bool) -> nn.Module:
        twin, paths = shallow(model), [path for stage in self.paths(model) for path in stage]
        given = dict(zip(paths, blocks, strict=False))
        last_stage, _, last = list(given)[-1].partition(".")
        ends = cut or len(given) < len(paths)
        for number in STAGES:
            name = f"stage{number}"
            stage = submodule(model, name)
            own = {f"{name}.{place}": block for place, block in stage.named_children()}
            kept = [given.get(path, block) for path, block in own.items()]
            if ends and name > last_stage:
                kept, twin._modules[f"patch_embed{number}"] = [], None
            elif ends and name == last_stage:
                kept = kept[: int(last) + 1]
            twin._modules[name] = listed(stage, kept)
        return twin

    def embedding(self, model: nn.Module) -> nn.Module:
        return submodule(model, "patch_embed1" if model._modules.get("stem") is None else "stem")

    def in_sequence(self, out: Tensor) -> Tensor:
        return out.flatten(2).transpose(1, 2)

    def patches(self, tokens: Tensor, geometry: Geometry) -> Tensor:
        return tokens.permute(0, 2, 3, 1)


def _after_stem(model: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    return size if model._modules.get("stem") is None else (size[0] // 2, size[1] // 2)


FAMILIES = (Visformer(),)
