"""A site is one block of a model with its place; a family knows where the blocks of its timm models are."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from ..attention.base import Geometry, LayerShape
from ..errors import JsonDict, UnsupportedModelError
from ..token_merging import TokenMerging

# The attributes of timm's models that we read, as types, because `nn.Module` does not declare them.


class Block(nn.Module):
    """The attributes of timm's transformer blocks that we read."""

    attn: Any
    """timm's attention layer, or the host that replaces it."""
    mlp: Any
    norm1: nn.Module


class ViT(nn.Module):
    """The attributes of timm's vision transformers that we read: a type like `Block`, never instantiated."""

    patch_embed: Any
    pos_embed: nn.Parameter | None
    cls_token: nn.Parameter | None
    blocks: nn.Module
    global_pool: str
    default_cfg: JsonDict
    num_classes: int
    num_features: int
    forward_features: Callable[[Tensor], Tensor]
    get_classifier: Callable[[], nn.Module | tuple[nn.Module, ...]]
    init_weights: Callable[[], None]
    set_grad_checkpointing: Callable[[bool], None]
    set_input_size: Callable[..., None]
    teacher: Any
    """The part of the teacher in a student that copies attention, which also has `teacher_input` and `copied`."""
    teacher_input: Any
    copied: Any


def vit(model: nn.Module) -> ViT:
    """Return the same model, typed with the attributes of timm's vision transformers."""
    return cast(ViT, model)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode inside the block; then restore the mode of each module."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


# What stands in a block of a pyramid that has no attention.


class NoAttention(nn.Module):
    """Add nothing to the tokens: the block is its MLP alone, as in the early stages of LIT (arXiv:2105.14217)."""

    plan_size: tuple[int, int] | None = None
    """The image size for which the model was converted."""

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return x.new_zeros(())

    def set_input_size(self, *sizes: Any) -> None:
        """Do nothing: there is nothing that depends on the size."""


M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Site:
    """A block of a model: its place, and the tokens and heads of its attention."""

    index: int
    """The number among all blocks of the model, as in plans and records."""
    stage: int
    """From 0; a plain vision transformer has one stage."""
    place: int
    """The number in the stage."""
    path: str
    """The name of the block in the model, such as "layers.0.blocks.1"."""
    width: int
    num_heads: int
    """0 for a block without attention."""
    head_dim: int
    geometry: Geometry | None
    """The tokens of the stage for images of the model's size; None if the model has no size."""

    @property
    def shape(self) -> LayerShape:
        """Return the sizes of the block's attention.

        Raises UnsupportedModelError: the model was built without an image size.
        """
        if self.geometry is None:
            raise UnsupportedModelError(
                f"this model was built without an image size, so the number of tokens of {self.path} is unknown: "
                "build it with img_size, or resize it (graftvit.models.conversion.resize)"
            )
        return LayerShape(self.num_heads, self.head_dim, self.geometry)

    def block(self, model: nn.Module) -> Block:
        """Return the block of this site in `model`."""
        return cast(Block, submodule(model, self.path))

    def replace_block(self, model: nn.Module, block: nn.Module) -> None:
        """Put another block in this place."""
        parent, _, name = self.path.rpartition(".")
        submodule(model, parent)._modules[name] = block


def shallow(module: M) -> M:
    """Return a module with the same parameters and buffers whose children can be replaced."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def listed(like: nn.Module, modules: Sequence[nn.Module]) -> nn.Module:
    """Return modules in a list of the kind that a model has them in."""
    return nn.Sequential(*modules) if isinstance(like, nn.Sequential) else nn.ModuleList(modules)


def submodule(model: nn.Module, path: str) -> nn.Module:
    """Return a submodule by its registered name, even while another attribute hides that name (`replay.py`)."""
    for name in filter(None, path.split(".")):
        model = cast(nn.Module, model._modules[name])
    return model


def merged_grid(merge: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width of the output of a merge or patch embedding that is a convolution."""
    convolution = merge.dconv if isinstance(merge, TokenMerging) else merge.proj
    sides: Any = zip(
        size, convolution.kernel_size, convolution.stride, convolution.padding, strict=True
    )  # fmt: skip
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side, kernel, stride, padding in sides)
    return height, width


class Family(ABC):
    """Models of timm that are built in one way. A new family is a file and an entry of `walk.FAMILIES`."""

    name: str
    models: tuple[type[nn.Module], ...]
    blocks: tuple[type[nn.Module], ...]
    attentions: tuple[type[nn.Module], ...]
    is_pyramid = True
    """The model has several stages, with fewer tokens in each."""
    sized_when_built = True
    """timm's constructor takes `img_size`, and builds parts for it."""
    relative_bias = False
    """timm's layers have a relative position bias."""
    takes_size = True
    """timm's constructor takes `img_size`."""
    merging: type[TokenMerging] = TokenMerging
    """Deformable merging with the input and output of this family's merges."""

    def merges(self, model: nn.Module) -> list[str]:
        """Return the names of the parts that merge tokens, one before each stage but the first."""
        return []

    def size_arguments(self, model: nn.Module) -> dict[str, Any]:
        """Return the arguments that build a model again that was resized after it was built."""
        return {}

    @abstractmethod
    def paths(self, model: nn.Module) -> list[list[str]]:
        """Return the names of the blocks, stage by stage."""

    @abstractmethod
    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        """Return the height and width of the images that the model is meant for; None if it has no size."""

    @abstractmethod
    def geometries(self, model: nn.Module, size: tuple[int, int]) -> list[Geometry]:
        """Return the tokens of each stage for images of this size (height, width)."""

    @abstractmethod
    def resize(self, model: nn.Module, size: tuple[int, int]) -> None:
        """Prepare the model for images of another size, and resample what is tied to the size."""

    @abstractmethod
    def with_blocks(self, model: nn.Module, blocks: Sequence[nn.Module], *, cut: bool) -> nn.Module:
        """Return a model that shares everything with `model` except its blocks.

        `blocks` are all blocks of the model, or its first ones: then the model ends with the last of them. With `cut`
        only the blocks count, and what comes after the last of them is left out where that is possible.
        """

    def embedding(self, model: nn.Module) -> nn.Module:
        """Return the module that sees the images first."""
        return submodule(model, "patch_embed")

    def last_tokens(self, model: nn.Module) -> nn.Module:
        """Return the module whose output are the tokens of the last stage after the final norm."""
        return submodule(model, "norm")

    def patches(self, tokens: Tensor, geometry: Geometry) -> Tensor:
        """Return these tokens as (B, rows, columns, C) of the last grid, without prefix tokens."""
        found: Tensor = tokens
        return found if tokens.dim() == 4 else found[:, geometry.num_prefix :].unflatten(1, geometry.grid)

    def recomputed(self, model: nn.Module) -> list[nn.Module]:
        """Return the modules that run the blocks in `blocks` again in the backward pass with `grad_checkpointing`."""
        return [model]

    def by_stage(self, model: nn.Module, blocks: Sequence[nn.Module]) -> list[list[nn.Module]]:
        """Return the first blocks of a model stage by stage, without empty stages."""
        stages, rest = [], list(blocks)
        for paths in self.paths(model):
            stages.append(rest[: len(paths)])
            rest = rest[len(paths) :]
        return [stage for stage in stages if stage]

    def sites(self, model: nn.Module) -> Iterator[Site]:
        """Yield the sites of a model in order."""
        paths, size = self.paths(model), self.image_size(model)
        geometries = [None] * len(paths) if size is None else self.geometries(model, size)
        index = 0
        for stage, (names, geometry) in enumerate(zip(paths, geometries, strict=True)):
            for place, path in enumerate(names):
                width, heads, head_dim = _sizes(submodule(model, path))
                yield Site(index, stage, place, path, width, heads, head_dim, geometry)
                index += 1


def _sizes(block: Any) -> tuple[int, int, int]:
    """Return width, number of heads and width of a head."""
    projection = getattr(block.attn, "proj", None)
    if projection is None:
        return int(block.mlp.fc1.in_features), 0, 0
    heads = int(block.attn.num_heads)
    return int(projection.out_features), heads, int(projection.in_features) // heads
